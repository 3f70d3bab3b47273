"""When each step was really trained, also those that are done again: a line a step, written by worker 0.

Run as a program it is ``glscl`` with such a journal: ``python -m tests.chaos.journal FILE run job.yaml``. The job's
board, on which worker 0 posts each step, is replaced by one that writes what is posted down as well.
"""

from __future__ import annotations

import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cluster.board import Board


class Trained(NamedTuple):
    """A step that was trained: at a time (seconds since the epoch), by the process of worker 0."""

    time: float
    process: int
    step: int


class JournalBoard(Board):
    """A board that keeps what is posted about the training in a file of this machine.

    Where the file ``.gate`` beside it names a step, the training goes no further: it must not be over before the last
    fault, however long a killed server takes to come back.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    def post(self, topic: str, note: Any) -> None:
        super().post(topic, note)
        if topic == "training":
            with self._path.open("a") as file:  # one small write at the end: whole, also between processes
                file.write(f"{time.time()} {os.getpid()} {note['step']}\n")
            while note["step"] >= gate_of(self._path):
                time.sleep(0.02)


def set_gate(journal: Path, step: int | None) -> None:
    """How far the training may go; None: to its end."""
    gate = journal.with_suffix(".gate")
    if step is None:
        gate.unlink(missing_ok=True)
        return
    new = journal.with_suffix(".new-gate")
    new.write_text(str(step))
    new.replace(gate)  # whole, whoever reads


def gate_of(journal: Path) -> float:
    """The step that the training waits at; infinity where there is none."""
    try:
        return int(journal.with_suffix(".gate").read_text())
    except FileNotFoundError:
        return math.inf


def read_journal(path: Path) -> list[Trained]:
    """All steps so far, in the order of training."""
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [Trained(float(moment), int(process), int(step)) for moment, process, step in lines]


def main() -> None:
    from pipeline import cli, job
    from tests.chaos import journal  # not "__main__": the workers import it by name

    path = sys.argv.pop(1)
    job.Board = partial(journal.JournalBoard, path)  # type: ignore[assignment, misc]
    cli.main()


if __name__ == "__main__":
    main()
