"""What a worker is doing now, and how its time divides into phases.

    with clock.phase("compute"):
        with clock.phase("data"):     what is inside an inner phase is not counted for the outer one
            ...

Another thread (a watchdog) may read :attr:`Clock.now` at any moment. Each phase is a range of the same name in a
profile (``torch.profiler``).
"""

from __future__ import annotations

import time
from collections import defaultdict
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


class Clock:
    """One worker's clock; a phase is begun and ended by one thread alone.

    Attributes:
        now: replaced as a whole, so that a reader in another thread never sees half of a change.
    """

    def __init__(self, phase: str = "other") -> None:
        from torch.profiler import record_function  # here: drivers import this module, and have no clock

        self._range = record_function
        self.now = Moment(0, phase, time.monotonic(), long=True)  # before the first step
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._entered = self.now.since  # since when the phase of now is not counted yet

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """``name`` for the time of the block, then again the phase around it."""
        outer = self.now
        self._enter(outer.step, name, outer.long)
        try:
            with self._range(name):
                yield
        finally:
            self._enter(self.now.step, outer.phase, self.now.long)

    def step(self, step: int, *, long: bool = False) -> None:
        """What follows is on the way to the end of ``step``."""
        self._enter(step, self.now.phase, long)

    def seconds(self) -> defaultdict[str, float]:
        """Seconds of each phase up to now, the running one included."""
        self._count(time.monotonic())
        return self._seconds.copy()

    def _enter(self, step: int, phase: str, long: bool) -> None:
        moment = time.monotonic()
        self._count(moment)
        self.now = Moment(step, phase, moment, long)

    def _count(self, moment: float) -> None:
        self._seconds[self.now.phase] += moment - self._entered
        self._entered = moment
