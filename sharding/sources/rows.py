"""Rows of CSV, TSV, JSON lines and Parquet, one by one: a row that cannot be read costs that row.

Every line (of Parquet: every row that the footer counts) is in a row that is read, in one that is not, or is blank.

A line of text ends with LF, CR LF or CR (of JSON with LF), and has ``LONGEST_LINE`` bytes at most. Bytes that are
not UTF-8 become lone surrogates in the cells that hold them, and so cost those cells (``sharding.captions.is_text``).

In CSV a cell that begins with a quotation mark ends with one that a comma or a line end follows, and may go on over
many lines. Nothing tells a mark that nobody closes from such a cell at once; what follows does::

    3.jpg,"a dog            line 4: opens a cell
    4.jpg,a cat             is a row by itself: the cell of line 4 was never closed
    5.jpg,"a cow, or two"   has a mark that ends no cell: the same
    ...                     the end of the table, 10,000 lines or LONGEST_LINE bytes: the same
                            (100 lines or 64 KiB, once 200,000 lines or 128 MiB of the table were read again)

Then line 4 alone cannot be read, and reading goes on with line 5.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from sharding.captions import is_text
from sharding.errors import UserError
from sharding.names import escape_name
from sharding.sources.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES

if TYPE_CHECKING:
    import pyarrow as pa

# A row of captions and an address is far smaller; a file without line ends must not fill the memory.
LONGEST_LINE = 16 << 20
_MOST_LINES = 10_000  # of one row: of those that a quotation may take all are in memory
# What quotations that turn out unclosed take is read again: of a table so many lines and bytes, and from then on a
# quotation takes few. Else a table of them would take time by the square of its lines.
_MOST_AGAIN, _MOST_BYTES_AGAIN = 200_000, 128 << 20
_FEW_LINES, _FEW_BYTES = 100, 64 << 10
_BLOCK = 1 << 20
_ROWS_AT_ONCE = 1024
# What is raised of a value that Python cannot have: bytes that are not UTF-8, the year 20000, an unknown time zone.
_NO_VALUE = (ValueError, ArithmeticError, LookupError, TypeError, RecursionError)
# Rows that one group of Parquet rows has at most, when it cannot be read: a damaged footer may claim any number.
_MOST_LOST_ROWS = 1 << 24
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
_UTF8_BOM = b"\xef\xbb\xbf"
_SHOWN_NAMES, _SHOWN_CHARACTERS = 20, 60
_TOO_LONG = f"it has more than {LONGEST_LINE} bytes"

# Cells are bounded by lines; csv's own limit of 131,072 characters would end the reading of the table.
csv.field_size_limit(2 * LONGEST_LINE)


class Row(NamedTuple):
    """``number``: of the row's first line, or of the row in Parquet, from 1. ``cells`` by column: None where the row
    cannot be read, and ``reason`` says why.
    """

    number: int
    cells: dict[str, Any] | None
    reason: str = ""


class Unreadable:
    """Stands for a cell of Parquet that cannot be read: it is no text, and equals nothing."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def text_lines(stream: BinaryIO, url: str, *, ends: bytes = b"\r\n") -> Iterator[tuple[int, str | None]]:
    """(number from 1, line with its end) of a text file; None for one that is too long.

    Args:
        stream: read forwards.
        url: for errors.
        ends: the bytes that end a line; CR LF is one end.

    Raises:
        UserError: the file is in UTF-16 or UTF-32.
    """
    for number, line in enumerate(_byte_lines(stream, url, b"\r" in ends), start=1):
        yield number, None if line is None else line.decode("utf-8", "surrogateescape")


def _byte_lines(stream: BinaryIO, url: str, carriage_returns: bool) -> Iterator[bytes | None]:
    rest, too_long = stream.read(4), False
    for mark, name in _BOMS.items():
        if rest.startswith(mark):
            raise UserError(f"{url} is in {name}: save it as UTF-8")
    if rest.startswith(_UTF8_BOM):
        rest = rest[len(_UTF8_BOM) :]
    while chunk := stream.readline(_BLOCK):
        if rest or not chunk.endswith(b"\n") or (carriage_returns and b"\r" in chunk[:-2]):
            parts = _cut(rest + chunk, carriage_returns)
        else:
            parts = [chunk]
        rest = b"" if parts[-1].endswith(b"\n") else parts.pop()  # CR may be the first half of an end
        for line in parts:
            yield None if too_long or len(line) > LONGEST_LINE else line
            too_long = False
        if len(rest) > LONGEST_LINE:
            too_long, rest = True, rest[-1:]
    for line in _cut(rest, carriage_returns):
        yield None if too_long else line
        too_long = False


