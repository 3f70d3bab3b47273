"""WebDataset tars of other programs (``webdataset.ShardWriter``, img2dataset, ...) as a dataset of ours.

What such a folder lacks is an index and a manifest; they are made by reading every tar once, and the tars are never
touched::

    00000.tar  00000.parquet  00000_stats.json     as img2dataset leaves them (the .parquet is its own)
    index/00000.parquet                            our index
    index/00000.json                               its commit record: this tar is done
    manifest.json                                  written last

Killed at any moment and run again, only tars without a record are read. A tar of another size than recorded is read
again; whether one was changed otherwise, ``glscl shards verify`` tells.

Which members make a sample is said by ``sharding.tarnames``, as for ``source: webdataset``; only here they must be
neighbours, since the index has one range of bytes for a sample. Captions come from the JSON (one text or a list, under
a given field), else from the text member, one a line. Samples without caption or media, or whose media have no readable
header, are counted by cause and left out of the index.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field
from xxhash import xxh3_64_intdigest

from sharding.captions import NotText, stored_captions
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.filters.config import chosen
from sharding.filters.words import count_words
from sharding.index import INDEX_SCHEMA, index_table, write_index
from sharding.keys import keyed_shard, repeated_keys
from sharding.manifest import (
    MANIFEST_PATH,
    OVERLAY_FOLDER,
    Counts,
    Manifest,
    Modality,
    ShardRecord,
    canonical_digest,
    load_manifest,
)
from sharding.media import MediaInfo, probe_image
from sharding.media.single_frame import refuse_still
from sharding.media.video import clip_info
from sharding.names import Skipped, escape_name
from sharding.secrets import public_address
from sharding.sources.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES, UnreadableFile, reading
from sharding.storage import Storage, StoredFile
from sharding.tarnames import TEXT_EXTENSIONS, clips_of, count_aside, last_part, of_kind, split_name
from sharding.tarwalk import Member, TarWalk

_MEDIA: dict[Modality, frozenset[str]] = {
    "image": frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES),
    "video": frozenset(suffix.removeprefix(".") for suffix in VIDEO_SUFFIXES),
}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
# Bytes of a member that is read whole, as one is that is indexed; of others nothing is kept.
_LARGEST_MEMBER = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KIND = "shards"  # of the source, in the manifest's configuration
_OURS = ("index", OVERLAY_FOLDER, MANIFEST_PATH)
_SHOWN = 3  # examples of broken samples in an error
_READERS = 16


class ForeignRecord(BaseModel):
    """Commit record of one tar: what was found in it. ``tar_bytes``: its size when it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[3]  # of the index
    tar_bytes: int
    modality: Modality
    caption_field: str
    shard: ShardRecord | None
    counts: Counts
    examples: list[str]
    skipped: dict[str, int] = Field(default_factory=dict)  # members of no sample, by reason


