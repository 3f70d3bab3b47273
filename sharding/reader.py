"""Reading samples of a dataset by (shard, row): what stands in the slots that ``sharding.order`` gives.

A sample is one range read, since the members of a key are contiguous in the tar: from the file itself where
    the
dataset is on this machine, from a cached copy of the shard where there is a cache, else from the object
storage. Whatever is wrong with a sample or a shard is ``BadData`` with its cause, so that the caller can keep
the slot as an empty one and count it; a shard that fails costs its own samples only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

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
    "crc32", "width", "height", "frames", "duration",
]  # fmt: skip
_INDEX_BYTES = 128 << 20  # of indices held by a reader: some hundred shards of 10,000 samples
_OPEN_SHARDS = 64
_FAILED_FOR_S = 60.0  # how long a shard found bad is not asked for again


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
    """An open file that closes when nobody holds it any more: a thread may still read one that left the
    table.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _Index:
    """What reading needs of a shard's index, in columns; ``size`` in bytes of memory."""

    def __init__(self, table: pa.Table) -> None:
        strings = table.select(["key", "extension"]).combine_chunks()
        self.rows = len(table)
        self._keys, self._extensions = (column.combine_chunks() for column in strings.columns)
        self._numbers = {name: table[name].to_numpy() for name in _NUMBERS}
        self.size = strings.nbytes + sum(column.nbytes for column in self._numbers.values())

    def row(self, row: int) -> dict[str, Any]:
        fields = {name: column[row].item() for name, column in self._numbers.items()}
        return {"key": self._keys[row].as_py(), "extension": self._extensions[row].as_py(), **fields}


class _Failed(NamedTuple):
    cause: str
    detail: str
    until: float


class ShardReader:
    """Samples of a dataset, by shard and row. Picklable; may be used by many threads and, after a fork,
    processes.

    Memory is bounded: indices of recently used shards up to 128 MiB, and the sample at hand.

    Args:
        dataset: the folder of the dataset.
        manifest: of this dataset (``sharding.manifest.load_manifest``); every file is checked against it.
        cache: of whole shards, for datasets that are not on this machine; None reads each sample by range.
    """

    def __init__(self, dataset: Storage, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self.dataset = dataset
        self.manifest = manifest
        self.cache = cache
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._indices: OrderedDict[int, _Index] = OrderedDict()
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._failed: dict[tuple[str, int], _Failed] = {}
        self._is_local = self.dataset.local_path("") is not None
        self._dropped: Dropped | None = None  # loaded with the first sample

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "manifest": self.manifest, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def shard_samples(self) -> list[int]:
        """Number of samples of each shard, as ``sharding.order.epoch_order`` takes it."""
        return [shard.samples for shard in self.manifest.shards]

    def read(self, shard: int, row: int) -> RawSample:
        """One sample, verified.

        Raises:
            BadData: the sample cannot be used. Causes: ``missing-shard``, ``truncated-shard``, ``crc-
                mismatch``, ``bad-json``, ``missing-index``, ``index-mismatch`` and ``dropped`` (by the
                manifest's overlay). The detail names the shard's url and the key.
            IndexError: there is no such shard or row.
            StorageFault, UserError: the storage cannot be reached, or refuses.
        """
        record = self.manifest.shards[shard]
        if not 0 <= row < record.samples or shard < 0:
            raise IndexError(f"no row {row} in shard {shard}, which has {record.samples} samples")
        fields = self._index(shard).row(row)
        key = fields["key"]
        if self._is_dropped(shard, row, key):
            raise BadData("dropped", f"{self._where(record, key)}: dropped by the manifest")
        members = [(fields[f"{name}_offset"], fields[f"{name}_size"]) for name in ("media", "text", "json")]
        begin = min(offset for offset, _ in members)
        end = max(offset + size for offset, size in members)

        def read() -> tuple[list[bytes], bool]:
            """The media, text and JSON members, and whether they came from the cache."""
            data, cached = self._read_range(shard, begin, end - begin, key)
            return [data[at - begin : at - begin + size] for at, size in members], cached

        (media, text, description), cached = read()
        if cached and self.cache is not None and zlib.crc32(media) != fields["crc32"]:
            # The copy was verified when it came: this disk has damaged it since.
            _log.warning("%s: the cached copy is damaged: discarded", self._where(record, key))
            self.cache.discard(record.sha256)
            with self._lock:
                self._files.pop(shard, None)
            (media, text, description), _ = read()
        if zlib.crc32(media) != fields["crc32"]:
            detail = f"{self._where(record, key)}: its bytes are not those that were written"
            raise BadData("crc-mismatch", detail)
        try:
            captions = stored_captions(description, text, record.caption_field)
        except ValueError as error:
            raise BadData(
                "bad-json", f"{self._where(record, key)}: no captions in its JSON ({error})"
            ) from None
        return RawSample(
            key=key,
            media=media,
            extension=fields["extension"],
            captions=captions,
            width=fields["width"],
            height=fields["height"],
            frames=fields["frames"],
            duration=fields["duration"],
        )

    def _is_dropped(self, shard: int, row: int, key: str) -> bool:
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
            data = self.dataset.read_bytes(record.index)
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

    def _read_range(self, shard: int, offset: int, length: int, key: str) -> tuple[bytes, bool]:
        """The bytes, and whether they came from the cache."""
        record = self.manifest.shards[shard]
        try:
            descriptor = self._local_file(shard, record)
            if descriptor is not None:
                data = os.pread(descriptor.number, length, offset)
            else:
                data = self.dataset.read_bytes(record.tar, offset, length)
        except FileNotFoundError:
            raise BadData("missing-shard", f"{self._where(record, key)}: the shard does not exist") from None
        if len(data) != length:
            short = f"the shard ends before byte {offset + length} of the {record.bytes} in the manifest"
            raise BadData("truncated-shard", f"{self._where(record, key)}: {short}")
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
                number = self._remember_failure("cache", shard, lambda: self._open_cached(record))
        except BadData:
            return None  # said when it was found; samples that are whole can still be read one by one
        if number is None:
            return None
        descriptor = _Descriptor(number)
        with self._lock:
            self._files[shard] = descriptor
            while len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        return descriptor

    def _open_cached(self, record: ShardRecord) -> int | None:
        assert self.cache is not None
        try:
            return self.cache.open(self.dataset, record.tar, size=record.bytes, sha256=record.sha256)
        except BadData as error:
            _log.warning("shard not cached, its samples are read one by one: %s", error)
            raise

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