def _cut(data: bytes, carriage_returns: bool) -> list[bytes]:
    if carriage_returns:
        return data.splitlines(keepends=True)
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def table_rows(
    stream: BinaryIO,
    url: str,
    columns: Sequence[str] | None,
    needed: Collection[str],
    *,
    tabs: bool = False,
    address: Callable[[str], bool] | None = None,
    address_column: str = "",
) -> Iterator[Row]:
    """The rows of a CSV (or, with ``tabs``, TSV) table; of cells those of ``needed``, None where a row is too short.

    Args:
        columns: names of the columns; None: the first line that is not blank has them.
        needed: the columns that there must be.
        tabs: in tab-separated values a quotation mark is a character like any other.
        address: whether a cell of ``address_column`` names media, as far as its looks tell; default: ``names_media``.

    Raises:
        UserError: no such column, the file is in UTF-16, its first line is none.
    """
    lines = _Lines(text_lines(stream, url))
    options: dict[str, Any] = {
        "delimiter": "\t" if tabs else ",",
        "quoting": csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        "strict": True,
    }
    reader = csv.reader(lines, **options)
    names = list(columns) if columns is not None else _header(lines, reader, url)
    require_columns(needed, names, url)
    for column in needed:
        if names.count(column) > 1:
            raise UserError(f"{url} has two columns {column!r}")
    place = {column: names.index(column) for column in needed}
    if not tabs:
        key = place.get(address_column, 0)
        looks_right = address or names_media

        def is_row(line: str) -> bool:
            if line.count(options["delimiter"]) < len(names) - 1:
                return False
            try:
                cells = next(csv.reader([line], **options), [])
            except csv.Error:
                return False
            return len(cells) == len(names) and looks_right(cells[key])

        lines.is_row = is_row
    while (record := lines.record(reader, len(names))) is not None:
        if record.cells is None:
            yield Row(record.number, None, record.reason)
        elif record.cells:
            cells = record.cells
            yield Row(
                record.number, {name: cells[at] if at < len(cells) else None for name, at in place.items()}
            )


def _header(lines: _Lines, reader: Iterator[list[str]], url: str) -> list[str]:
    while (record := lines.record(reader)) is not None:
        if record.cells is None:
            raise UserError(f"{url}: line {record.number} has no names of columns: {record.reason}")
        if record.cells:
            if any("\0" in cell for cell in record.cells):
                raise UserError(f"{url} has NUL bytes in line {record.number}: it is not a table in UTF-8")
            return record.cells
    return []


class _Record(NamedTuple):
    number: int
    cells: list[str] | None
    reason: str = ""


class _TooLong(Exception):
    """A line that is too long, where a record begins."""


class _Lines:
    """What ``csv.reader`` reads from: it notes which lines a record takes, and can have them back."""

    def __init__(self, lines: Iterator[tuple[int, str | None]]) -> None:
        self._lines = lines
        self._ahead: deque[tuple[int, str | None]] = deque()  # given back
        self._taken: list[tuple[int, str | None]] = []
        self._size = 0
        self._again = self._bytes_again = 0
        self._most, self._most_bytes = _MOST_LINES, LONGEST_LINE  # of one row, where it has several lines
        self._end = ""  # why a cell over several lines was not let go on
        self.is_row: Callable[[str], bool] = lambda line: False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        item = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if item is None:
            self._end = "the end of the table"
            raise StopIteration
        number, line = item
        if self._taken:
            if line is None or self._size + len(line) > self._most_bytes:
                self._end = f"{self._most_bytes} bytes"
            elif len(self._taken) >= self._most:
                self._end = f"{self._most} lines"
            elif self.is_row(line):
                self._end = f"the row in line {number}"
            if self._end or line is None:
                self._ahead.appendleft(item)
                raise StopIteration
        self._taken.append(item)
        if line is None:
            raise _TooLong
        self._size += len(line)
        return line

    def record(self, reader: Iterator[list[str]], columns: int | None = None) -> _Record | None:
        """The next record, of ``columns`` cells at most; [] for a blank line; None at the end."""
        self._taken, self._size, self._end = [], 0, ""
        try:
            cells = next(reader)
        except StopIteration:
            return None
        except _TooLong:
            return _Record(self._taken[0][0], None, _TOO_LONG)
        except csv.Error as error:
            reason = f"its quotation marks are wrong: {error}"
            if self._end:
                reason = f"a quotation opens here that is not closed before {self._end}"
            elif len(self._taken) > 1:
                reason = (
                    f"a quotation opens here that is not closed as it should be, by line {self._taken[-1][0]}"
                )
            return self._bad(reason)
        if columns is not None and len(cells) > columns:
            return self._bad(f"it has {len(cells)} cells, the table {columns} columns")
        return _Record(self._taken[0][0], cells)

    def _bad(self, reason: str) -> _Record:
        """Only the first line is lost; what a quotation took of those after it is read again."""
        self._ahead.extendleft(reversed(self._taken[1:]))
        self._again += len(self._taken) - 1
        self._bytes_again += sum(len(line) for _, line in self._taken[1:] if line is not None)
        if self._again > _MOST_AGAIN or self._bytes_again > _MOST_BYTES_AGAIN:
            self._most, self._most_bytes = _FEW_LINES, _FEW_BYTES
        return _Record(self._taken[0][0], None, reason)


_NUMBERED = re.compile(r"(?=\S*\d)\S+")


