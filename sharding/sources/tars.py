"""Samples in WebDataset tars: which members make a sample, and where in the tar they lie.

::

    000000.tar:  dog.jpg  dog.txt  cat.jpg  dog.json  cat.0.txt ...
    -> Input(000000.tar/dog.jpg, offset, size, texts=[dog.txt, dog.json]), Input(000000.tar/cat.jpg, ...)

``sharding.tarnames`` says which members make a sample, here and in ``shards index``.

Listing walks the headers; members are read in the tasks, by range. The headers of one tar at a time are in
memory, so that members of a key need not be neighbours. Tars are read to their end-of-archive mark: one that
ends before it, wherever the cut is, is told from a whole one.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from braceexpand import braceexpand

from sharding.captions import caption_lines
from sharding.errors import UserError
from sharding.manifest import Modality
from sharding.names import Skipped, escape_name
from sharding.sources.addresses import Address, BelowBase, LocalFile, S3Object, shown
from sharding.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Hasher,
    Input,
    Member,
    UnreadableFile,
    described_captions,
    feed,
    folder_and_name,
    reading,
    texts_of,
    unreadable,
)
from sharding.sources.config import WebDatasetSource, split_pattern
from sharding.storage import ExactPath, Storage
from sharding.tarnames import clean_name, clips_of, count_aside, last_part, of_kind, split_name
from sharding.tarwalk import BAD_HEADER, LARGEST_HEADER

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# The headers of one tar are in memory.
MOST_MEMBERS = 1_000_000
_HEADER = 512
_SMALL, _LARGE = 64 << 10, 8 << 20


class Truncated(Exception):
    """A tar that ends before its end-of-archive mark, or is no tar from an offset on."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(offset, why)
        self.offset = offset
        self.why = why


class TarMember(NamedTuple):
    """What a tar holds: ``offset`` of its data. A link or sparse file is not ``regular``: it has no data here."""

    name: str
    offset: int
    size: int
    regular: bool


