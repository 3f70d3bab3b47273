"""Writing shards: plain WebDataset tars whose bytes depend on their samples alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from xxhash import xxh3_64_intdigest

from sharding.errors import BadData, StorageFault
from sharding.filters.words import count_words
from sharding.index import IndexRow, write_index
from sharding.manifest import ShardRecord
from sharding.media.info import Encoded
from sharding.storage import Storage
from sharding.storage_file import writing

_OWNER = "glscl"


_LARGEST = 8**11 - 1  # bytes that a header can tell in digits


def member_info(name: str, size: int) -> tarfile.TarInfo:
    """The header of a member of ``size`` bytes; of equal arguments equal bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    member.uname = member.gname = _OWNER
    return member


def member_header(name: str, size: int) -> bytes:
    """The bytes of ``member_info``, which ``tarfile`` takes twenty times as long to make of a usual one."""
    if not name.isascii() or len(name) > 100 or size > _LARGEST:
        return member_info(name, size).tobuf(tarfile.USTAR_FORMAT, "utf-8")
    encoded, digits = name.encode(), b"%011o" % size
    header = bytearray(_BLANK_HEADER)
    header[: len(encoded)] = encoded
    header[124:135] = digits
    header[148:154] = b"%06o" % (_BLANK_SUM + sum(encoded) + sum(digits))
    return bytes(header)


def _blank_header() -> tuple[bytes, int]:
    """The header of a member without a name and a size, and the sum of its bytes with a blank check sum."""
    header = bytearray(member_info("", 0).tobuf(tarfile.USTAR_FORMAT, "utf-8"))
    header[124:135] = bytes(11)
    return bytes(header), sum(header[:148]) + 8 * ord(" ") + sum(header[156:])


_BLANK_HEADER, _BLANK_SUM = _blank_header()


class ShardWriter:
    """Writes one tar on the local disk and keeps the rows of its index.

    The members of a key lie together, in the order of their names::

        KEY.json  captions, source, width, height, frames, duration
        KEY.txt   the first caption
        KEY.webp  the media (jpg, png and mp4 sort elsewhere)

    Owner, mode and times are fixed, so that equal samples make equal bytes. Keys must be added in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[IndexRow] = []
        self._file: BinaryIO = path.open("wb")
        self._size = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.path):
                    # Two empty blocks end a tar, which is a whole number of records.
                    self._write(bytes(2 * tarfile.BLOCKSIZE))
                    self._write(bytes(-self._size % tarfile.RECORDSIZE))
                    self._file.close()
        finally:
            # What the disk did not take is tried again here and fails again: that was said already.
            with contextlib.suppress(OSError):
                self._file.close()

    def add(
        self,
        key: str,
        media: Encoded,
        captions: list[str],
        sha256: str,
        source: str,
        score: float | None = None,
    ) -> None:
        """One sample. ``sha256`` and ``source`` are those of the file it was made of, ``score`` its image-text
        score.
        """
        info = media.info
        description = {
            "captions": captions,
            "source": source,
            "width": info.width,
            "height": info.height,
            "frames": info.frames,
            "duration": round(info.duration, 6),
        }
        members = {
            "json": json.dumps(description, ensure_ascii=False, sort_keys=True).encode(),
            "txt": captions[0].encode(),
            media.extension: media.data,
        }
        offsets = self._add(key, members)
        row = IndexRow(
            key=key,
            extension=media.extension,
            media_offset=offsets[media.extension],
            media_size=len(media.data),
            text_offset=offsets["txt"],
            text_size=len(members["txt"]),
            json_offset=offsets["json"],
            json_size=len(members["json"]),
            xxh3=xxh3_64_intdigest(media.data),
            text_xxh3=xxh3_64_intdigest(members["txt"]),
            json_xxh3=xxh3_64_intdigest(members["json"]),
            width=info.width,
            height=info.height,
            frames=info.frames,
            duration=info.duration,
            caption_length=len(captions[0]),
            captions=len(captions),
            sha256=sha256,
            source=source,
            caption_words=count_words(captions[0]),
            phash=media.fingerprint.phash if media.fingerprint else None,
            pixels=media.fingerprint.pixels if media.fingerprint else None,
            score=score,
        )
        self.rows.append(row)

    def add_members(self, row: IndexRow, members: dict[str, bytes]) -> None:
        """One sample of given members (``json``, ``txt`` and the media's extension); offsets are set here."""
        offsets = self._add(row.key, members)
        self.rows.append(
            replace(
                row,
                media_offset=offsets[row.extension],
                text_offset=offsets["txt"],
                json_offset=offsets["json"],
            )
        )

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    @property
    def sha256(self) -> str:
        """Of what was written so far; of the whole tar when the writer is closed."""
        return self._digest.hexdigest()

    def _add(self, key: str, members: dict[str, bytes]) -> dict[str, int]:
        """Where the data of each member begin."""
        if self.rows and key <= self.rows[-1].key:
            raise ValueError(f"key {key} after {self.rows[-1].key}: keys must be added in order")
        offsets, blocks, end = {}, [], self._size
        for name in sorted(members):
            data = members[name]
            header = member_header(f"{key}.{name}", len(data))
            offsets[name] = end + len(header)
            blocks += [header, data, bytes(-len(data) % tarfile.BLOCKSIZE)]
            end = offsets[name] + len(data) + len(blocks[-1])
        with writing(self.path):
            self._write(b"".join(blocks))
        return offsets

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)


def copy_without(source: BinaryIO, rows: Iterable[IndexRow], dropped: set[int], writer: ShardWriter) -> None:
    """Copy a shard's samples to ``writer``, but for the rows (numbers from 0) in ``dropped``."""
    for number, row in enumerate(rows):
        if number in dropped:
            continue
        places = {
            "json": (row.json_offset, row.json_size),
            "txt": (row.text_offset, row.text_size),
            row.extension: (row.media_offset, row.media_size),
        }
        members = {}
        for name, (offset, size) in places.items():
            source.seek(offset)
            members[name] = source.read(size)
        writer.add_members(row, members)


def publish(writer: ShardWriter, storage: Storage, name: str) -> ShardRecord:
    """Upload a closed writer's tar and its index, and verify both.

    The shard is not there before the caller writes its commit record.

    Raises:
        StorageFault: what arrived is not what was written.
    """
    index = write_index(writer.rows)
    record = ShardRecord(
        name=name.rpartition("/")[2],
        samples=len(writer.rows),
        bytes=writer.size,
        sha256=writer.sha256,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    if storage.upload(writer.path, f"{name}.tar") != (record.bytes, record.sha256):
        raise StorageFault(f"{storage.url_of(name)}: the shard arrived changed")
    send_index(index, storage, name)
    return record


def send_index(index: bytes, storage: Storage, name: str) -> None:
    """Write a shard's index as ``name``, and verify it.

    Raises:
        StorageFault: what arrived is not what was written.
    """
    storage.write_bytes(f"{name}.parquet", index)
    try:
        arrived = storage.read_bytes(f"{name}.parquet")
    except BadData as error:
        raise StorageFault(str(error)) from None
    if arrived != index:
        raise StorageFault(f"{storage.url_of(name)}: the index arrived changed")