def names_media(cell: str) -> bool:
    """Whether a cell looks like a path or url: it has the suffix of media, a scheme, or is one word with a digit."""
    cell = cell.strip()
    return (
        "\n" not in cell
        and len(cell) <= 4096
        and (
            cell.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
            or re.match(r"[a-z0-9]+://\S", cell, re.IGNORECASE) is not None
            or _NUMBERED.fullmatch(cell) is not None
        )
    )


def json_rows(stream: BinaryIO, url: str, needed: Collection[str]) -> Iterator[Row]:
    """The rows of JSON lines: objects, each in a line of its own.

    Raises:
        UserError: the file is in UTF-16; no row has one of the ``needed`` columns (at the end).
    """
    outer: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal outer
        outer = pairs  # in the end those of the outermost object
        return dict(pairs)

    missing, seen, found = set(needed), dict[str, None](), False
    for number, line in text_lines(stream, url, ends=b"\n"):
        if line is None:
            yield Row(number, None, _TOO_LONG)
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=remember)
        except (ValueError, RecursionError) as error:
            yield Row(number, None, f"not JSON: {json_fault(error)}")
            continue
        if not isinstance(value, dict):
            yield Row(number, None, f"not an object but {type(value).__name__}")
            continue
        if len(value) < len(outer):
            times = Counter(name for name, _ in outer)
            twice = next((column for column in needed if times[column] > 1), None)
            if twice is not None:
                yield Row(number, None, f"it has {twice!r} twice")
                continue
        found = True
        missing.difference_update(value)
        if missing and len(seen) < _SHOWN_NAMES:
            seen.update(dict.fromkeys(value))
        yield Row(number, value)
    if missing and found:
        require_columns(needed, [*seen, *(set(needed) - missing)], url)


def json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that ``json`` cannot read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "it is not UTF-8" if isinstance(error, UnicodeError) else "a number has more than 4,300 digits"


def require_columns(needed: Collection[str], there: Collection[str], url: str) -> None:
    """UserError unless all ``needed`` columns are there; it names those that are."""
    for column in needed:
        if column not in there:
            names = sorted({escape_name(name)[:_SHOWN_CHARACTERS] for name in there})
            more = ", ..." if len(names) > _SHOWN_NAMES else ""
            shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_SHOWN_NAMES])
            raise UserError(f"{url} has no column {column!r}; it has {shown or 'none'}{more}")


def parquet_rows(stream: BinaryIO, url: str, needed: Collection[str]) -> Iterator[Row]:
    """The rows of a Parquet file; of cells those of ``needed``. A damaged page costs what is left of its row group.

    Raises:
        UserError: it is not a Parquet file, its footer is damaged, no such column, or two of that name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Where pages have checksums, a changed byte is found rather than read as another value.
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        names, metadata = file.schema_arrow.names, file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        _raise_if_of_storage(error)
        raise UserError(f"{url} is not a Parquet file, or is damaged: {_line(error)}") from None
    require_columns(needed, names, url)
    for column in needed:
        if names.count(column) > 1:
            raise UserError(f"{url} has two columns {column!r}")
    first = 1
    for group, size in enumerate(sizes):
        if size < 0:
            raise UserError(f"{url} is damaged: row group {group} has {size} rows")
        done, reason = 0, "the group has fewer rows than the footer says"
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=list(needed))
        while done < size:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
                _raise_if_of_storage(error)
                reason, batch = _line(error), None
            if batch is None:
                break
            rows = batch.num_rows
            columns = {name: cells_of(batch.column(name)) for name in needed}
            for row in range(min(rows, size - done)):
                cells = {name: values[row] for name, values in columns.items()}
                yield Row(first + done + row, cells)
            done += rows
        if size - done > _MOST_LOST_ROWS:
            raise UserError(f"{url}: row group {group}, of {size} rows, cannot be read: {reason}")
        last = first + size - 1
        for number in range(first + done, last + 1):
            yield Row(
                number, None, f"rows {first + done} to {last} (of row group {group}) cannot be read: {reason}"
            )
        first = last + 1


def cells_of(column: pa.Array) -> list[Any]:
    """The values of a column; those that Python cannot have are ``Unreadable``."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except (pa.ArrowException, *_NO_VALUE):
        return [_cell(value) for value in column]  # one by one, for the sake of the others


def _cell(value: pa.Scalar) -> Any:
    import pyarrow as pa

    try:
        return value.as_py()
    except (pa.ArrowException, *_NO_VALUE) as error:
        if isinstance(value, pa.ListScalar) and value.values is not None:
            return [_cell(item) for item in value.values]
        return Unreadable(_line(error))


def _raise_if_of_storage(error: Exception) -> None:
    """Arrow's own errors of what is in a file have no number, and are of Arrow's or Python's classes."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and not _is_of_arrow(error)):
        raise error


def _is_of_arrow(error: OSError) -> bool:
    return type(error) is OSError and error.errno is None


def _line(error: Exception) -> str:
    return escape_name(" ".join(str(error).split()))[:300] or type(error).__name__


def has_text_alone(cell: Any) -> bool:
    """Whether what a cell says can be told: no bytes that are not UTF-8, nothing that cannot be read."""
    return is_text(cell) if isinstance(cell, str) else not isinstance(cell, Unreadable)