class WebDatasetListing:
    """The samples of tars, tar by tar, in the order in which their keys first appear."""

    def __init__(self, config: WebDatasetSource, modality: Modality, storage: Storage) -> None:
        self._config = config
        suffixes = IMAGE_SUFFIXES if modality == "image" else VIDEO_SUFFIXES
        self._modality = modality
        self._media_kinds = {suffix.removeprefix(".") for suffix in suffixes}
        self._tars = [_TarPattern(path, storage) for path in config.paths]
        self._root = self._tars[0].root
        self.skipped = Skipped()

    @property
    def base(self) -> str:
        return self._root.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Sizes of tars, and names and places of their members, identify the listing."""
        self.skipped.clear()
        found = False
        lost: list[UnreadableFile] = []
        for pattern in self._tars:
            for path in pattern.files(self.skipped):
                try:
                    for item in self._tar(pattern.root, path, hasher):
                        found = True
                        yield item
                except UnreadableFile as fault:
                    lost.append(fault)
                    place = shown(_place(pattern.root, path, pattern.root == self._root))
                    feed(hasher, place, fault.cause)
                    yield unreadable(place, fault)
        if lost and not found:
            raise UserError(f"none of the tars of {self._root.url} can be read: {lost[0].detail}")
        if not found:
            raise UserError(f"empty corpus: the tars of {self._root.url} hold no samples")

    def _tar(self, root: Storage, path: str, hasher: Hasher) -> Iterator[Input]:
        url = root.url_of(path)
        tar = _place(root, path, root == self._root)
        container = shown(tar) if root == self._root else url
        try:
            with reading(container):
                size = root.size(path)
        except FileNotFoundError:
            raise UserError(f"no such tar: {escape_name(url)}") from None
        feed(hasher, path, size)
        groups: dict[str, list[TarMember]] = {}
        last: str | None = None
        cut: Truncated | None = None
        try:
            for number, member in enumerate(_walked(root, path, size, container)):
                if number == MOST_MEMBERS:
                    raise UserError(f"{url} has more than {MOST_MEMBERS} members: cut it into smaller tars")
                name = split_name(member.name)
                if name is None:
                    count_aside(member.name, self.skipped)
                else:
                    last = name[0]
                    groups.setdefault(last, []).extend([member] if member.regular else [])
        except Truncated as error:
            if self._config.truncated == "error":
                raise UserError(
                    f"{url} is cut off or broken at byte {error.offset} of {size}: {error.why} "
                    "(source.truncated: count keeps what is before)"
                ) from None
            cut = error
        for key, members in groups.items():
            if cut is not None and key == last:
                continue  # the cut may have taken members of it
            item = self._input(tar, container, key, members)
            feed(hasher, item.address, item.offset, item.size, item.texts, item.problem)
            yield item
        if cut is not None:
            feed(hasher, "cut", cut.offset)
            yield Input(address=f"{container}: byte {cut.offset}", problem="truncated-tar")

    def _input(self, tar: Address, container: str, key: str, members: list[TarMember]) -> Input:
        address = f"{container}/{escape_name(key)}"
        names = [member.name for member in members]
        if len(set(names)) < len(names):
            return Input(address=address, problem="repeated-member")
        by_extension: dict[str, list[TarMember]] = {}
        for member in members:
            by_extension.setdefault(member.name[len(key) + 1 :].lower(), []).append(member)
        media = self._media(by_extension)
        if len(media) != 1:
            return Input(address=address, problem="several-media" if media else "media-missing")
        texts = sorted(self._texts(by_extension), key=lambda member: _natural(member.name))
        return Input(
            address=f"{container}/{escape_name(media[0].name)}",
            media=tar,
            offset=media[0].offset,
            size=media[0].size,
            texts=[Member(name=escape_name(text.name), offset=text.offset, size=text.size) for text in texts],
        )

    def _media(self, members: dict[str, list[TarMember]]) -> list[TarMember]:
        if self._config.media is None:
            extensions = of_kind(members, self._media_kinds)
            extensions = clips_of(extensions) if self._modality == "video" else extensions
        else:
            wanted = self._config.media
            found = ([one] if one in members else of_kind(members, {one}) for one in wanted)
            extensions = next(filter(None, found), [])
        return [member for extension in extensions for member in members[extension]]

    def _texts(self, members: dict[str, list[TarMember]]) -> list[TarMember]:
        texts = [extension for extension in members if last_part(extension) in self._config.text]
        described = of_kind((extension for extension in members if extension not in texts), {"json"})
        return [member for extension in (*texts, *described) for member in members[extension]]


class _TarPattern:
    """One entry of ``path``: a tar, the tars of a folder, or a brace pattern of tars."""

    def __init__(self, path: str, storage: Storage) -> None:
        self._pattern = ""
        if "{" in path:
            path, self._pattern = split_pattern(path)
        elif path.lower().endswith(".tar"):
            path, name = folder_and_name(path)
            self._pattern = braceless(name)
        self.root = storage.resolve(path)

    def files(self, skipped: Skipped) -> Iterator[str]:
        """Paths below ``root``, streamed; ``skipped`` counts the files of a folder that are no tars."""
        if self._pattern:
            try:
                yield from map(ExactPath, braceexpand(self._pattern))
            except ValueError as error:
                raise UserError(f"source.path {self._pattern!r}: {error}") from None
            return
        self.root.check(write=False)
        found = False
        for path, _ in skipped.visible(self.root.list(others=skipped.add_other)):
            if path.lower().endswith(".tar"):
                found = True
                yield path
            elif path.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
                raise UserError(
                    f"{self.root.url_of(path)} is compressed: members are read by range, unpack it"
                )
            else:
                skipped.add_file(path)
        if not found:
            raise UserError(f"no .tar files below {self.root.url}")


def braceless(name: str) -> str:
    """A file's name as a pattern that stands for it alone."""
    return re.sub(r"([\\{},])", r"\\\1", name)


def _walked(root: Storage, path: str, size: int, name: str) -> Iterator[TarMember]:
    with reading(name):
        yield from walk_tar(root, path, size)


