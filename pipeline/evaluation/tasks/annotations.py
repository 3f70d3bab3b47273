"""Reading annotation files of any size from any storage: JSON with one long list, and JSON lines.

A row becomes what the task keeps of it as soon as it is read, so a file of hundreds of megabytes never stands in
memory as JSON. A row that is not as it should be ends the reading, and is named by its number: annotation files
are published as a whole, and a broken one is no sample that could be passed over.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from sharding.captions import is_text
from sharding.errors import UserError
from sharding.names import hidden
from sharding.sources.base import feed, folder_and_name
from sharding.storage import normalise_url

if TYPE_CHECKING:
    from sharding.storage import Storage

Row = TypeVar("Row")

_BLOCK = 1 << 20  # bytes read at a time
# Far beyond any row of the published files; what has no end must not fill the memory.
_LONGEST_ROW = 16 << 20
_SPACE = " \t\r\n"
_ENDS = ",]}" + _SPACE
_HEADER_TEXT = 1000  # longest text kept of what stands beside the rows


def locate(storage: Storage, address: str) -> tuple[Storage, str]:
    """The folder of a file, and its name there.

    Args:
        storage: the job's; a relative address is below it.
        address: of the file: a url or a path.
    """
    if "://" not in address and not address.startswith(("/", "~")):
        return storage, address
    folder, name = folder_and_name(normalise_url(address))
    return storage.resolve(folder), name


def require(storage: Storage, address: str, field: str) -> tuple[Storage, str]:
    """As :func:`locate`, of a file that must be there.

    Raises:
        UserError: it is not, naming the field of the task's block.
    """
    folder, name = locate(storage, address)
    if not folder.exists(name):
        raise UserError(f"{field}: there is no file {folder.url_of(name)}")
    return folder, name


def read_rows(
    storage: Storage, address: str, field: str, key: str, convert: Callable[[dict[str, Any]], Row]
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the list ``key`` in a JSON object, and the plain values beside it.

    Args:
        storage, address, field: see :func:`require`.
        key: of the object's list of rows; every row is an object.
        convert: what is kept of a row; it may raise ValueError or KeyError over one that is not as it should be.

    Raises:
        UserError: no such file, not JSON, no such list, or a bad row, by its number from 0.
    """
    folder, name = require(storage, address, field)
    url = folder.url_of(name)
    rows: list[Row] = []
    header: dict[str, Any] = {}
    with folder.open(name) as stream:
        for path, value in _Scanner(stream, url).members(key):
            if path is None:
                rows.append(_converted(value, convert, f"{url}, {key}[{len(rows)}]"))
            elif isinstance(value, int | float) or (is_text(value) and len(value) <= _HEADER_TEXT):
                header[path] = value
    return rows, header


def read_lines(
    storage: Storage, address: str, field: str, convert: Callable[[dict[str, Any]], Row]
) -> list[Row]:
    """The rows of a file of JSON lines; empty lines are passed over.

    Args:
        storage, address, field, convert: as in :func:`read_rows`.

    Raises:
        UserError: no such file, or a bad row, by the number of its line from 1.
    """
    folder, name = require(storage, address, field)
    url = folder.url_of(name)
    rows = []
    with folder.open(name) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_ROW), b""), start=1):
            place = f"{url}, line {number}"
            if len(line) == _LONGEST_ROW:
                raise UserError(f"{place} is longer than {_LONGEST_ROW >> 20} MiB: these are no JSON lines")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON: {error}") from None
            rows.append(_converted(value, convert, place))
    return rows


def _converted(value: Any, convert: Callable[[dict[str, Any]], Row], place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place} is not an object but {type(value).__name__}")
    try:
        return convert(value)
    except KeyError as error:
        raise UserError(f"{place} has no {error.args[0]!r}") from None
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def text_of(row: dict[str, Any], key: str) -> str:
    """``row[key]``, which must be text that UTF-8 can hold."""
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is not text but {type(value).__name__}")
    if not is_text(value):
        raise ValueError(f"{key!r} holds half a surrogate pair, which is no text")
    return value


def number_of(row: dict[str, Any], key: str) -> int:
    """``row[key]``, which must be a whole number."""
    value = row[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key!r} is not a whole number but {str(value)[:60]!r}")
    return value


class _Scanner:
    """Walks through a JSON object of which one member may be too long for the memory."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self._stream, self._url = stream, url
        self._text, self._place = "", 0  # what was read, and how far it is dealt with
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._value = json.JSONDecoder().raw_decode
        self._ended = False

    def members(self, key: str) -> Iterator[tuple[str | None, Any]]:
        """(name, value) of the object's members, and (None, row) for every row of the list ``key``."""
        if self._next() != "{":
            raise UserError(f"{self._url} is not a JSON object with a list {key!r}")
        found = False
        self._place += 1
        while self._next() != "}":
            name = self._one()
            self._expect(":")
            if name == key and self._next() == "[":
                found = True
                self._place += 1
                while self._next() != "]":
                    yield None, self._one()
                    self._comma("]")
                self._place += 1
            else:
                yield str(name), self._one()
            self._comma("}")
        if not found:
            raise UserError(f"{self._url} has no list {key!r}")

    def _one(self) -> Any:
        """The value that begins here."""
        self._next()
        while True:
            try:
                value, end = self._value(self._text, self._place)
            except (ValueError, RecursionError) as error:
                # Wrong, or not read to its end yet.
                if len(self._text) - self._place > _LONGEST_ROW or not self._more():
                    raise UserError(f"{self._url} is not JSON, or cut short: {error}") from None
                continue
            # A number goes on in the next block unless something ended it.
            ended = end < len(self._text) and (not isinstance(value, int | float) or self._text[end] in _ENDS)
            if ended or not self._more():
                self._place = end
                return value

    def _next(self) -> str:
        """The next character that is no space; it is not passed yet."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                raise UserError(f"{self._url} is not JSON, or cut short: it ends too soon")

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise UserError(
                f"{self._url} is not JSON: {self._text[self._place]!r} where {character!r} belongs"
            )
        self._place += 1

    def _comma(self, end: str) -> None:
        if self._next() != end:
            self._expect(",")

    def _more(self) -> bool:
        """Reads on; False at the end of the file."""
        if self._ended:
            return False
        block = self._stream.read(_BLOCK)
        self._ended = not block
        try:
            text = self._decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._url} is not UTF-8: {error.reason}") from None
        self._text, self._place = self._text[self._place :] + text, 0
        return bool(text) or not self._ended


def digest_of(storage: Storage, files: dict[str, str], folders: dict[str, str], **settings: Any) -> str:
    """sha256 over whole annotation files, and over the names and sizes of everything in folders of images.

    Args:
        storage: the job's.
        files, folders: addresses by the field of the task's block that names them.
        settings: what else decides what is read, as plain data.

    Raises:
        UserError: a file that is not there, a folder that is not there or empty, naming the field.
    """
    digest = hashlib.sha256()
    feed(digest, settings)
    for field, address in files.items():
        folder, name = require(storage, address, field)
        feed(digest, field, sha256_of(folder, name))
    for field, address in folders.items():
        images = storage.resolve(address)
        empty = True
        for path, size in images.list():
            if hidden(path):
                continue
            feed(digest, field, path, size)
            empty = False
        if empty:
            raise UserError(f"{field}: there are no files below {images.url}")
    return digest.hexdigest()


def sha256_of(folder: Storage, name: str) -> str:
    """Of a whole file (hex), read in blocks."""
    digest = hashlib.sha256()
    with folder.open(name) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
