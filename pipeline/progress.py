"""Progress of long work: bars on a terminal, plain lines with rates elsewhere (a log file, a Ray job)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Seconds between two plain lines of the same task.
LINE_INTERVAL_S = 10.0


class Task(Protocol):
    """One piece of work whose progress is shown."""

    def update(self, completed: float, note: str = "", total: float | None = None) -> None:
        """Show that ``completed`` of ``total`` is done; ``note`` is free text such as a rate."""


class _Bar:
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def update(self, completed: float, note: str = "", total: float | None = None) -> None:
        changes: dict[str, float] = {} if total is None else {"total": total}
        self._progress.update(self._task, completed=completed, note=note, **changes)  # type: ignore[arg-type]


class _Lines:
    def __init__(self, console: Console, title: str, total: float | None) -> None:
        self._console, self._title, self._total = console, title, total
        self._printed = 0.0
        self._shown = -1.0

    def update(self, completed: float, note: str = "", total: float | None = None) -> None:
        self._total = total if total is not None else self._total
        now = time.monotonic()
        ended = self._total is not None and completed >= self._total
        if completed == self._shown or (now - self._printed < LINE_INTERVAL_S and not ended):
            return
        self._printed, self._shown = now, completed
        share = f" ({completed / self._total:.0%})" if self._total else ""
        count = f"{completed:g}" if self._total is None else f"{completed:g}/{self._total:g}"
        self._console.print(f"{self._title}: {count}{share}  {note}".rstrip(), highlight=False, markup=False)


@contextmanager
def show_progress(
    console: Console, title: str, total: float | None = None, *, remaining: bool = True
) -> Iterator[Task]:
    """A task on the console for the time of a ``with`` block.

    ``remaining``: estimate the time that is left from how the bar moves; otherwise the notes say it.
    """
    if not console.is_terminal:
        yield _Lines(console, title, total)
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if remaining else []),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with Progress(*columns, console=console, transient=False) as progress:
        yield _Bar(progress, progress.add_task(title, total=total, note=""))
