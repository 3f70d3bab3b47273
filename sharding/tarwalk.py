"""Walking through a tar once, forwards, from any storage, and taking nothing on trust.

``tarfile`` parses the headers (extended ones too). What it passes over in silence is an error here: a tar that
ends before its end-of-archive blocks, a header whose checksum is wrong, bytes that follow the end.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sharding.errors import BadData

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class Member:
    """A regular file of the tar. Offsets in bytes: of its (first) header, and of its data."""

    name: str
    header_offset: int
    offset: int
    size: int


class TarWalk:
    """The members of a tar in order, each with its bytes; holds one member at a time.

    Args:
        file: read from its beginning, forwards only.
        url: of the tar, for errors.

    After ``members`` has ended, ``sha256`` and ``size`` are those of the whole file.
    """

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file = _Forward(file)
        self._url = url

    @property
    def sha256(self) -> str:
        """sha256 (hex) of what was read."""
        return self._file.digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes read."""
        return self._file.position

    def members(self) -> Iterator[tuple[Member, bytes]]:
        """Each regular file with its bytes (folders and links are passed over).

        Raises:
            BadData: ``compressed-tar``, ``truncated-shard`` or ``bad-tar``; the detail names the url and the offset.
        """
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                    if info.isreg() and not info.issparse():
                        member = Member(info.name, info.offset, info.offset_data, info.size)
                        yield member, self._read(member)
                self._end(tar.offset)
        except tarfile.TarError as error:
            raise self._fault(str(error)) from None

    def drain(self) -> None:
        """Read on to the end of the file, for its sha256 and size, whatever is in it."""
        while self._file.read(_CHUNK):
            pass

    def _read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise BadData(
                "truncated-shard",
                f"{self._url}: ends at byte {self._file.position}, inside {member.name}, which has "
                f"{member.size} bytes from byte {member.offset}",
            )
        return data

    def _end(self, offset: int) -> None:
        """Check what stopped tarfile at ``offset``: two blocks of zeros and nothing but zeros after them."""
        block, zeros = self._file.last, 0
        if self._file.position - len(block) != offset:
            raise self._fault("a header that cannot be read")
        while block:
            if block.strip(b"\0"):
                raise self._fault("bytes after the end of the archive" if zeros else "a damaged header")
            zeros += len(block)
            block = self._file.read(_CHUNK)
        if zeros < 2 * BLOCK:
            raise BadData(
                "truncated-shard",
                f"{self._url}: ends at byte {self._file.position} without the end-of-archive blocks of a tar",
            )

    def _fault(self, what: str) -> BadData:
        start = self._file.position - len(self._file.last)
        for magic, name in _COMPRESSED.items():
            if self._file.first.startswith(magic):
                return BadData("compressed-tar", f"{self._url}: is {name}-compressed; shards are plain tars")
        if len(self._file.last) < BLOCK or "end of data" in what:
            return BadData(
                "truncated-shard", f"{self._url}: ends at byte {self._file.position}, inside the archive"
            )
        return BadData("bad-tar", f"{self._url}: {what} at byte {start}")


class _Forward(io.RawIOBase):
    """A file that tarfile takes for seekable but that only goes on; every byte passes through the digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0
        self.first = self.last = b""  # what the first and the latest read gave

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        data = self._file.read(size)
        self.digest.update(data)
        self.position += len(data)
        self.first, self.last = self.first or data[:8], data
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        assert offset >= self.position, "a tar is walked forwards"
        while self.position < offset and self.read(min(_CHUNK, offset - self.position)):
            pass
        return self.position
