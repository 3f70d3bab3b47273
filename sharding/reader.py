"""Reading samples of a dataset by (shard, row): what stands in the slots that ``sharding.order`` gives.

A sample is one range read, since the members of a key are contiguous in the tar: from the file itself where the
dataset is on this machine, from a cached copy of the shard where there is a cache, else from the object storage,
the ranges of a batch at once. Whatever is wrong with a sample or a shard is ``BadData`` with its cause, so that
the caller can keep the slot as an empty one and count it; a shard that fails costs its own samples only. A store
that cannot be reached is no bad data: then every sample would be lost, and a restart can have them all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from sharding.cache import ShardCache
from sharding.captions import stored_captions
from sharding.errors import BadData
from sharding.index import read_index
from sharding.manifest import Manifest, ShardRecord
from sharding.overlay import Dropped
from sharding.storage import Storage

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_NUMBERS = [
    "media_offset", "media_size", "text_offset", "text_size", "json_offset", "json_size",
    "xxh3", "text_xxh3", "json_xxh3", "width", "height", "frames",
]  # fmt: skip
_INDEX_BYTES = 128 << 20  # of indices held by a reader: some hundred shards of 10,000 samples
_OPEN_SHARDS = 64
_OPEN_LEASES = 8  # few: what a reader holds open cannot be evicted
_FAILED_FOR_S = 60.0  # how long a shard found bad is not asked for again
_AT_ONCE = 16  # requests of one batch
_GAP, _MOST_MERGED = 64 << 10, 4 << 20  # bytes: neighbours so near are one request, of so much at most
_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@dataclass(frozen=True)
class RawSample:
    """A sample as stored. Sizes in pixels, ``frames`` 1 for an image, ``duration`` in seconds (0 for an
    image).
    """

    key: str
    media: bytes
    extension: str
    captions: list[str]
    width: int
    height: int
    frames: int
    duration: float


class _Descriptor:
    """An open file that closes when nobody holds it any more: a thread may still read one that left the table."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _Place(NamedTuple):
    """Where a sample lies: bytes ``begin`` to ``end`` of its shard's tar, its members counted from ``begin``."""

    shard: int
    key: str
    extension: str
    duration: float
    begin: int
    end: int
    media: int
    media_end: int
    text: int
    text_end: int
    json: int
    json_end: int
    media_xxh3: int
    text_xxh3: int
    json_xxh3: int
    width: int
    height: int
    frames: int


class _Index:
    """What reading needs of a shard's index, in columns; ``size`` in bytes of memory."""

    def __init__(self, table: pa.Table) -> None:
        self.rows = len(table)
        self._keys = table["key"].combine_chunks()
        extensions = table["extension"].combine_chunks().dictionary_encode()
        self._extensions, self._extension = extensions.dictionary.to_pylist(), extensions.indices.to_numpy()
        column = {name: table[name].to_numpy().astype(np.uint64) for name in _NUMBERS}
        members = [(column[f"{name}_offset"], column[f"{name}_size"]) for name in ("media", "text", "json")]
        begin = np.minimum.reduce([offset for offset, _ in members])
        end = np.maximum.reduce([offset + size for offset, size in members])
        bounds = [side for offset, size in members for side in (offset - begin, offset - begin + size)]
        others = [column[name] for name in ("xxh3", "text_xxh3", "json_xxh3", "width", "height", "frames")]
        # A row's numbers side by side, as ``_Place`` has them: one look-up a sample.
        self._numbers = np.stack([begin, end, *bounds, *others], axis=1)
        self._durations = table["duration"].to_numpy()
        columns = (self._keys, self._extension, self._numbers, self._durations)
        self.size = sum(column.nbytes for column in columns)

    def place(self, shard: int, row: int) -> _Place:
        """Where the sample of a row lies in its shard."""
        extension = self._extensions[self._extension[row]]
        facts = (shard, self._keys[row].as_py(), extension, self._durations.item(row))
        return _Place._make((*facts, *self._numbers[row].tolist()))


class _Failed(NamedTuple):
    cause: str
    detail: str
    until: float


