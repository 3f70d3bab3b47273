"""Reading every byte of a dataset again, and naming what is wrong: which shard, which key, which byte.

A tar that this program wrote is checked against the one layout its index allows: header, data, padding, the next
header, ..., the end-of-archive blocks. So every byte of it belongs to something that can be named, and checking
goes on after a fault. A tar of another program's is walked from header to header; what the index does not name is
covered by the tar's sha256 alone.

Memory is bounded: one index, one block of the tar and (with ``decode``, or in another program's tar) one media
member for each shard that is read at the same time.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple

import pyarrow as pa
from xxhash import xxh3_64, xxh3_64_intdigest

from sharding.captions import stored_captions
from sharding.errors import BadData, UserError
from sharding.index import load_index
from sharding.keys import KeyedShard, repeated_keys
from sharding.manifest import MANIFEST_PATH, OVERLAY_FOLDER, Manifest, Modality, ShardRecord
from sharding.media import decode_image, decode_video
from sharding.names import escape_name, hidden
from sharding.overlay import Dropped
from sharding.storage import Storage
from sharding.tarwalk import BLOCK, TarWalk
from sharding.writer import member_info

FAULTS_OF_A_SHARD = 100  # listed; further ones are counted
_CHUNK = 1 << 20
_FRAMES = 16  # decoded of a clip, spread over it

_Kind = Literal["media", "text", "json"]
_KINDS: tuple[_Kind, ...] = ("media", "text", "json")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    ``offset``: byte of ``file``; of a changed header or padding the first that is changed, of a changed member the
    first of its data (its checksum says no more), of a cut file its end. None where no place can be given.
    """

    cause: str
    file: str
    detail: str
    key: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        place = [self.file]
        place += [f"key {self.key}"] if self.key is not None else []
        place += [f"byte {self.offset}"] if self.offset is not None else []
        return f"{', '.join(place)}: {self.cause}: {self.detail}"


@dataclass
class ShardReport:
    """What was found in one shard. ``bytes`` read; ``faults`` at most ``FAULTS_OF_A_SHARD``, ``more`` beyond."""

    name: str
    bytes: int = 0
    samples: int = 0
    faults: list[Fault] = field(default_factory=list)
    more: int = 0
    first_key: str = ""
    last_key: str = ""

    def add(self, fault: Fault) -> None:
        """Note a fault, or only count it where there are many."""
        if len(self.faults) < FAULTS_OF_A_SHARD:
            self.faults.append(fault)
        else:
            self.more += 1