def walk_tar(storage: Storage, path: str, size: int) -> Iterator[TarMember]:
    """The regular files of a tar, from its headers.

    Raises:
        Truncated: after the last whole member, when the tar does not end with its end-of-archive mark.
    """
    reader = _HeaderReader(storage, path, size)
    try:
        tar = tarfile.open(fileobj=reader, mode="r:")  # noqa: SIM115 - closed below
    except UserError:
        raise
    except BAD_HEADER as error:
        raise Truncated(0, str(error) if size else "the file is empty") from None
    with tar:
        while True:
            start = tar.offset
            try:
                member = tar.next()
            except UserError:  # of the storage
                raise
            except BAD_HEADER as error:
                raise Truncated(start, str(error)) from None
            if member is None:
                break
            # tarfile keeps all members; one that is never asked for again would fill the memory.
            tar.members = []  # type: ignore[attr-defined]
            if member.size < 0 or member.offset_data + member.size > size:
                raise Truncated(
                    member.offset,
                    f"{escape_name(member.name)} needs {member.offset_data + member.size} bytes",
                )
            if not member.isdir():
                regular = member.isreg() and not member.issparse()
                yield TarMember(clean_name(member.name), member.offset_data, member.size, regular)
        _check_end(reader, tar.offset, size)


def _check_end(reader: _HeaderReader, offset: int, size: int) -> None:
    """tarfile takes a broken header, and the end of the file, for the end of the archive."""
    reader.seek(offset)
    if offset + _HEADER > size:
        raise Truncated(offset, "the end-of-archive mark is missing")
    while offset < size:
        block = reader.read(min(_LARGE, size - offset))
        if not block or block.count(0) < len(block):
            raise Truncated(offset, "neither a member nor the end of the archive")
        offset += len(block)


class _HeaderReader(io.RawIOBase):
    """Reads of a few bytes here and there, forward. What one request asks for follows the members: of small
    ones many lie in it, and of large ones little is read that is not a header.
    """

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        self._storage, self._path, self._size = storage, path, size
        self._remote = storage.local_path(path) is None
        self._block, self._start = b"", 0
        self._position = 0
        self._headers = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        # tarfile asks for as much as a header claims.
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header that claims {size} bytes")
        return super().read(size) or b""

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._position))
        if length == 0:
            return 0
        self._headers += length == _HEADER
        begin = self._position - self._start
        if not 0 <= begin <= len(self._block) - length:
            self._start, begin = self._position, 0
            wanted = min(max(length, self._window()), self._size - self._position)
            self._block = self._storage.read_bytes(self._path, self._position, wanted)
            if len(self._block) < length:
                raise Truncated(self._position, "the file became shorter while it was read")
        view[:length] = self._block[begin : begin + length]
        self._position += length
        return length

    def _window(self) -> int:
        # Local reads cost nothing, so nothing is read ahead of what members turn out to be.
        small = self._headers > 8 and self._position / self._headers < _SMALL
        return _LARGE if self._remote and small else _SMALL


def member_captions(name: str, data: bytes, field: str | None) -> tuple[list[str], int]:
    """(captions, how many items are no text) of a text or JSON member; one that is neither is such an item.

    Args:
        field: of JSON: what holds the captions (``a.b``: b inside a); None: as
            ``described_captions``.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text) if name.lower().endswith(".json") else None
    except (ValueError, RecursionError):  # also UnicodeDecodeError
        return [], 1
    if not name.lower().endswith(".json"):
        return caption_lines(text), 0
    if not isinstance(value, dict):
        return [], 1
    if field is None:
        return described_captions(value)
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return texts_of(value)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts KEY.10.txt after KEY.9.txt."""
    return [_number(part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _number(digits: str) -> tuple[int, str]:
    """Sorts as the number does, of any length: a name may have more digits than Python makes a number of."""
    digits = "".join(str(int(digit)) for digit in digits).lstrip("0")  # of any script
    return len(digits), digits


def _place(root: Storage, path: str, is_base: bool) -> Address:
    """Where a tar lies. The job file may name tars of several places; the first one's is the base."""
    if is_base:
        return BelowBase(path)
    local = root.local_path(path)
    if local is not None:
        return LocalFile(str(local))
    bucket, _, key = root.url_of(path).removeprefix("s3://").partition("/")
    return S3Object(bucket, key)
