"""What workers and driver leave in the run's storage, so that its time can be accounted for over any deaths.

Layout, below the run's folder::

    goodput/attempt-<began, ns>.json   one group of workers; written by its worker 0 as it goes
    goodput/driver-<began, ns>.json    one life of the driver

Times are in seconds since the epoch, by the clock as the first record of a run in a boot of a machine found it: what
happens on one machine keeps its order and its length when the clock is set meanwhile.

Each is one small file, written anew every ``INTERVAL_S`` seconds by a thread of its own and at the end: ``kill -9``
loses at most one interval, and a storage that stays away stops nobody.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Self, TypeVar

from pydantic import TypeAdapter

from pipeline.boot import age_s, boot_id, uptime_s
from pipeline.goodput.accounting import Attempt, Life, cause_of
from pipeline.training.clock import Clock
from sharding.errors import UserError
from sharding.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "goodput"
INTERVAL_S = 5.0

_Record = TypeVar("_Record", Attempt, Life)


def read_records(run: Storage) -> tuple[list[Life], list[Attempt]]:
    """All that is recorded of a run; a record that cannot be read is passed over, loudly."""
    lives: list[Life] = []
    attempts: list[Attempt] = []
    for file in run.list(FOLDER):
        name = file.path.rpartition("/")[2]
        if name.startswith("driver-"):
            lives += _read(run, file.path, Life)
        elif name.startswith("attempt-"):
            attempts += _read(run, file.path, Attempt)
    return lives, attempts


def _read(run: Storage, path: str, kind: type[_Record]) -> list[_Record]:
    try:
        record = TypeAdapter(kind).validate_json(run.read_bytes(path))
        if not math.isfinite(record.began) or not record.began <= record.seen < math.inf:
            raise ValueError(f"from {record.began} to {record.seen}")
        return [record]
    except FileNotFoundError:
        return []
    except UserError:
        raise  # a ValueError too: the storage refuses
    except ValueError as error:  # also pydantic's
        cause = str(error).splitlines()[0]
        logger.warning("%s is damaged, its time is not accounted for (%s)", run.url_of(path), cause)
        return []


class _Timeline:
    """The present moment, in seconds since the epoch, for the records of one run; see the module.

    Args:
        records: all of the run so far.
    """

    def __init__(self, records: Iterable[Life | Attempt]) -> None:
        self.boot = boot_id()
        here = [one.offset for one in records if self.boot and one.boot == self.boot]
        self.offset = here[0] if here else time.time() - uptime_s()

    def now(self) -> float:
        return self.offset + uptime_s()


class _Recorder(ABC):
    """Keeps one record in the storage up to date, for the time of a ``with`` block."""

    def __init__(self, run: Storage | None, kind: str) -> None:
        self._run, self._path = run, f"{FOLDER}/{kind}-{time.time_ns():020d}.json"
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._warned = False
        self._thread = threading.Thread(target=self._loop, name="goodput", daemon=True)

    @abstractmethod
    def _record(self) -> Attempt | Life:
        """What is to be written now; called from any thread."""

    def __enter__(self) -> Self:
        if self._run is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._run is not None:
            self._thread.join()
            self.write()

    def write(self) -> None:
        """Write the record now. Never raises for a storage that is away, or refuses."""
        assert self._run is not None
        with self._writing:
            try:
                self._run.write_bytes(self._path, json.dumps(asdict(self._record())).encode())
                self._warned = False
            except (OSError, UserError) as error:
                if not self._warned:
                    logger.warning("where the time goes could not be recorded: %s", error)
                self._warned = True

    def _loop(self) -> None:
        self.write()
        while not self._over.wait(INTERVAL_S):
            self.write()


class LifeRecorder(_Recorder):
    """The driver's signs of life. ``run``: None of a driver that finds nothing left to train."""

    def __init__(self, run: Storage | None) -> None:
        super().__init__(run, "driver")
        earlier, attempts = ([], []) if run is None else read_records(run)
        self._time = _Timeline([*earlier, *attempts])
        self._evaluating: float | None = None
        # The start of a driver that goes on with a run belongs to the restart; that of the first prepared data.
        self._since = now = self._time.now()
        if earlier:
            # Another machine's clock may be ahead of this one's.
            self._since = min(now, max(now - age_s(os.getpid()), *(life.seen for life in earlier)))

    def evaluating(self) -> None:
        """From now on it only waits for evaluations."""
        self._evaluating = self._time.now()

    def _record(self) -> Life:
        return Life(self._since, self._time.now(), self._evaluating, self._time.boot, self._time.offset)


class AttemptRecorder(_Recorder):
    """Where the time of one worker goes; that of worker 0 is recorded, and stands for all.

    Args:
        run: the run's storage; None on the other workers.
    """

    def __init__(self, run: Storage | None, workers: int) -> None:
        super().__init__(run, "attempt")
        self.clock = Clock()
        self._workers = workers
        lives, known = ([], []) if run is None else read_records(run)
        self._time = _Timeline([*lives, *known])
        self._began = self._time.now()
        self._before = max((attempt.step for attempt in known), default=0)
        self._lock = threading.Lock()
        self._told = self.clock.seconds()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._step = self._redone = self._skipped = 0
        self._flops = self._peak = self._step_flops = self._first_step = 0.0
        self._skips = False  # whether the present step does
        self._peak_name = ""

    @contextmanager
    def step(self, step: int, *, long: bool = False) -> Iterator[None]:
        """The training of ``step`` (from 1), within which all is compute but for the clock's inner phases.

        ``long``: see :class:`pipeline.training.clock.Moment`.
        """
        self._settle()
        self.clock.step(step, long=long)
        with self.clock.phase("step"):
            yield
        redone = step <= self._before
        self._settle(redone=redone, skipped=self._skips)
        with self._lock:
            self._step = step
            self._before = max(self._before, step)  # a rollback within the attempt trains steps again too
            self._first_step = self._first_step or self._time.now()
            self._redone += redone
            self._skipped += self._skips
            self._flops += 0.0 if redone or self._skips else self._step_flops
        self._skips, self._step_flops = False, 0.0

    def skip(self) -> None:
        """The step that is being trained makes no update (a gradient that is not finite, say)."""
        self._skips = True

    def computed(self, flops: float, peak: float, peak_name: str) -> None:
        """Counted FLOPs of the step that is being trained, by all workers; see :class:`accounting.Attempt`."""
        self._step_flops += flops
        with self._lock:
            self._peak, self._peak_name = peak, peak_name

    def _settle(self, *, redone: bool = False, skipped: bool = False) -> None:
        """Count what the clock has measured since the last time."""
        now = self.clock.seconds()
        with self._lock:
            for phase, seconds in now.items():
                cause = cause_of(phase, redone=redone, skipped=skipped)
                self._seconds[cause] += seconds - self._told[phase]
            self._told = now

    def _record(self) -> Attempt:
        with self._lock:
            seen = self._time.now()
            seconds = self._seconds.copy()
            phase = self.clock.now.phase
            if phase in ("build", "resume", "checkpoint"):  # a step counts when it is done
                seconds[cause_of(phase)] += max(0.0, seen - self._began - sum(seconds.values()))
            return Attempt(
                began=self._began,
                seen=seen,
                seconds=dict(seconds),
                workers=self._workers,
                step=self._step,
                first_step=self._first_step,
                redone=self._redone,
                skipped=self._skipped,
                flops=self._flops,
                peak=self._peak,
                peak_name=self._peak_name,
                boot=self._time.boot,
                offset=self._time.offset,
            )
