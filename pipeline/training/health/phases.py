"""What a worker is doing, for the watchdog to read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """``phase`` since ``since`` (of ``time.monotonic``), on the way to the end of step ``step``.

    ``long``: it may take long by itself (the first step of a stage compiles).
    """

    step: int
    phase: str
    since: float
    long: bool = False


class Phases:
    """Set by the training alone. ``now`` is replaced as a whole, so that another thread may read it at any moment."""

    def __init__(self) -> None:
        self.now = Moment(0, "start", time.monotonic(), long=True)

    def long(self, phase: str) -> None:
        """What comes before the first step ("start") or after the last one ("end") begins."""
        self.now = Moment(0 if phase == "start" else self.now.step, phase, time.monotonic(), long=True)

    def step(self, step: int, *, long: bool = False) -> None:
        """What follows is on the way to the end of ``step``."""
        self.now = Moment(step, "between", time.monotonic(), long)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """``name`` for the time of the block."""
        outer = self.now
        self.now = Moment(outer.step, name, time.monotonic(), outer.long)
        yield
        self.now = Moment(outer.step, outer.phase, time.monotonic(), outer.long)