def index_shards(
    dataset: Storage,
    modality: Modality,
    *,
    name: str = "",
    caption_field: str = "caption",
    bad_limit: float = 0.1,
    jobs: int = 4,
    progress: Callable[[int, int, ForeignRecord], None] | None = None,
) -> Manifest:
    """Make the indexes and the manifest of a folder of tars, or return the manifest that is there.

    Args:
        dataset: the folder; tars in folders below it count too. It must be writable unless the manifest is there.
        name: of the dataset; default: that of the folder.
        caption_field: of the JSON members: a text, or a list of texts.
        bad_limit: share of samples that may be unusable.
        jobs: tars read at a time; each takes the memory of one sample and of its index.
        progress: called after each tar with (number done, number of tars, its record).

    Raises:
        UserError: no tars, compressed tars, a key that stands twice, members of a key that do not lie together;
            a manifest is there that is another program's, or whose tars or options are others.
        BadData: a tar is cut off or damaged; the detail names it and the byte.
        BadDataLimit: more unusable samples than ``bad_limit``.
    """
    there = load_manifest(dataset) if dataset.exists(MANIFEST_PATH) else None
    if there is not None and there.configuration.get("source", {}).get("kind") != _KIND:
        return there  # made by this program: it needs no index
    skipped = Skipped()
    tars = _list_tars(dataset, skipped)
    listing = canonical_digest([[escape_name(file.path), file.size] for file in tars])
    configuration: dict[str, Any] = {
        "source": {"kind": "shards", "modality": modality, "caption_field": caption_field}
    }
    if there is not None:
        return _finished(there, dataset, listing, configuration)
    if not tars:
        raise UserError(f"{dataset.url} has no .tar to index")
    dataset.check(write=True)
    records: list[ForeignRecord] = []
    with ThreadPoolExecutor(jobs, thread_name_prefix="index") as pool:
        try:
            for record in pool.map(lambda file: _index_tar(dataset, file, modality, caption_field), tars):
                records.append(record)
                if progress is not None:
                    progress(len(records), len(tars), record)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shards = [record.shard for record in records if record.shard is not None]
    counts = Counts()
    for record in records:
        counts = counts.plus(record.counts)
        skipped.merge(record.skipped)
    _check_counts(dataset, records, counts, bad_limit)
    repeated = repeated_keys([keyed_shard(dataset, shard) for shard in shards], limit=1)
    if repeated:
        where = " and ".join(dict.fromkeys(f"{shard.record.name}.tar" for shard in repeated[0].shards))
        raise UserError(
            f"{dataset.url}: the key {repeated[0].key} stands twice ({where}); keys must be unique in a dataset"
        )
    manifest = Manifest(
        name=name or dataset.url.rpartition("/")[2],
        modality=modality,
        configuration=configuration,
        configuration_digest=canonical_digest(configuration),
        source={
            "url": dataset.url,
            "inputs": counts.read,
            "digest": listing,
            "skipped": skipped.counts(),
        },
        shards=shards,
        counts=counts,
    )
    dataset.write_json(MANIFEST_PATH, manifest.model_dump(mode="json"))
    return manifest


def left_out(dataset: Storage, key: str) -> str | None:
    """Why a key of an indexed tar is not in the index, where it is among the examples that were noted of each tar."""
    paths = [file.path for file in dataset.list("index") if file.path.endswith(".json")]

    def example(path: str) -> str | None:
        try:
            noted = ForeignRecord.model_validate(dataset.read_json(path)).examples
        except (FileNotFoundError, ValueError):  # it is of another version, or none
            return None
        return next((text for text in noted if f", key {key}: " in text), None)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="examples") as pool:
        return next(filter(None, pool.map(example, paths)), None)


def _list_tars(dataset: Storage, skipped: Skipped) -> list[StoredFile]:
    tars = []
    for path, size in skipped.visible(dataset.list(others=skipped.add_other)):
        suffix = path.lower()
        if suffix.endswith(_COMPRESSED):
            raise UserError(
                f"{escape_name(dataset.url_of(path))} is compressed: samples cannot be read from it one by one; "
                "unpack it to a plain .tar"
            )
        if suffix.endswith(".tar") and not path.endswith(".tar"):
            raise UserError(f"{escape_name(dataset.url_of(path))}: rename it, so that it ends with .tar")
        if path.endswith(".tar"):
            tars.append(StoredFile(path, size))
        elif path.partition("/")[0] not in _OURS:
            skipped.add_file(path)
    return tars


def _finished(manifest: Manifest, dataset: Storage, listing: str, configuration: dict[str, Any]) -> Manifest:
    """The manifest that is there, if it is that of these tars and options."""
    if manifest.source.get("digest") != listing:
        raise UserError(
            f"{dataset.url}: tars were added, removed or changed since it was indexed; delete its {MANIFEST_PATH} "
            "(and its folder overlay) to index it again: what has not changed is not read again"
        )
    if manifest.configuration != configuration:
        raise UserError(
            f"{dataset.url} was indexed as {manifest.configuration['source']}; delete its "
            f"{MANIFEST_PATH} to change that"
        )
    return manifest


def _check_counts(dataset: Storage, records: list[ForeignRecord], counts: Counts, bad_limit: float) -> None:
    bad = sum(number for cause, number in counts.dropped.items() if not chosen(cause))
    causes = ", ".join(f"{cause} {number}" for cause, number in counts.dropped.items())
    examples = [example for record in records for example in record.examples][:_SHOWN]
    if bad > bad_limit * counts.read:
        raise BadDataLimit(
            f"{bad} of {counts.read} samples of {dataset.url} cannot be used, which is more than {bad_limit:g} "
            f"({causes}); for example {'; '.join(examples)}"
        )
    if not counts.kept:
        raise UserError(f"{dataset.url}: no sample with media and captions in its tars")