@dataclass
class Verification:
    """What was found in a dataset. ``extra``: files that are none of the dataset's, which do no harm."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    more: int = 0
    extra: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify(
    dataset: Storage,
    manifest: Manifest,
    *,
    jobs: int = 1,
    decode: bool = False,
    progress: Callable[[ShardReport], None] | None = None,
) -> Verification:
    """Check every shard, the overlay, the uniqueness of keys and the folder; goes on after faults.

    Args:
        jobs: processes, each with a shard at a time; 1: in this process.
        decode: decode every image, and 16 frames of every clip.
        progress: called after each shard, in the order of the manifest.

    Raises:
        StorageFault: the storage cannot be reached, so nothing can be said.
    """
    result = Verification()
    keyed = []
    for number, report in enumerate(_reports(dataset, manifest, jobs, decode)):
        result.shards += 1
        result.samples += report.samples
        result.bytes += report.bytes
        result.faults += report.faults
        result.more += report.more
        if report.first_key:
            keyed.append(KeyedShard(dataset, manifest.shards[number], report.first_key, report.last_key))
        if progress is not None:
            progress(report)
    for repeated in repeated_keys(keyed, limit=FAULTS_OF_A_SHARD):
        files = " and ".join(dict.fromkeys(f"{shard.record.name}.tar" for shard in repeated.shards))
        result.faults.append(
            Fault("duplicate-key", files, "a key must be unique in its dataset", repeated.key)
        )
    result.faults += _overlay_faults(dataset, manifest)
    _check_folder(dataset, manifest, result)
    return result


def _reports(dataset: Storage, manifest: Manifest, jobs: int, decode: bool) -> Iterator[ShardReport]:
    if jobs == 1:
        for record in manifest.shards:
            yield verify_shard(dataset, record, manifest.modality, decode)
        return
    # Spawned: neither threads nor S3 clients of this process may be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: list[Future[ShardReport]] = []
        try:
            for record in manifest.shards:
                running.append(pool.submit(verify_shard, dataset, record, manifest.modality, decode))
                if len(running) >= 2 * jobs:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def verify_shard(dataset: Storage, record: ShardRecord, modality: Modality, decode: bool) -> ShardReport:
    """Check one shard and its index; see ``verify``."""
    report = ShardReport(record.name)
    index = None
    try:
        index = load_index(dataset, record)
        report.samples = len(index)
        report.first_key, report.last_key = _check_rows(index, record, report)
    except BadData as error:
        report.add(Fault(error.cause, record.index, error.detail))
    try:
        with dataset.open(record.tar) as file:
            if record.caption_field is None and index is not None:
                _Layout(file, record, index, report, modality if decode else None).check()
            else:
                _walk(file, dataset, record, index, report, modality if decode else None)
    except FileNotFoundError:
        report.add(Fault("missing-shard", f"{record.name}.tar", "does not exist, but the manifest names it"))
    return report


def _check_rows(index: pa.Table, record: ShardRecord, report: ShardReport) -> tuple[str, str]:
    """Keys of the index are unique (and in order, in ours); gives the smallest and the largest."""
    keys = index["key"].to_pylist()
    if record.caption_field is None:
        for before, after in itertools.pairwise(keys):
            if before >= after:
                report.add(Fault("index-mismatch", record.index, f"out of order after {before}", after))
    else:
        for key, times in Counter(keys).items():
            if times > 1:
                report.add(Fault("duplicate-key", record.index, f"stands in {times} rows", key))
    return (min(keys), max(keys)) if keys else ("", "")


class _Part(NamedTuple):
    """A member as the index has it."""

    offset: int
    size: int
    xxh3: int
    row: int
    kind: _Kind


def _parts(index: pa.Table) -> list[_Part]:
    """The members in the order in which they lie in the tar; what a sample lacks is left out."""
    parts = []
    rows = range(len(index))
    media_offsets = index["media_offset"].to_pylist()
    for kind in _KINDS:
        checksum = "xxh3" if kind == "media" else f"{kind}_xxh3"
        columns = [index[name].to_pylist() for name in (f"{kind}_offset", f"{kind}_size", checksum)]
        for offset, size, xxh3, row in zip(*columns, rows, strict=True):
            if kind == "media" or size or offset != media_offsets[row]:
                parts.append(_Part(offset, size, xxh3, row, kind))
    return sorted(parts)


class _Checker:
    """Checks members by what the index says of them."""

    def __init__(
        self, record: ShardRecord, index: pa.Table, report: ShardReport, modality: Modality | None
    ) -> None:
        self._record, self._report, self._modality = record, report, modality
        self._keys = index["key"].to_pylist()
        self._columns = {
            name: index[name].to_pylist()
            for name in ("extension", "captions", "caption_length", "width", "height", "frames")
        }
        self._texts: dict[int, dict[_Kind, bytes]] = {}
        self._changed: set[int] = set()  # rows whose text or JSON is not what was written

    @property
    def keeps_media(self) -> bool:
        """Whether ``member`` wants the bytes of media too."""
        return self._modality is not None

    def name(self, part: _Part) -> str:
        """Name of the member in a tar of ours."""
        extension = {"media": self._columns["extension"][part.row], "text": "txt", "json": "json"}[part.kind]
        return f"{self._keys[part.row]}.{extension}"

    def fault(self, part: _Part, cause: str, detail: str, offset: int) -> None:
        self._report.add(Fault(cause, f"{self._record.name}.tar", detail, self._keys[part.row], offset))

    def member(self, part: _Part, xxh3: int, data: bytes) -> None:
        """Check a member by its checksum, and its content (``data``: empty for media that are not decoded)."""
        if xxh3 != part.xxh3:
            detail = f"the {part.kind} member has XXH3 {xxh3:016x}, {part.xxh3:016x} in the index"
            self.fault(part, "checksum-mismatch", detail, part.offset)
            if part.kind != "media":
                self._changed.add(part.row)
        elif part.kind == "media":
            self._decode(part, data)
        else:
            self._texts.setdefault(part.row, {})[part.kind] = data

    def captions(self, part: _Part) -> None:
        """Compare the captions of a sample with the index; ``part``: the later one of its text members."""
        texts = self._texts.pop(part.row, {})
        if part.row in self._changed:
            return
        text = texts.get("text", b"")
        try:
            captions = stored_captions(texts.get("json", b""), text, self._record.caption_field)
        except ValueError as error:
            self.fault(part, "bad-json", f"no captions ({error})", part.offset)
            return
        counts = tuple(self._columns[name][part.row] for name in ("captions", "caption_length"))
        if (len(captions), len(captions[0])) != counts:
            detail = f"{len(captions)} captions, the first of {len(captions[0])} characters; the index has {counts}"
            self.fault(part, "index-mismatch", detail, part.offset)
        if self._record.caption_field is None and captions[0].encode() != text:
            self.fault(part, "bad-text", "the text member is not the first caption of the JSON", part.offset)

    def _decode(self, part: _Part, data: bytes) -> None:
        if self._modality is None:
            return
        width, height = (self._columns[name][part.row] for name in ("width", "height"))
        try:
            if self._modality == "image":
                shape = decode_image(data).shape[:2]
            else:
                frames = min(_FRAMES, self._columns["frames"][part.row])
                shape = decode_video(data, frames).shape[1:3]
        except BadData as error:
            self.fault(part, error.cause, error.detail, part.offset)
            return
        # A tar of another program's may hold images that are yet to be turned upright.
        if sorted(shape) != sorted((height, width)):
            detail = f"decodes to {shape[1]}x{shape[0]} pixels, the index has {width}x{height}"
            self.fault(part, "index-mismatch", detail, part.offset)


class _Layout:
    """Checks a tar of ours, whose every byte follows from its index and the members' data."""

    def __init__(
        self,
        file: BinaryIO,
        record: ShardRecord,
        index: pa.Table,
        report: ShardReport,
        modality: Modality | None,
    ) -> None:
        self._file, self._record, self._report = file, record, report
        self._checker = _Checker(record, index, report, modality)
        self._parts = _parts(index)
        self._digest = hashlib.sha256()
        self._position = 0

    def check(self) -> None:
        """Read the file to its end."""
        located = len(self._report.faults) + self._report.more
        self._check_members()
        self._check_end()
        self._report.bytes = self._position
        located = len(self._report.faults) + self._report.more - located
        if self._position != self._record.bytes:
            detail = f"has {self._position} bytes, {self._record.bytes} in the manifest"
            self._fault("size-mismatch", detail, min(self._position, self._record.bytes))
        elif self._digest.hexdigest() != self._record.sha256 and not located:
            self._fault(
                "sha256-mismatch",
                f"{self._digest.hexdigest()}, {self._record.sha256} in the manifest, "
                "though the tar is what its index says",
                None,
            )

    def _fault(self, cause: str, detail: str, offset: int | None) -> None:
        self._report.add(Fault(cause, f"{self._record.name}.tar", detail, offset=offset))

    def _check_members(self) -> None:
        for part in self._parts:
            header = _rounded(self._position)
            if part.offset != header + BLOCK:
                if part.offset < header + BLOCK:
                    detail = "the index places it inside another member"
                    self._checker.fault(part, "index-mismatch", detail, part.offset)
                    continue
                self._checker.fault(part, "unindexed", "bytes before it that the index does not name", header)
            if not self._check_between(part) or not self._check_data(part):
                return

    def _check_between(self, part: _Part) -> bool:
        """The padding of the member before, and the header of this one."""
        end = _rounded(self._position)
        self._check_zeros(end - self._position, "padding")
        while (left := part.offset - BLOCK - self._position) > 0 and self._read(min(_CHUNK, left)):
            pass
        start = self._position
        header = self._read(BLOCK)
        expected = member_info(self._checker.name(part), part.size).tobuf(tarfile.USTAR_FORMAT)
        if len(header) < BLOCK:
            return self._ended(part)
        if header != expected:
            at = next(
                i for i, (left, right) in enumerate(zip(header, expected, strict=True)) if left != right
            )
            self._checker.fault(
                part, "bad-header", f"the header of {self._checker.name(part)} is changed", start + at
            )
        return True

    def _check_data(self, part: _Part) -> bool:
        digest, left, chunks = xxh3_64(), part.size, []
        keeps = part.kind != "media" or self._checker.keeps_media
        while left:
            data = self._read(min(_CHUNK, left))
            if not data:
                return self._ended(part)
            digest.update(data)
            left -= len(data)
            if keeps:
                chunks.append(data)
        self._checker.member(part, digest.intdigest(), b"".join(chunks))
        if part.kind == "text":  # KEY.json lies before KEY.txt
            self._checker.captions(part)
        return True

    def _ended(self, part: _Part) -> bool:
        detail = "the shard ends here: this sample and all after it are cut off"
        self._checker.fault(part, "truncated-shard", detail, self._position)
        return False

    def _check_end(self) -> None:
        last = self._parts[-1] if self._parts else None
        if last is not None and self._position < last.offset + last.size:
            return  # truncated, as was said
        self._check_zeros(_rounded(self._position) - self._position, "padding")
        start = self._position
        while self._check_zeros(_CHUNK, "end of the archive"):
            pass
        if self._position - start < 2 * BLOCK:
            self._fault("truncated-shard", "has no end-of-archive blocks", self._position)

    def _check_zeros(self, size: int, what: str) -> int:
        """Read bytes that must be zero; gives how many there were."""
        start = self._position
        data = self._read(size)
        stripped = data.lstrip(b"\0")
        if stripped:
            offset = start + len(data) - len(stripped)
            self._fault("bad-padding", f"the {what} is not zero", offset)
        return len(data)

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._position += len(data)
        return data


