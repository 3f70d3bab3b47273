"""Rows of JSONL, Parquet, CSV or TSV tables that name media by path or url."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sharding.errors import BadData, UnreadableObject, UserError
from sharding.names import Skipped, escape_name
from sharding.sources.addresses import Address, remote_url, table_address
from sharding.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Hasher,
    Input,
    UnreadableFile,
    feed,
    folder_and_name,
    identity,
    reading,
    texts_of,
    unreadable,
)
from sharding.sources.config import TableSource
from sharding.sources.grouping import group_key, grouped
from sharding.sources.rows import Row, has_text_alone, json_rows, parquet_rows, table_rows
from sharding.storage import Storage

_TEXT_SUFFIXES = (".csv", ".tsv")
_SUFFIXES = (".jsonl", ".parquet", *_TEXT_SUFFIXES)


class TableListing:
    """All rows of a table, or of the tables in a folder in the order of their paths."""

    def __init__(self, config: TableSource, storage: Storage) -> None:
        self._config = config
        folder, self._file = config.path, ""
        if config.path.lower().endswith(_SUFFIXES):
            folder, self._file = folder_and_name(config.path)
        self._root = storage.resolve(folder)
        self.skipped = Skipped()
        self._lost: list[tuple[str, UnreadableFile]] = []  # tables that the storage does not give
        columns = [config.media_column, *config.caption_columns, *config.where]
        self._needed = list(dict.fromkeys([*columns, *([config.group_by] if config.group_by else [])]))

    @property
    def base(self) -> str:
        return self._root.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. The rows' addresses and captions identify the listing, not the media's contents."""
        self.skipped.clear()
        self._lost.clear()
        found = False
        for item in self._inputs() if self._config.group_by is None else self._grouped(self._config.group_by):
            found = True
            feed(hasher, identity(item), item.captions, item.not_text, item.problem)
            yield item
        for path, fault in self._lost:
            item = unreadable(escape_name(path), fault)
            feed(hasher, item.address, [], 0, item.problem)
            yield item
        if self._lost and not found:
            raise UserError(f"none of the tables of {self._root.url} can be read: {self._lost[0][1].detail}")
        if not found:
            which = " match 'where'" if self._config.where else ""
            raise UserError(f"empty corpus: no rows{which} in {self._config.path}")

    def _inputs(self) -> Iterator[Input]:
        for path, row in self._selected():
            if row.cells is None:
                yield self._bad(path, row)
            else:
                captions, not_text = self._captions(row.cells)
                yield self._input(
                    path, row.number, row.cells.get(self._config.media_column), captions, not_text
                )

    def _grouped(self, column: str) -> Iterator[Input]:
        """An input of all rows that are equal in ``column``. A row that belongs to no others is one by itself."""
        for rows in grouped(self._keyed(column), column):
            first: Input | None = None
            place, captions, others = "", list[str](), list[Input]()
            for path, number, address, texts, not_text, reason in rows:
                item = self._input(path, number, address, texts, not_text)
                if reason:
                    item = self._bad(path, Row(number, None, reason))
                if item.problem is not None:
                    others.append(item)
                elif first is None:
                    first, place, captions = item, f"{escape_name(path)}:{number}", [*texts]
                elif item.media != first.media:
                    reason = f"it names other media than {place}, though {column!r} is the same"
                    others.append(self._bad(path, Row(number, None, reason)))
                else:
                    captions += texts
                    not_text += first.not_text
                    first = replace(first, not_text=not_text, reason=first.reason or item.reason)
            if first is not None:
                yield replace(first, captions=captions)
            yield from others

    def _keyed(self, column: str) -> Iterator[tuple[Any, list[Any]]]:
        """(key, [path, number, address, captions, captions that are no text, why it cannot be read]) of each row."""
        for path, row in self._selected():
            if row.cells is None:
                yield None, [path, row.number, None, [], 0, row.reason]
                continue
            key, address = row.cells.get(column), row.cells.get(self._config.media_column)
            captions, not_text = self._captions(row.cells)
            address = address if isinstance(address, str) else None
            key, reason = group_key(key, column, self._config.media_column)
            yield key, [path, row.number, address, captions, not_text, reason]

    def _captions(self, cells: dict[str, Any]) -> tuple[list[str], int]:
        captions: list[str] = []
        not_text = 0
        for column in self._config.caption_columns:
            texts, others = texts_of(cells.get(column))
            captions += texts
            not_text += others
        return captions, not_text

    def _files(self) -> list[str]:
        if self._file:
            with contextlib.suppress(UnreadableObject):  # it is there: reading it says more
                if not self._root.exists(self._file):
                    raise UserError(f"no such table: {escape_name(self._root.url_of(self._file))}")
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

    def _selected(self) -> Iterator[tuple[str, Row]]:
        """(path of the table, row) of the rows that ``where`` selects, and of those of which that cannot be told."""
        for path in self._files():
            for row in self._readable(path):
                if row.cells is None or not self._config.where:
                    yield path, row
                    continue
                unclear = next((c for c in self._config.where if not has_text_alone(row.cells.get(c))), None)
                if unclear is not None:
                    yield (
                        path,
                        Row(row.number, None, f"its {unclear!r}, which 'where' asks for, cannot be read"),
                    )
                elif self._fits(row.cells):
                    yield path, row

    def _readable(self, path: str) -> Iterator[Row]:
        try:
            with reading(escape_name(path)):
                yield from self._rows(path)
        except UnreadableFile as fault:
            self._lost.append((path, fault))

    def _rows(self, path: str) -> Iterator[Row]:
        url, needed = self._root.url_of(path), self._needed
        suffix = posixpath.splitext(path)[1].lower()
        if suffix not in _TEXT_SUFFIXES and self._config.columns is not None:
            raise UserError(f"source.columns is for .csv and .tsv tables; {url} names its columns itself")
        with self._root.open(path) as stream:
            if suffix == ".parquet":
                yield from parquet_rows(stream, url, needed)
            elif suffix == ".jsonl":
                yield from json_rows(stream, url, needed)
            else:
                yield from table_rows(
                    stream,
                    url,
                    self._config.columns,
                    needed,
                    tabs=suffix == ".tsv",
                    address_column=self._config.media_column,
                )

    def _fits(self, cells: dict[str, Any]) -> bool:
        for column, wanted in self._config.where.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            cell = cells.get(column)
            if isinstance(cell, list | dict):
                return False
            # CSV cells are all text, so values are also compared as text.
            if not any(cell == value or str(cell) == str(value) for value in values):
                return False
        return True

    def _bad(self, path: str, row: Row) -> Input:
        return Input(address=f"{escape_name(path)}:{row.number}", problem="bad-row", reason=row.reason)

    def _input(self, path: str, number: int, address: Any, captions: list[str], not_text: int) -> Input:
        place = f"{escape_name(path)}:{number}"
        if not isinstance(address, str) or not address.strip() or texts_of(address)[1]:
            return Input(address=place, problem="bad-address")
        try:
            media = self._address(path, address.strip())
        except BadData as fault:
            return Input(address=place, problem=fault.cause, reason=fault.detail)
        reason = f"not text in {place}" if not_text else None
        return Input.at(media, captions=captions, not_text=not_text, reason=reason)

    def _address(self, path: str, name: str) -> Address:
        if self._config.url_column is not None:
            return remote_url(name)
        folder = path[: path.rfind("/") + 1]
        # The job file points to this machine: a table on it may name other files of this machine.
        return table_address(name, folder, on_this_machine=self._root.local_path("") is not None)
