"""From the records of a run to seconds by cause. Pure functions of plain data; all times in seconds since the epoch.

::

    driver   |--------- life 1 ---------|  down  |------------- life 2 ----------------|
    workers     |-attempt 1-|  |-att. 2-|            |----- attempt 3 -----| evaluation |
             start           restart       restart

An attempt is one group of workers from its first to its last sign of life. What it did in between, it says itself.
The time between two attempts is that of the restart, but for the time in which no driver ran, and for the time in
which a driver waited for evaluations. A death is known to the last sign of life before it (``records.INTERVAL_S``):
steps done after that are trained again without being known as such, and their first time counts as restart.

Machines whose clocks differ, or were set between two boots, may tell of times that overlap, or lie far apart. What an
attempt says of itself counts in full then, and no second between attempts counts twice: shares stay shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: In the order in which they are shown, with what they mean.
CAUSES = {
    "compute": "steps, trained for the first time",
    "data": "waiting for batches",
    "checkpoint": "writing checkpoints, as far as the training waits",
    "evaluation": "waiting for evaluations at the end",
    "start": "before the first step: processes, model, connections",
    "restart": "from a death to the next step: processes, model, resuming",
    "redone": "steps trained again",
    "skipped": "steps without an update",
    "down": "no driver ran",
    "other": "everything else",
}


@dataclass(frozen=True)
class Attempt:
    """One group of workers, as its worker 0 saw it.

    Attributes:
        began, seen: first and last sign of life.
        seconds: by cause ("start": building and resuming).
        step: the highest that was reached.
        first_step: when the first of its steps was done; 0: none was.
        redone, skipped: steps of these kinds.
        flops: of the steps that count as compute, all workers together; 0: not counted.
        peak: FLOP/s that the devices of all workers could do; 0: not known.
        peak_name: what that is.
        boot: of the machine whose clock this is by; empty: not known.
        offset: seconds since the epoch when that boot began, by the first record of the run in it.
    """

    began: float
    seen: float
    seconds: dict[str, float]
    workers: int
    step: int = 0
    first_step: float = 0.0
    redone: int = 0
    skipped: int = 0
    flops: float = 0.0
    peak: float = 0.0
    peak_name: str = ""
    boot: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class Life:
    """One driver of the run. ``evaluating``: since when it waited for evaluations alone; None: it never did.

    ``boot`` and ``offset``: as of :class:`Attempt`.
    """

    began: float
    seen: float
    evaluating: float | None = None
    boot: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class Account:
    """Where the time of a run went.

    Attributes:
        seconds: by cause, all of ``CAUSES``; their sum is ``wall``.
        mfu: counted FLOPs of the compute time over what the devices could have done in it; None: not counted.
    """

    seconds: dict[str, float]
    attempts: int
    step: int
    redone: int
    skipped: int
    mfu: float | None = None
    peak: float = 0.0
    peak_name: str = ""

    @property
    def wall(self) -> float:
        """Seconds from the first sign of life to the last."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the time in which steps were computed that did not have to be computed again."""
        return self.seconds["compute"] / self.wall if self.wall else 0.0


def account(lives: Iterable[Life], attempts: Iterable[Attempt]) -> Account | None:
    """The account of a run; None of a run without a sign of life."""
    lives = sorted(lives, key=lambda life: life.began)
    attempts = sorted(attempts, key=lambda attempt: attempt.began)
    if not attempts:
        return None
    seconds = dict.fromkeys(CAUSES, 0.0)
    first = attempts[0]
    cursor = min([first.began, *(life.began for life in lives)])
    for number, attempt in enumerate(attempts):
        cause = "start" if number == 0 else "restart"
        _add(seconds, _between(cursor, attempt.began, cause, lives))
        _add(seconds, _within(attempt, cause))
        cursor = max(cursor, attempt.seen)
    end = max([cursor, *(life.seen for life in lives)])
    # A driver without workers after the last of them: it takes them down, or failed to start new ones.
    _add(seconds, _between(cursor, end, "other", lives))
    return Account(
        seconds=seconds,
        attempts=len(attempts),
        step=max(attempt.step for attempt in attempts),
        redone=sum(attempt.redone for attempt in attempts),
        skipped=sum(attempt.skipped for attempt in attempts),
        mfu=_mfu(attempts),
        peak=attempts[-1].peak,
        peak_name=attempts[-1].peak_name,
    )


def cause_of(phase: str, *, redone: bool = False, skipped: bool = False) -> str:
    """The cause that a phase of a worker's clock counts for, in a step of that kind."""
    if phase in ("build", "resume"):
        return "start"
    if phase in ("checkpoint", "other"):
        return phase
    if redone:
        return "redone"
    if skipped:
        return "skipped"
    return "data" if phase == "data" else "compute"


def _between(begin: float, end: float, cause: str, lives: Sequence[Life]) -> dict[str, float]:
    """Seconds by cause of a time without workers."""
    if end <= begin:
        return {}
    down, seen = [], None
    for life in lives:
        if seen is not None and life.began > seen:
            down.append((seen, life.began))
        seen = life.seen if seen is None else max(seen, life.seen)
    waits = [(max(life.began, life.evaluating), life.seen) for life in lives if life.evaluating is not None]
    found = {"down": _covered(begin, end, down), "evaluation": _covered(begin, end, waits)}
    found[cause] = max(0.0, end - begin - sum(found.values()))
    return found


def _covered(begin: float, end: float, spans: Iterable[tuple[float, float]]) -> float:
    """Seconds between ``begin`` and ``end`` that lie in a span, or in several."""
    covered, cursor = 0.0, begin
    for first, last in sorted(spans):
        covered += max(0.0, min(end, last) - max(cursor, first))
        cursor = max(cursor, last)
    return covered


def _within(attempt: Attempt, start: str) -> dict[str, float]:
    """Seconds by cause of an attempt; what it does not account for itself is "other"."""
    seconds = {start if cause == "start" else cause: spent for cause, spent in attempt.seconds.items()}
    unsaid = attempt.seen - attempt.began - sum(attempt.seconds.values())
    seconds["other"] = seconds.get("other", 0.0) + max(0.0, unsaid)
    return seconds


def _add(seconds: dict[str, float], more: Mapping[str, float]) -> None:
    for cause, spent in more.items():
        seconds[cause] += spent


def _mfu(attempts: Sequence[Attempt]) -> float | None:
    counted = [attempt for attempt in attempts if attempt.flops and attempt.peak]
    possible = sum(attempt.seconds.get("compute", 0.0) * attempt.peak for attempt in counted)
    return sum(attempt.flops for attempt in counted) / possible if possible else None
