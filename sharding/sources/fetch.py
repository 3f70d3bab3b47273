"""Reading the media and sidecars that a source lists: bounded bytes and time, several at once, in order.

Where media lie decides who reads them: ``Downloader`` (http), ``MediaRows`` (Hugging Face), the storage (files, and
members of tars by range). ``SceneMedia`` makes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sharding.errors import BadData
from sharding.names import escape_name
from sharding.sources.addresses import Address, BelowBase, LocalFile, S3Object, WebUrl, shown
from sharding.sources.base import Input, Member, reading
from sharding.sources.budget import ByteBudget, Lease
from sharding.sources.config import (
    FetchConfig,
    HuggingFaceSource,
    ScenesSource,
    SourceConfig,
    TableSource,
    WebDatasetSource,
)
from sharding.sources.huggingface import MediaRows
from sharding.sources.tars import member_captions
from sharding.sources.web import Downloader
from sharding.storage import ExactPath, Storage

if TYPE_CHECKING:
    from sharding.sources.scenes import SceneMedia

__all__ = ["MAX_SIDECAR_BYTES", "Fetched", "Fetcher"]

MAX_SIDECAR_BYTES = 1 << 20
# Of all text members of a key, each with the header that it has in the tar.
_MAX_TEXTS_BYTES = 4 * MAX_SIDECAR_BYTES
_HEADER = 512
_BLOCK = 1 << 20
# Members of a sample this close to each other are read at once: a request costs more than these bytes.
_GAP = 64 << 10
_GAPS = 1 << 20  # in one request, in all
# Results waiting for a slow one before them, in numbers of threads; their bytes are bounded by the budget.
_AHEAD = 4


@dataclass(frozen=True)
class Fetched:
    """An input with its bytes, or with the fault that kept them away.

    Captions that were read from members of a container are those of ``input``.
    """

    input: Input
    media: bytes = b""
    sidecar: bytes | None = None
    fault: BadData | None = None


class Fetcher:
    """Reads inputs of one source.

    Args:
        storage: lends its S3 options.
        base: what ``BelowBase`` addresses are below.
        source: as configured; says how rows are opened and what captions in containers mean.
        max_bytes: larger media are bad data.
    """

    def __init__(
        self, storage: Storage, base: str, source: SourceConfig, config: FetchConfig, max_bytes: int
    ) -> None:
        self._config, self._max_bytes = config, max_bytes
        self._scenes = _scene_media(source, storage)
        self._rows = MediaRows(source) if isinstance(source, HuggingFaceSource) else None
        # A dataset of the hub has no folder, and its inputs name rows or urls only.
        self._base = storage if self._rows is not None else storage.resolve(base)
        self._may_read_here = _points_here(source, self._base)
        self._caption_field = source.caption_field if isinstance(source, WebDatasetSource) else None
        self._roots: dict[str, Storage] = {}
        self._web = Downloader(config, max_bytes)

    def fetch_all(self, inputs: Iterable[Input]) -> Iterator[Fetched]:
        """The inputs in their order, once. ``threads`` are read at once, and of those that are read and not
        yet used at most ``in_flight_mb`` are in memory, besides the one that is next.
        """
        budget = ByteBudget(int(self._config.in_flight_mb * 2**20))
        pool = ThreadPoolExecutor(self._config.threads, thread_name_prefix="fetch")
        waiting: deque[tuple[Future[Fetched], Lease]] = deque()
        try:
            for order, item in enumerate(inputs):
                lease = budget.lease(order)
                waiting.append((pool.submit(self.fetch, item, lease), lease))
                if len(waiting) >= _AHEAD * self._config.threads:
                    yield from _first(waiting)
            while waiting:
                yield from _first(waiting)
        finally:
            for future, _ in waiting:
                future.cancel()
            budget.cancel()
            self._web.close()
            pool.shutdown()

    def fetch(self, item: Input, lease: Lease | None = None) -> Fetched:
        """One input. Faults of the input are returned; faults of the storage are raised.

        Args:
            lease: holds the bytes of the media while they are in memory.

        Raises:
            Cancelled: nobody waits for it any more.
        """
        lease = lease or ByteBudget(self._max_bytes).lease(0)
        try:
            if item.problem is not None:
                raise BadData(item.problem, item.reason or item.address)
            return self._fetch(item, lease)
        except BadData as fault:
            lease.reserve(0)
            return Fetched(item, fault=fault)

    def _fetch(self, item: Input, lease: Lease) -> Fetched:
        if self._scenes is not None:
            made, media = self._scenes.read(item)
            lease.reserve(len(media))
            return Fetched(made, media=media)
        if item.size is not None:
            if item.size > self._max_bytes:
                raise BadData("too-many-bytes", f"{item.size}, more than {self._max_bytes}")
            lease.reserve(item.size)
        if item.row is not None:
            assert self._rows is not None, "only Hugging Face sources list rows"
            media = self._rows.read(item.row, self._max_bytes)
            lease.reserve(len(media))
            return Fetched(item, media=media)
        assert item.media is not None, "a listing gives media, or says why there are none"
        if item.offset is not None:
            return self._members(item, item.media, lease)
        sidecar = None if item.sidecar is None else self._sidecar(item.sidecar)
        if isinstance(item.media, WebUrl):
            return Fetched(item, media=self._web.download(item.media.url, lease), sidecar=sidecar)
        return Fetched(item, media=self._file(item.media, item.size, lease), sidecar=sidecar)

    def _sidecar(self, address: BelowBase) -> bytes:
        name = shown(address)
        try:
            with reading(name):
                data = self._base.read_bytes(ExactPath(address.path), 0, MAX_SIDECAR_BYTES + 1)
        except FileNotFoundError:
            raise BadData("caption-missing", f"no {name} beside the media file") from None
        if len(data) > MAX_SIDECAR_BYTES:
            raise BadData("too-many-bytes", f"{name}: more than {MAX_SIDECAR_BYTES}")
        return data

    def _file(self, address: BelowBase | LocalFile | S3Object, size: int | None, lease: Lease) -> bytes:
        storage, path = self._located(address)
        name = shown(address)
        try:
            with reading(name):
                if size is not None:
                    # One byte more would show that the file has grown since it was listed.
                    data = storage.read_bytes(path, 0, size + 1)
                else:
                    data = self._unsized(storage, path, lease)
        except FileNotFoundError:
            raise BadData("missing-file", name) from None
        if size is not None and len(data) != size:
            raise BadData("size-mismatch", f"{name} had {size} bytes when it was listed")
        return data

    def _unsized(self, storage: Storage, path: ExactPath, lease: Lease) -> bytes:
        """A file of unknown size: most end in the first block, so that they cost one request."""
        lease.reserve(min(_BLOCK, self._max_bytes))
        data = storage.read_bytes(path, 0, min(_BLOCK, self._max_bytes + 1))
        if len(data) == _BLOCK:
            size = storage.size(path)
            if size > self._max_bytes:
                raise BadData("too-many-bytes", f"{size}, more than {self._max_bytes}")
            lease.reserve(max(size, _BLOCK))
            if size > _BLOCK:
                data += storage.read_bytes(path, _BLOCK, size - _BLOCK)
            if len(data) != size:
                raise BadData("size-mismatch", f"{escape_name(path)} changed its size while it was read")
        if len(data) > self._max_bytes:
            raise BadData("too-many-bytes", f"more than {self._max_bytes}")
        lease.reserve(len(data))
        return data

    def _members(self, item: Input, tar: Address, lease: Lease) -> Fetched:
        assert not isinstance(tar, WebUrl), "tars are read from storages"
        assert item.offset is not None
        assert item.size is not None
        storage, path = self._located(tar)
        for text in item.texts:
            if text["size"] > MAX_SIDECAR_BYTES:
                raise BadData("too-many-bytes", f"{text['name']}: more than {MAX_SIDECAR_BYTES}")
        size = sum(_HEADER + text["size"] for text in item.texts)
        if size > _MAX_TEXTS_BYTES:
            raise BadData(
                "too-many-bytes",
                f"{item.address}: {len(item.texts)} members of text have {size} bytes with their headers, more than "
                f"{_MAX_TEXTS_BYTES}",
            )
        lease.reserve(item.size + size)
        if not item.texts:
            raise BadData("caption-missing", f"{item.address} has no text or JSON member")
        media = Member(name=item.address, offset=item.offset, size=item.size)
        data = self._ranges(storage, path, [media, *item.texts])
        captions: list[str] = []
        not_text = 0
        for text, read in zip(item.texts, data[1:], strict=True):
            texts, others = member_captions(text["name"], read, self._caption_field)
            captions += texts
            not_text += others
        return Fetched(replace(item, captions=captions, not_text=not_text), media=data[0])

    def _ranges(self, storage: Storage, path: ExactPath, members: list[Member]) -> list[bytes]:
        """The data of members of one tar, with one request for those that lie together."""
        found: dict[int, bytes] = {}
        group: list[Member] = []
        gaps = 0
        for member in sorted(members, key=lambda member: member["offset"]):
            gap = member["offset"] - group[-1]["offset"] - group[-1]["size"] if group else 0
            gaps += gap
            if gap > _GAP or gaps > _GAPS:
                found |= _read_group(storage, path, group)
                group, gaps = [], 0
            group.append(member)
        found |= _read_group(storage, path, group)
        return [found[member["offset"]] for member in members]

    def _located(self, address: BelowBase | LocalFile | S3Object) -> tuple[Storage, ExactPath]:
        """The storage and the path in it, by the type of the address alone.

        Raises:
            BadData: ``bad-address``: a file of this machine, to which the job file does not point. A listing makes no
                such address; one that was stored may have been written by others.
        """
        match address:
            case BelowBase(path):
                return self._base, ExactPath(path)
            case LocalFile(path):
                if not self._may_read_here:
                    detail = (
                        f"{shown(address)} is a file of this machine, which the job file does not point to"
                    )
                    raise BadData("bad-address", detail)
                return self._root("file:///"), ExactPath(path.lstrip("/"))
            case S3Object(bucket, key):
                return self._root(f"s3://{bucket}"), ExactPath(key)

    def _root(self, url: str) -> Storage:
        # One Storage a bucket, so that its connections are shared.
        if url not in self._roots:
            self._roots[url] = self._base.resolve(url)
        return self._roots[url]


def _points_here(source: SourceConfig, base: Storage) -> bool:
    """Whether a listing of the source may name files of this machine that are not below its base."""
    match source:
        case TableSource():
            return base.local_path("") is not None
        case WebDatasetSource():
            schemes = (path.partition("://") for path in source.paths)
            return any(not separator or scheme.lower() == "file" for scheme, separator, _ in schemes)
        case _:
            return False


def _scene_media(source: SourceConfig, storage: Storage) -> SceneMedia | None:
    if not isinstance(source, ScenesSource):
        return None
    from sharding.sources.scenes import SceneMedia  # loads PIL and all that composes scenes

    return SceneMedia(source, storage)


def _first(waiting: deque[tuple[Future[Fetched], Lease]]) -> Iterator[Fetched]:
    """The first result; its bytes count as held until the next one is asked for."""
    future, lease = waiting.popleft()
    yield future.result()
    lease.release()


def _read_group(storage: Storage, path: ExactPath, group: list[Member]) -> dict[int, bytes]:
    name = escape_name(path)
    start = group[0]["offset"]
    end = max(member["offset"] + member["size"] for member in group)
    try:
        with reading(name):
            data = storage.read_bytes(path, start, end - start)
    except FileNotFoundError:
        raise BadData("missing-file", name) from None
    if len(data) < end - start:
        raise BadData(
            "size-mismatch", f"{name} ended at byte {start + len(data)}: it had more when it was listed"
        )
    if len(group) == 1:
        return {start: data}
    return {
        member["offset"]: data[member["offset"] - start : member["offset"] - start + member["size"]]
        for member in group
    }
