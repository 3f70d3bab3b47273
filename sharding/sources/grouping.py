"""Rows of one sample brought together, wherever in a table they stand.

The rows go through a database in a temporary file, since they may be more than fit in memory: of a table of N rows
it takes about as much as the captions and addresses of all of them, in ``TMPDIR``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from sharding.errors import UserError
from sharding.sources.rows import has_text_alone

#: Rows of one group. More than any picture has captions: the column is another one than was meant.
MOST_ROWS = 10_000
_CACHE_KIB = 64 << 10
_AT_ONCE = 1000


def group_key(cell: Any, column: str, media_column: str | None) -> tuple[str | int | float | None, str]:
    """(what the row is grouped by, why the row is bad): a cell that is no text or number, blank or NaN groups nothing.

    Args:
        column: the cell's.
        media_column: where it is the same, a row without a key has no media either, which says more.
    """
    cell = cell.strip() if isinstance(cell, str) else cell
    if isinstance(cell, str | int | float) and cell == cell and cell != "" and has_text_alone(cell):
        return cell, ""
    return None, "" if column == media_column else f"it has no {column!r} to group by"


def grouped(rows: Iterable[tuple[Any, Any]], column: str) -> Iterator[list[Any]]:
    """Rows of equal keys, each group in the order of the rows; groups in the order in which they begin.

    Args:
        rows: (key, row): JSON values. A row whose key is None is a group by itself.
        column: that the keys are of, for errors.

    Raises:
        UserError: a group of more than ``MOST_ROWS`` rows; no space for the temporary file.
    """
    base = sqlite3.connect(
        "", check_same_thread=False
    )  # a temporary file of its own, removed when it is closed
    try:
        base.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        base.execute("PRAGMA journal_mode = OFF")
        base.execute("PRAGMA synchronous = OFF")
        base.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, key TEXT, row TEXT)")
        base.executemany("INSERT INTO rows VALUES (?, ?, ?)", _numbered(rows))
        found = base.execute(
            "SELECT first, key, row FROM"
            " (SELECT number, key, row, MIN(number) OVER (PARTITION BY key) AS first FROM rows)"
            " ORDER BY first, number"
        )
        for _, members in groupby(found, itemgetter(0)):
            group: list[Any] = []
            for _, key, row in members:
                if len(group) == MOST_ROWS:
                    raise UserError(
                        f"group_by {column!r}: more than {MOST_ROWS} rows have the value {key[:80]}: is it the "
                        "column that tells the pictures or clips apart?"
                    )
                group.append(json.loads(row))
            yield group
    except sqlite3.OperationalError as error:
        raise UserError(f"group_by {column!r} needs space for all rows in TMPDIR: {error}") from None
    finally:
        base.close()


def _numbered(rows: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, str, str]]:
    for number, (key, row) in enumerate(rows):
        # A number is no JSON text of a key, so that a row without one is alone.
        yield number, f"row {number}" if key is None else json.dumps(key), json.dumps(row)