def _index_tar(dataset: Storage, file: StoredFile, modality: Modality, caption_field: str) -> ForeignRecord:
    """Index one tar, unless its record says that this was done. One that the storage does not give counts as one
    sample, and is asked for again by the next run.
    """
    name = escape_name(file.path[: -len(".tar")])
    path = f"index/{name}.json"
    try:
        record = ForeignRecord.model_validate(dataset.read_json(path))
    except UserError:
        raise  # a ValueError too: the storage refuses
    except (FileNotFoundError, ValueError):
        pass  # not read yet, damaged, or by a version of this program whose index was another
    else:
        if (record.tar_bytes, record.modality, record.caption_field) == (file.size, modality, caption_field):
            return record
    url = dataset.url_of(file.path)
    reader = _TarIndex(url, modality, caption_field)
    skipped = Skipped()
    try:
        with reading(file.path):
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise UnreadableFile(
                    "bad-address",
                    f"{escape_name(url)}: its key has an empty, '.' or '..' part between slashes",
                )
            with dataset.open(file.path) as stream:
                walk = TarWalk(stream, url)
                for sample in _samples(walk, url, skipped):
                    reader.add(sample)
    except UnreadableFile as fault:
        counts = Counts(read=1, dropped={fault.cause: 1})
        return _record(file, modality, caption_field, counts=counts, examples=[str(fault)])
    shard = None
    if reader.rows:
        index = write_index(pa.concat_tables([*reader.tables(), index_table([])]))
        shard = ShardRecord(
            name=name,
            samples=reader.rows,
            bytes=walk.size,
            sha256=walk.sha256,
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
            caption_field=caption_field,
        )
        dataset.write_bytes(shard.index, index)
    record = _record(
        file,
        modality,
        caption_field,
        shard=shard,
        counts=reader.counts,
        examples=reader.examples,
        skipped=skipped.counts(),
    )
    dataset.write_json(path, record.model_dump(mode="json"))
    return record


def _record(file: StoredFile, modality: Modality, caption_field: str, **found: Any) -> ForeignRecord:
    values = {"version": 3, "tar_bytes": file.size, "modality": modality, "caption_field": caption_field}
    return ForeignRecord.model_validate(values | {"shard": None} | found)


_Found = tuple[Member, bytes]


@dataclass
class _Sample:
    """The members of a key by extension (lower case): several of one where names differ in case, or not at all."""

    key: str
    members: defaultdict[str, list[_Found]] = field(default_factory=lambda: defaultdict(list))

    def of_kind(self, kinds: Collection[str]) -> list[tuple[str, _Found]]:
        """(last part of the extension, member) of those that are of one of ``kinds``, in the order of the tar."""
        found = of_kind(self.members, kinds)
        return [(last_part(extension), member) for extension in found for member in self.members[extension]]


def _samples(walk: TarWalk, url: str, skipped: Skipped) -> Iterator[_Sample]:
    """Members in groups by key, which must lie together."""
    current, seen = _Sample(""), set[str]()
    for member, data in walk.members(largest=_LARGEST_MEMBER):
        name = split_name(member.name)
        if name is None:
            count_aside(member.name, skipped)
            continue
        key, extension = name
        if key != current.key:
            if key in seen:
                raise UserError(
                    f"{url}: {escape_name(member.name)} at byte {member.header_offset} belongs to a key that "
                    "stands further up: the members of a sample must lie together, and no key may stand twice "
                    "(source: {kind: webdataset} makes new shards of such tars)"
                )
            seen.add(key)
            if current.key:
                yield current
            current = _Sample(key)
        if member.regular:
            current.members[extension].append((member, data))
    if current.key:
        yield current


