"""When each step was really trained, also those that are done again: a line a step, written by worker 0.

Run as a program it is ``glscl`` with such a journal: ``python -m tests.chaos.journal FILE run job.yaml``. The job's
board, on which worker 0 posts each step, is replaced by one that writes what is posted down as well.
"""

from __future__ import annotations

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
    """A board that keeps what is posted about the training in a file of this machine."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def post(self, topic: str, note: Any) -> None:
        super().post(topic, note)
        if topic == "training":
            with open(self._path, "a") as file:  # one small write at the end: whole, also between processes
                file.write(f"{time.time()} {os.getpid()} {note['step']}\n")


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