def _walk(
    file: BinaryIO,
    dataset: Storage,
    record: ShardRecord,
    index: pa.Table | None,
    report: ShardReport,
    modality: Modality | None,
) -> None:
    """Check a tar of another program's (or one whose index is lost) from header to header."""
    checker = _Checker(record, index, report, modality) if index is not None else None
    parts = {part.offset: part for part in _parts(index)} if index is not None else {}
    last = {part.row: part for part in sorted(parts.values()) if part.kind != "media"}
    walk = TarWalk(file, dataset.url_of(record.tar))
    before = len(report.faults) + report.more
    try:
        for member, data in walk.members():
            part = parts.pop(member.offset, None)
            if part is None or checker is None:
                continue
            if member.size != part.size:
                detail = f"{member.name} has {member.size} bytes, {part.size} in the index"
                checker.fault(part, "index-mismatch", detail, member.offset)
                continue
            checker.member(part, xxh3_64_intdigest(data), data)
            if last.get(part.row) == part:
                checker.captions(part)
    except BadData as error:
        report.add(Fault(error.cause, f"{record.name}.tar", error.detail, offset=walk.size))
        walk.drain()
    report.bytes = walk.size
    if checker is not None:
        for part in sorted(parts.values()):
            checker.fault(
                part, "missing-member", "the index names it, but no header leads to it", part.offset
            )
    if walk.size != record.bytes:
        detail = f"has {walk.size} bytes, {record.bytes} in the manifest"
        report.add(Fault("size-mismatch", f"{record.name}.tar", detail, offset=min(walk.size, record.bytes)))
    elif walk.sha256 != record.sha256 and len(report.faults) + report.more == before:
        detail = f"{walk.sha256}, {record.sha256} in the manifest: changed where the index names nothing"
        report.add(Fault("sha256-mismatch", f"{record.name}.tar", detail))


def _overlay_faults(dataset: Storage, manifest: Manifest) -> list[Fault]:
    try:
        Dropped(dataset, manifest)
    except UserError as error:
        assert manifest.dropped_rows is not None
        return [Fault("bad-overlay", manifest.dropped_rows.path, str(error))]
    return []


def _check_folder(dataset: Storage, manifest: Manifest, result: Verification) -> None:
    """A tar that the manifest does not name is a fault: plain WebDataset readers would take it. Others are not."""
    known = {shard.tar for shard in manifest.shards} | {shard.index for shard in manifest.shards}
    known |= {MANIFEST_PATH, "plan.json", "report.html"}
    for file in dataset.list():
        folder = file.path.partition("/")[0]
        if file.path in known or folder in ("plan", "commits", "index", OVERLAY_FOLDER):
            continue
        if hidden(file.path):
            continue
        if file.path.endswith(".tar"):
            result.faults.append(
                Fault("extra-shard", escape_name(file.path), "the manifest does not name it")
            )
        elif len(result.extra) < FAULTS_OF_A_SHARD:
            result.extra.append(escape_name(file.path))


def _rounded(position: int) -> int:
    return -(-position // BLOCK) * BLOCK