class ShardReader:
    """Samples of a dataset, by shard and row. Picklable; may be used by many threads and, after a fork,
    processes.

    Memory is bounded: indices of recently used shards up to 128 MiB, and the samples at hand.

    Args:
        dataset: the folder of the dataset.
        manifest: of this dataset (``sharding.manifest.load_manifest``); every file is checked against it.
        cache: of whole shards, for datasets that are not on this machine; None reads each sample by range.
        fetches: whether a shard that the cache lacks is fetched into it while the sample waits. Without, its
            samples are read by range until somebody else (``sharding.prefetch``) has fetched it.
    """

    def __init__(
        self, dataset: Storage, manifest: Manifest, cache: ShardCache | None = None, *, fetches: bool = True
    ) -> None:
        self.dataset = dataset
        self.manifest = manifest
        self.cache = cache
        self.fetches = fetches
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._indices: OrderedDict[int, _Index] = OrderedDict()
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._failed: dict[tuple[str, int], _Failed] = {}
        self._is_local = self.dataset.local_path("") is not None
        self._dropped: Dropped | None = None  # loaded with the first sample

    def __getstate__(self) -> dict[str, Any]:
        kept = ("dataset", "manifest", "cache", "fetches")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def shard_samples(self) -> list[int]:
        """Number of samples of each shard, as ``sharding.order.epoch_order`` takes it."""
        return [shard.samples for shard in self.manifest.shards]

    @property
    def is_local(self) -> bool:
        """Whether the dataset is on this machine: then nothing is cached."""
        return self._is_local

    def read(self, shard: int, row: int) -> RawSample:
        """One sample, verified.

        Raises:
            BadData: the sample cannot be used. Causes: ``missing-shard``, ``truncated-shard``,
                ``checksum-mismatch``, ``bad-json``, ``missing-index``, ``index-mismatch`` and ``dropped`` (by the
                manifest's overlay). The detail names the shard's url and the key.
            IndexError: there is no such shard or row.
            StorageFault, UserError: the storage cannot be reached, or refuses.
        """
        place = self._place(shard, row)
        data, cached = self._read_range(place)
        if cached and not _is_right(place, data):
            # The copy was verified when it came: this disk has damaged it since.
            assert self.cache is not None
            where = self._where(self.manifest.shards[shard], place.key)
            _log.warning("%s: the cached copy is damaged: discarded", where)
            self.cache.discard(self.manifest.shards[shard].sha256)
            with self._lock:
                self._files.pop(shard, None)
            data, _ = self._read_range(place)
        return self._sample(place, data)

    def read_many(self, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, RawSample | BadData]]:
        """The samples at ``places`` ((shard, row) each), as ``read`` has them, for a batch.

        What must come from the storage is asked for at once, neighbours in a shard in one request; a caller
        that decodes as it goes does so while the rest is on its way. Leases of cached shards end with the call.

        Yields:
            (number of the place, its sample or what is wrong with it); each number once, in the order in which
            they come.

        Raises:
            IndexError, StorageFault, UserError: as ``read``.
        """
        if self._is_local:
            yield from ((number, self._read_or_fault(*place)) for number, place in enumerate(places))
            return
        try:
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ranges") as pool:
                try:
                    yield from self._read_with(pool, places)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
        finally:
            if self.cache is not None:
                with self._lock:
                    self._files.clear()

    def _read_with(
        self, pool: ThreadPoolExecutor, places: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, RawSample | BadData]]:
        shards = list(dict.fromkeys(shard for shard, _ in places))
        opened = dict(zip(shards, pool.map(self._open, shards), strict=True))
        ranges: list[tuple[int, _Place]] = []
        here = []
        for number, (shard, row) in enumerate(places):
            fault, is_here = opened[shard]
            if fault is not None:
                yield number, fault
            elif is_here:
                here.append(number)
            else:
                try:
                    ranges.append((number, self._place(shard, row)))
                except BadData as error:
                    yield number, error
        running = [pool.submit(self._read_merged, group) for group in _merged(ranges)]
        for number in here:  # while the others are on their way
            yield number, self._read_or_fault(*places[number])
        done: Future[list[tuple[int, RawSample | BadData]]]
        for done in as_completed(running):
            yield from done.result()

    def _open(self, shard: int) -> tuple[BadData | None, bool]:
        """Get the index of a shard, and its file if it can be had here: (what is wrong, whether it is here)."""
        try:
            self._index(shard)
        except BadData as error:
            return error, False
        return None, self._local_file(shard, self.manifest.shards[shard]) is not None

    def _read_or_fault(self, shard: int, row: int) -> RawSample | BadData:
        try:
            return self.read(shard, row)
        except BadData as error:
            return error

    def _read_merged(self, group: list[tuple[int, _Place]]) -> list[tuple[int, RawSample | BadData]]:
        """The samples of one request. Where it does not give all of them, each is read for itself."""
        (_, first), (_, last) = group[0], group[-1]
        results: list[tuple[int, RawSample | BadData]] = []
        data = b""
        if len(group) > 1:
            record = self.manifest.shards[first.shard]
            with contextlib.suppress(FileNotFoundError):  # said below, sample by sample
                data = self.dataset.read_bytes(record.tar, first.begin, last.end - first.begin)
        for number, place in group:
            part = data[place.begin - first.begin : place.end - first.begin]
            try:
                if not _is_right(place, part):
                    part, _ = self._read_range(place)
                results.append((number, self._sample(place, part)))
            except BadData as error:
                results.append((number, error))
        return results

    def _place(self, shard: int, row: int) -> _Place:
        """Where a sample lies. BadData if its shard has no good index, or if it is dropped."""
        record = self.manifest.shards[shard]
        if not 0 <= row < record.samples or shard < 0:
            raise IndexError(f"no row {row} in shard {shard}, which has {record.samples} samples")
        place = self._index(shard).place(shard, row)
        if self._is_dropped(shard, row, place.key):
            raise BadData("dropped", f"{self._where(record, place.key)}: dropped by the manifest")
        return place

    def _sample(self, place: _Place, data: bytes) -> RawSample:
        """The sample in the bytes of its place, verified."""
        record = self.manifest.shards[place.shard]
        if not _is_right(place, data):
            where = self._where(record, place.key)
            raise BadData("checksum-mismatch", f"{where}: its bytes are not those that were written")
        description, text = data[place.json : place.json_end], data[place.text : place.text_end]
        try:
            captions = stored_captions(description, text, record.caption_field)
        except ValueError as error:
            where = self._where(record, place.key)
            raise BadData("bad-json", f"{where}: no captions in its JSON ({error})") from None
        media = data[place.media : place.media_end]
        return RawSample(
            place.key,
            media,
            place.extension,
            captions,
            place.width,
            place.height,
            place.frames,
            place.duration,
        )

    def _is_dropped(self, shard: int, row: int, key: str) -> bool:
        if self._dropped is None:
            with self._lock:
                if self._dropped is None:
                    self._dropped = Dropped(self.dataset, self.manifest)
        return self._dropped.holds(shard, row, key)

    def _where(self, record: ShardRecord, key: str) -> str:
        return f"{self.dataset.url_of(record.tar)}, key {key}"

    def _index(self, shard: int) -> _Index:
        with self._lock:
            if held := self._indices.get(shard):
                self._indices.move_to_end(shard)
                return held
        index = self._remember_failure("index", shard, lambda: self._load_index(self.manifest.shards[shard]))
        with self._lock:
            self._indices[shard] = index
            while len(self._indices) > 1 and sum(each.size for each in self._indices.values()) > _INDEX_BYTES:
                self._indices.popitem(last=False)
        return index

    def _load_index(self, record: ShardRecord) -> _Index:
        url = self.dataset.url_of(record.index)
        try:
            data = self._cached_index(record) or self.dataset.read_bytes(record.index)
            if hashlib.sha256(data).hexdigest() != record.index_sha256:
                data = self.dataset.read_bytes(record.index)  # a fault on the way must not condemn a shard
        except FileNotFoundError:
            raise BadData("missing-index", f"{url} does not exist, but the manifest names it") from None
        found = hashlib.sha256(data).hexdigest()
        if found != record.index_sha256:
            detail = (
                f"{url} was changed or damaged: sha256 {found}, but {record.index_sha256} in the manifest"
            )
            raise BadData("index-mismatch", detail)
        try:
            index = _Index(read_index(data))
        except ValueError as error:
            raise BadData("index-mismatch", f"{url}: {error}") from None
        if index.rows != record.samples:
            raise BadData("index-mismatch", f"{url} has {index.rows} rows, the manifest {record.samples}")
        return index

    def _cached_index(self, record: ShardRecord) -> bytes | None:
        """The index as ``sharding.prefetch`` has put it into the cache, if it has."""
        if self._is_local or self.cache is None:
            return None
        number = self.cache.lease(record.index_sha256, record.index_bytes)
        if number is None:
            return None
        with open(number, "rb") as file:
            return file.read()

    def _read_range(self, place: _Place) -> tuple[bytes, bool]:
        """The bytes of a sample, and whether they came from the cache."""
        shard, length = place.shard, place.end - place.begin
        record = self.manifest.shards[shard]
        try:
            descriptor = self._local_file(shard, record)
            if descriptor is not None:
                data = os.pread(descriptor.number, length, place.begin)
            else:
                data = self.dataset.read_bytes(record.tar, place.begin, length)
                if len(data) == length and not _is_right(place, data):
                    # Once more: a fault on the way must not condemn a sample.
                    data = self.dataset.read_bytes(record.tar, place.begin, length)
        except FileNotFoundError:
            where = self._where(record, place.key)
            raise BadData("missing-shard", f"{where}: the shard does not exist") from None
        if len(data) != length:
            short = f"the shard ends before byte {place.end} of the {record.bytes} in the manifest"
            raise BadData("truncated-shard", f"{self._where(record, place.key)}: {short}")
        return data, descriptor is not None and not self._is_local

    def _local_file(self, shard: int, record: ShardRecord) -> _Descriptor | None:
        """The shard as an open file of this machine, if it is one or the cache can have it."""
        if not self._is_local and self.cache is None:
            return None
        with self._lock:
            if held := self._files.get(shard):
                self._files.move_to_end(shard)
                return held
        try:
            if path := self.dataset.local_path(record.tar):
                number: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                number = self._open_cached(shard, record)
        except BadData:
            return None  # said when it was found; samples that are whole can still be read one by one
        if number is None:
            return None
        descriptor = _Descriptor(number)
        with self._lock:
            self._files[shard] = descriptor
            while len(self._files) > (_OPEN_SHARDS if self._is_local else _OPEN_LEASES):
                self._files.popitem(last=False)
        return descriptor

    def _open_cached(self, shard: int, record: ShardRecord) -> int | None:
        assert self.cache is not None
        number = self.cache.lease(record.sha256, record.bytes)
        if number is not None or not self.fetches:
            return number
        return self._remember_failure("cache", shard, lambda: self._fetch(record))

    def _fetch(self, record: ShardRecord) -> int:
        """A lease of a shard that has just been fetched. BadData, too, where the cache cannot take it."""
        assert self.cache is not None
        try:
            number = self.cache.open(self.dataset, record.tar, size=record.bytes, sha256=record.sha256)
            if number is None:
                raise BadData("no-room", f"{self.dataset.url_of(record.tar)}: all of the cache is in use")
        except BadData as error:
            _log.warning("shard not cached, its samples are read one by one: %s", error)
            raise
        except FileNotFoundError as error:  # what reads its samples says so for each of them
            raise BadData("missing-shard", str(error)) from None
        except OSError as error:
            if error.errno not in _DISK_TROUBLE:
                raise
            _log.warning("shard not cached, its samples are read one by one: %s", error)
            raise BadData("cache-disk", str(error)) from None
        return number

    def _remember_failure(self, kind: str, shard: int, call: Callable[[], _T]) -> _T:
        """``call()``; its BadData is raised again for a while without asking, as a shard has thousands of
        samples.
        """
        failed = self._failed.get((kind, shard))
        if failed is not None and time.monotonic() < failed.until:
            raise BadData(failed.cause, failed.detail)
        try:
            return call()
        except BadData as error:
            self._failed[kind, shard] = _Failed(error.cause, error.detail, time.monotonic() + _FAILED_FOR_S)
            raise


