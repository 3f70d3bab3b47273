"""Rows of JSONL, Parquet, CSV or TSV tables that name media by path or url."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from sharding.errors import BadData, UserError
from sharding.names import Skipped, escape_name
from sharding.sources.addresses import Address, remote_url, table_address
from sharding.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Hasher,
    Input,
    feed,
    folder_and_name,
    identity,
    texts_of,
)
from sharding.sources.config import TableSource
from sharding.storage import Storage

_TEXT_SUFFIXES = (".csv", ".tsv")
_SUFFIXES = (".jsonl", ".parquet", *_TEXT_SUFFIXES)
# A row of captions and an address is far smaller; a file without line ends must not fill the memory.
_LONGEST_LINE = 16 << 20
_ROWS_AT_ONCE = 1024

# (row number from 1, the row, or None where it cannot be read)
_Rows = Iterator[tuple[int, dict[str, Any] | None]]


class TableListing:
    """All rows of a table, or of the tables in a folder in the order of their paths."""

    def __init__(self, config: TableSource, storage: Storage) -> None:
        self._config = config
        folder, self._file = config.path, ""
        if config.path.lower().endswith(_SUFFIXES):
            folder, self._file = folder_and_name(config.path)
        self._root = storage.resolve(folder)
        self.skipped = Skipped()
        self._needed = [config.media_column, *config.caption_columns, *config.where]

    @property
    def base(self) -> str:
        return self._root.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. The rows' addresses and captions identify the listing, not the media's contents."""
        self.skipped.clear()
        found = False
        for path in self._files():
            for number, row in self._rows(path):
                if row is not None and not self._selected(row):
                    continue
                found = True
                item = self._input(path, number, row)
                feed(hasher, identity(item), item.captions, item.not_text, item.problem)
                yield item
        if not found:
            which = " match 'where'" if self._config.where else ""
            raise UserError(f"empty corpus: no rows{which} in {self._config.path}")

    def _files(self) -> list[str]:
        if self._file:
            if not self._root.exists(self._file):
                raise UserError(f"no such table: {self._root.url_of(self._file)}")
            return [self._file]
        try:
            self._root.check(write=False)
        except UserError as error:
            raise UserError(
                f"{error} (a table is a {', '.join(_SUFFIXES)} file, or a folder of them)"
            ) from None
        files = []
        for path, _ in self.skipped.visible(self._root.list(others=self.skipped.add_other)):
            if path.lower().endswith(_SUFFIXES):
                files.append(path)
            elif not path.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)):  # else rows may name it
                self.skipped.add_file(path)
        if not files:
            raise UserError(f"no tables ({', '.join(_SUFFIXES)}) below {self._root.url}")
        return files

    def _rows(self, path: str) -> _Rows:
        url = self._root.url_of(path)
        if path.lower().endswith(_TEXT_SUFFIXES):
            return self._text_rows(path, url)
        if self._config.columns is not None:
            raise UserError(f"source.columns is for .csv and .tsv tables; {url} names its columns itself")
        return (
            self._parquet_rows(path, url) if path.lower().endswith(".parquet") else self._json_rows(path, url)
        )

    def _columns_exist(self, columns: set[str], url: str) -> None:
        for column in self._needed:
            if column not in columns:
                raise UserError(
                    f"{url} has no column {column!r}; it has {', '.join(sorted(columns)) or 'none'}"
                )

    def _parquet_rows(self, path: str, url: str) -> _Rows:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._root.open(path) as stream:
            try:
                table = pq.ParquetFile(stream)
            except pa.ArrowException as error:
                raise UserError(f"{url} is not a Parquet file: {error}") from None
            self._columns_exist(set(table.schema_arrow.names), url)
            number = 0
            columns = list(dict.fromkeys(self._needed))
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    def _text_rows(self, path: str, url: str) -> _Rows:
        tabs = path.lower().endswith(".tsv")
        with self._root.open(path) as stream:
            reader: csv.DictReader[str] = csv.DictReader(
                io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""),
                fieldnames=self._config.columns,
                delimiter="\t" if tabs else ",",
                # In tab-separated values a quotation mark is a character like any other.
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            )
            try:
                self._columns_exist(set(reader.fieldnames or ()), url)
                for row in reader:
                    # A row that is too short has None in its last cells, a too long one has the key None.
                    yield reader.line_num, None if None in row else row
            except (csv.Error, UnicodeDecodeError) as error:
                kind = "TSV" if tabs else "CSV"
                raise UserError(f"{url} is not a {kind} table in UTF-8: {error}") from None

    def _json_rows(self, path: str, url: str) -> _Rows:
        columns: set[str] = set()
        with self._root.open(path) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), start=1):
                if len(line) == _LONGEST_LINE:
                    raise UserError(
                        f"{url} line {number} is longer than {_LONGEST_LINE} bytes: not JSON lines"
                    )
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                row = row if isinstance(row, dict) else None
                columns.update(row or ())
                yield number, row
        self._columns_exist(columns, url)

    def _selected(self, row: dict[str, Any]) -> bool:
        for column, wanted in self._config.where.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            # CSV cells are all text, so values are also compared as text.
            if not any(row.get(column) == value or str(row.get(column)) == str(value) for value in values):
                return False
        return True

    def _input(self, path: str, number: int, row: dict[str, Any] | None) -> Input:
        place = f"{escape_name(path)}:{number}"
        if row is None:
            return Input(address=place, problem="bad-row")
        address = row.get(self._config.media_column)
        if not isinstance(address, str) or not address.strip() or texts_of(address)[1]:
            return Input(address=place, problem="bad-address")
        try:
            media = self._address(path, address.strip())
        except BadData as fault:
            return Input(address=place, problem=fault.cause, reason=fault.detail)
        captions: list[str] = []
        not_text = 0
        for column in self._config.caption_columns:
            texts, others = texts_of(row.get(column))
            captions += texts
            not_text += others
        return Input.at(media, captions=captions, not_text=not_text)

    def _address(self, path: str, name: str) -> Address:
        if self._config.url_column is not None:
            return remote_url(name)
        folder = path[: path.rfind("/") + 1]
        # The job file points to this machine: a table on it may name other files of this machine.
        return table_address(name, folder, on_this_machine=self._root.local_path("") is not None)
