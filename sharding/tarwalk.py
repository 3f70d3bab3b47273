"""Walking through a tar once, forwards, from any storage, and taking nothing on trust.

``tarfile`` parses the headers (extended ones too). What it passes over in silence is an error here: a tar that
ends before its end-of-archive blocks, a header whose checksum is wrong, bytes that follow the end. A header may claim
any size: nothing is kept in memory for what is not there.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sharding.errors import BadData, UserError
from sharding.names import escape_name

BLOCK = tarfile.BLOCKSIZE
#: Bytes of an extended header, of which tarfile reads all at once. Real ones have a few hundred.
LARGEST_HEADER = 16 << 20
#: What tarfile raises of headers that are none: of wrong numbers, of bytes that are no text, of a thousand extended
#: headers in a row.
BAD_HEADER = (tarfile.TarError, ValueError, OverflowError, RecursionError)
_CHUNK = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class Member:
    """A member that is no folder. Offsets in bytes: of its (first) header, and of its data.

    Links, devices and sparse files are not ``regular``: they have no data of their own, or not as it lies here.
    """

    name: str
    header_offset: int
    offset: int
    size: int
    regular: bool = True


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

    def members(self, largest: int | None = None) -> Iterator[tuple[Member, bytes]]:
        """Each member with its bytes: none of what is not regular, or has more than ``largest`` bytes.

        Raises:
            BadData: ``compressed-tar``, ``truncated-shard`` or ``bad-tar``; the detail names the url and the offset.
        """
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                    if info.size < 0:
                        raise tarfile.ReadError("a header with a negative size")
                    if not info.isdir():
                        regular = info.isreg() and not info.issparse()
                        member = Member(info.name, info.offset, info.offset_data, info.size, regular)
                        fits = regular and (largest is None or info.size <= largest)
                        yield member, self._read(member) if fits else b""
                self._end(tar.offset)
        except UserError:  # of the storage
            raise
        except BAD_HEADER as error:
            raise self._fault(str(error)) from None

    def drain(self) -> None:
        """Read on to the end of the file, for its sha256 and size, whatever is in it."""
        while self._file.read(_CHUNK):
            pass

    def _read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        data = bytearray()
        while len(data) < member.size and (chunk := self._file.read(min(_CHUNK, member.size - len(data)))):
            data += chunk
        if len(data) != member.size:
            raise BadData(
                "truncated-shard",
                f"{self._url}: ends at byte {self._file.position}, inside {escape_name(member.name)}, which has "
                f"{member.size} bytes from byte {member.offset}",
            )
        return bytes(data)

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
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header that claims {size} bytes")
        data = self._file.read(size)
        self.digest.update(data)
        self.position += len(data)
        self.first, self.last = self.first or data[:8], data
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        if offset < self.position:
            raise tarfile.ReadError("a header that leads backwards")
        while self.position < offset and self.read(min(_CHUNK, offset - self.position)):
            pass
        return self.position