class _TarIndex:
    """Collects the rows of one tar's index, and what is wrong with samples."""

    def __init__(self, url: str, modality: Modality, caption_field: str) -> None:
        self._url, self._modality, self._field = url, modality, caption_field
        self._rows: list[dict[str, object]] = []
        self._tables: list[pa.Table] = []
        self._dropped: Counter[str] = Counter()
        self.rows = 0
        self.examples: list[str] = []

    @property
    def counts(self) -> Counts:
        """Samples seen, indexed, and left out by cause."""
        dropped = dict(sorted(self._dropped.items()))
        return Counts(read=self.rows + self._dropped.total(), kept=self.rows, dropped=dropped)

    def add(self, sample: _Sample) -> None:
        """Index a sample, or count why it cannot be used."""
        try:
            self._rows.append(self._row(sample))
        except BadData as error:
            self._dropped[error.cause] += 1
            if len(self.examples) < _SHOWN:
                self.examples.append(f"{self._url}, key {escape_name(sample.key)}: {error}")
            return
        self.rows += 1
        if len(self._rows) >= 1000:  # columns take a tenth of the memory of rows
            self._flush()

    def tables(self) -> list[pa.Table]:
        """The rows, in order."""
        self._flush()
        return self._tables

    def _flush(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA))
        self._rows = []

    def _row(self, sample: _Sample) -> dict[str, object]:
        self._check_names(sample)
        found = sample.of_kind(_MEDIA[self._modality])
        if self._modality == "video":
            clips = clips_of([extension for extension, _ in found])
            found = [one for one in found if one[0] in clips]
        if len(found) != 1:
            names = ", ".join(sorted(map(escape_name, sample.members))) or "links"
            cause = "several-media" if found else "no-media"
            raise BadData(cause, f"its members are {names}: one {self._modality} is wanted")
        extension, (media, data) = found[0]
        missing = (Member("", 0, media.offset, 0), b"")
        text, words = self._text(sample) or missing
        description, value = next((one for _, one in sample.of_kind(("json",))), missing)
        for member, read in ((media, data), (text, words), (description, value)):
            if member.size != len(read):
                raise BadData("too-many-bytes", f"{escape_name(member.name)} has {member.size}")
        try:
            captions = stored_captions(value, words, self._field)
        except NotText as error:
            raise BadData("caption-not-text", str(error)) from None
        except ValueError as error:
            raise BadData("no-caption", str(error)) from None
        info = _probe(data, self._modality)
        facts = _facts(value)
        return {
            "key": escape_name(sample.key),
            "extension": extension,
            "media_offset": media.offset,
            "media_size": media.size,
            "text_offset": text.offset,
            "text_size": text.size,
            "json_offset": description.offset,
            "json_size": description.size,
            "xxh3": xxh3_64_intdigest(data),
            "text_xxh3": xxh3_64_intdigest(words),
            "json_xxh3": xxh3_64_intdigest(value),
            "width": info.width,
            "height": info.height,
            "frames": info.frames,
            "duration": info.duration,
            "caption_length": len(captions[0]),
            "caption_words": count_words(captions[0]),
            "captions": len(captions),
            "sha256": facts.get("sha256") or hashlib.sha256(data).hexdigest(),
            "source": facts.get("source", ""),
        }

    @staticmethod
    def _check_names(sample: _Sample) -> None:
        for members in sample.members.values():
            names = [member.name for member, _ in members]
            if len(set(names)) < len(names):
                member = members[-1][0]
                where = f"again at byte {member.header_offset}"
                raise BadData("repeated-member", f"{escape_name(member.name)} stands twice, {where}")

    @staticmethod
    def _text(sample: _Sample) -> _Found | None:
        """The text member: of several the first by extension, in the order of ``TEXT_EXTENSIONS``."""
        found = sample.of_kind(TEXT_EXTENSIONS)
        found.sort(key=lambda member: TEXT_EXTENSIONS.index(member[0]))
        return found[0][1] if found else None


def _facts(description: bytes) -> dict[str, str]:
    """Source and digest of the source's bytes, where a JSON member has them as img2dataset writes them."""
    try:
        value = json.loads(description) if description else {}
    except (ValueError, RecursionError):  # the captions are those of the text member
        value = {}
    facts = {}
    if isinstance(value, dict):
        digest = value.get("sha256")
        if isinstance(digest, str) and _SHA256.fullmatch(digest.lower()):
            facts["sha256"] = digest.lower()
        source = next((value[name] for name in ("source", "url") if isinstance(value.get(name), str)), "")
        facts["source"] = escape_name(public_address(source))
    return facts


def _probe(data: bytes, modality: Modality) -> MediaInfo:
    """Size, and of a clip the frames and seconds, from headers and packet times; of a clip one frame is decoded."""
    if modality == "image":
        return probe_image(data)
    refuse_still(data)
    return clip_info(data)
