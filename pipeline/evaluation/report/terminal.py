"""The evaluations as lines of text, for a terminal and for logs: a table for each kind of task.

    retrieval, %, ± half of the 95 % interval
                           ── text → vision ──  ── vision → text ──
    task    step   stage        R@1       R@10       R@1       R@10
    images   120       0   1.6 ±1.6  12.0 ±4.0  2.4 ±1.9  16.4 ±4.6
    images        chance        0.4        4.0       0.4        4.0

A failed evaluation has its cause in place of the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING, Literal

from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report.headlines import Headline, baseline_of, kind_of
from pipeline.evaluation.report.history import History, by_kind, histories
from pipeline.evaluation.report.numbers import half_width, number

if TYPE_CHECKING:
    from rich.console import Console

_FIRST = ("task", "step", "stage")
_GAP = "  "
_WIDTH = 100
_Part = Literal["title", "head", "row", "baseline", "failure", "space"]
_STYLES: dict[_Part, str] = {"title": "bold", "head": "bold", "baseline": "dim", "failure": "red"}


@dataclass(frozen=True)
class _Line:
    part: _Part
    text: str


def text_report(outcomes: Sequence[Outcome]) -> str:
    """Plain lines, columns aligned."""
    return "".join(f"{line.text}\n" for line in _lines(outcomes))


def print_report(outcomes: Sequence[Outcome], console: Console) -> None:
    """The same lines, in colour where ``console`` is a terminal."""
    for line in _lines(outcomes):
        style = _STYLES.get(line.part)
        console.print(line.text, style=style, highlight=False, markup=False, soft_wrap=True)


def _lines(outcomes: Sequence[Outcome]) -> Iterator[_Line]:
    if not outcomes:
        yield _Line("title", "no evaluations")
    for place, group in enumerate(by_kind(histories(outcomes))):
        if place:
            yield _Line("space", "")
        yield from _table(group)


def _table(group: Sequence[History]) -> Iterator[_Line]:
    """Of the tasks of one kind; of an unknown kind each task may have columns of its own."""
    columns = list(dict.fromkeys(headline for history in group for headline in history.headlines))
    rows = [row for history in group for row in _rows(history, columns)]
    whole = [(*_FIRST, *(column.label for column in columns)), *(row.cells for row in rows if not row.cause)]
    widths = [max(len(cells[n]) for cells in whole) for n in range(len(_FIRST) + len(columns))]
    widths[: len(_FIRST)] = [
        max(width, *(len(row.cells[n]) for row in rows)) for n, width in enumerate(widths[: len(_FIRST)])
    ]
    yield from (_Line("title", line) for line in wrap(_title(group, columns), _WIDTH))
    if any(column.group for column in columns):
        yield _Line("head", _groups(columns, widths))
    yield _Line("head", _joined(whole[0], widths))
    for row in rows:
        text = _joined(row.cells, widths)
        yield _Line(row.part, f"{text}{_GAP}failed: {row.cause}" if row.cause else text)


@dataclass(frozen=True)
class _Row:
    part: _Part
    cells: tuple[str, ...]
    cause: str | None = None


def _rows(history: History, columns: Sequence[Headline]) -> Iterator[_Row]:
    for outcome in history.steps:
        first = (history.name, str(outcome.step), str(outcome.checkpoint["stage"]))
        if outcome.cause is not None:
            yield _Row("failure", first, outcome.cause)
        else:
            yield _Row("row", (*first, *(_cell(outcome, column) for column in columns)))
    baselines = [baseline_of(column, history.done) for column in columns]
    if any(baseline is not None for baseline in baselines):
        cells = [
            "" if baseline is None else number(baseline, percent=column.percent)
            for baseline, column in zip(baselines, columns, strict=True)
        ]
        yield _Row("baseline", (history.name, "", kind_of(history.kind).baseline, *cells))


def _cell(outcome: Outcome, column: Headline) -> str:
    value = number(outcome.metrics.get(column.metric), percent=column.percent)
    return f"{value} {half_width(outcome.intervals.get(column.metric), percent=column.percent)}".rstrip()


def _title(group: Sequence[History], columns: Sequence[Headline]) -> str:
    kind = kind_of(group[0].kind)
    certain = any(
        column.metric in outcome.intervals
        for history in group
        for outcome in history.done
        for column in columns
    )
    parts = [kind.title]
    if columns and all(column.percent for column in columns):
        parts.append("%")
    if certain:
        parts.append("± half of the 95 % interval")
    return "; ".join([", ".join(parts), *([kind.note] if kind.note and columns else [])])


def _groups(columns: Sequence[Headline], widths: list[int]) -> str:
    """A line over the columns of each group with its name; makes the last of them wider where it has no room."""
    parts = [" " * (sum(widths[: len(_FIRST)]) + len(_GAP) * (len(_FIRST) - 1))]
    for name, found in groupby(enumerate(columns, start=len(_FIRST)), key=lambda item: item[1].group):
        places = [place for place, _ in found]
        title = f" {name} " if name else ""
        widths[places[-1]] += max(0, len(title) - _width(places, widths))
        parts.append(title.center(_width(places, widths), "─" if name else " "))
    return _GAP.join(parts).rstrip()


def _width(places: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[place] for place in places) + len(_GAP) * (len(places) - 1)


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    parts = [
        cell.rjust(width) if n else cell.ljust(width)
        for n, (cell, width) in enumerate(zip(cells, widths, strict=False))
    ]
    return _GAP.join(parts).rstrip()