def _is_right(place: _Place, data: bytes) -> bool:
    """Whether the bytes of a place are all there, and each member's those that were written."""
    view = memoryview(data)  # a slice of it is no copy
    return (
        len(data) == place.end - place.begin
        and xxh3_64_intdigest(view[place.media : place.media_end]) == place.media_xxh3
        and xxh3_64_intdigest(view[place.json : place.json_end]) == place.json_xxh3
        and xxh3_64_intdigest(view[place.text : place.text_end]) == place.text_xxh3
    )


def _merged(ranges: Sequence[tuple[int, _Place]]) -> list[list[tuple[int, _Place]]]:
    """The ranges in groups of one request each, of neighbours in a shard in the order in which they lie there."""
    shards: defaultdict[int, list[tuple[int, _Place]]] = defaultdict(list)
    for number, place in ranges:
        shards[place.shard].append((number, place))
    groups: list[list[tuple[int, _Place]]] = []
    for members in shards.values():
        members.sort(key=lambda member: (member[1].begin, member[1].end))
        group = [members[0]]
        for member in members[1:]:
            is_near = member[1].begin - group[-1][1].end <= _GAP
            if is_near and member[1].end - group[0][1].begin <= _MOST_MERGED:
                group.append(member)
            else:
                groups.append(group)
                group = [member]
        groups.append(group)
    return groups
