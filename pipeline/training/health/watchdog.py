"""Tells of a training that has stopped: which workers stand, at which step, in what, with the stacks of each.

A thread in every worker looks at what its training does. Long before a collective would give up, a worker that
stands writes its stacks to the run's storage and shows on the driver's board where it stands. The first of those
that stand tells of all of them. Whoever is furthest behind is taken for the one that hangs, as the others wait for
it in a collective: it is killed, if so configured, and the group starts anew from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from pipeline.training.clock import Clock, Moment
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.stacks import stacks
from sharding.errors import UserError

if TYPE_CHECKING:
    from cluster.board import Board
    from cluster.workers import WorkerContext
    from pipeline.training.loop import TrainingPlan
    from sharding.storage import Storage

logger = logging.getLogger(__name__)

_LONG_PHASES = ("build", "resume", "checkpoint")  # besides what says of itself that it may take long
#: Phases of a step in their order; a worker in an earlier one is behind.
_ORDER = ("build", "resume", "step", "data", "forward and backward", "optimizer", "other", "checkpoint")
_LOOKS = 10  # times within health.hang_s
_MOST_S = 10.0  # between two looks
_STORAGE_S = 20.0  # for the stacks to be written: what hangs may be the storage


@dataclass(frozen=True)
class Standing:
    """A worker that makes no progress, as it stands on the board.

    Attributes:
        node: its number and name.
        seconds: since when.
        hangs: whether that is longer than its phase may take.
    """

    rank: int
    node: str
    step: int
    phase: str
    seconds: float
    hangs: bool

    def __str__(self) -> str:
        return (
            f"worker {self.rank} (node {self.node}): step {self.step}, {self.phase}, for {self.seconds:.0f} s"
        )

    @property
    def progress(self) -> tuple[int, int]:
        """How far it has come, to be compared with others."""
        return self.step, _ORDER.index(self.phase) if self.phase in _ORDER else len(_ORDER)


def hanging(standing: list[Standing]) -> Standing:
    """Of those that stand, the one the others wait for: furthest behind, of several the first."""
    return min(standing, key=lambda one: (one.progress, one.rank))


def end_process() -> None:
    """Ends this process and those that it started, as they are: a loader process may be what hangs."""
    me = psutil.Process()
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends at this moment
            child.kill()
    me.kill()


class Watched(Protocol):
    """Where a training says what it does."""

    @property
    def now(self) -> Moment: ...


class Watchdog:
    """The thread, for the time of a ``with`` block.

    Args:
        phases: what is watched.
        run: the run's folder, for the stacks.
        board: shared by all workers; None: each speaks for itself.
        warn: tells the person at the driver.
        kill: ends this process.
    """

    def __init__(
        self,
        config: HealthBlock,
        phases: Watched,
        context: WorkerContext,
        run: Storage,
        board: Board | None,
        warn: Callable[[str], None],
        kill: Callable[[], None] = end_process,
    ) -> None:
        assert config.hang_s is not None
        self._config, self._hang_s, self._phases, self._context = config, config.hang_s, phases, context
        self._run, self._board, self._warn, self._kill = run, board, warn, kill
        self._node = f"{context.node_rank}, {socket.gethostname()}"
        self._every = min(self._hang_s / _LOOKS, _MOST_S)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=self._every)

    def _watch(self) -> None:
        told, looks = None, 0
        while not self._over.wait(self._every):
            moment = self._phases.now
            mine = self._look(moment)
            if mine is None:
                continue
            self._post(mine)
            if not mine.hangs:
                continue
            if moment is not told:
                told, looks = moment, 0
                self._keep_stacks(mine)
                continue
            looks += 1  # by now all have had the time to say where they stand
            if moment is self._phases.now:
                self._act(mine, looks)

    def _look(self, moment: Moment) -> Standing | None:
        """Where this worker stands, once it has for half the time it may."""
        long = moment.long or moment.phase in _LONG_PHASES
        limit = self._config.long_phase_s if long else self._hang_s
        seconds = time.monotonic() - moment.since
        if seconds < limit / 2:
            return None
        hangs = seconds >= limit
        return Standing(self._context.rank, self._node, moment.step, moment.phase, seconds, hangs)

    def _post(self, mine: Standing) -> None:
        if self._board is not None:
            self._board.post(f"standing/{mine.rank}", asdict(mine))

    def _standing(self, mine: Standing) -> list[Standing]:
        """All workers that stand, by rank."""
        found = {mine.rank: mine}
        notes: dict[str, Any] = {}
        if self._board is not None:
            # By the board's own clock, as the workers' may differ, or be set at any moment.
            notes = self._board.read(within_s=3 * self._every + _STORAGE_S)
        for topic, note in notes.items():
            if topic.startswith("standing/"):
                one = Standing(**note)
                if one.rank < self._context.world_size:
                    found.setdefault(one.rank, one)
        return [found[rank] for rank in sorted(found)]

    def _act(self, mine: Standing, looks: int) -> None:
        """Tell of all that stand, if this is the first of them; end this process, if it is the one that hangs."""
        standing = self._standing(mine)
        suspect = hanging(standing)
        if looks == 1 and mine.rank == next(one.rank for one in standing if one.hangs):
            self._warn(self._message(standing, suspect))
        # One that hangs outside Python cannot end itself: some looks later the others do, which ends the group too.
        if self._config.on_hang == "restart" and looks > (1 if suspect.rank == mine.rank else _LOOKS):
            logger.error("ending this process, so that the workers start anew: %s", mine)
            self._kill()

    def _message(self, standing: list[Standing], suspect: Standing) -> str:
        missing = self._context.world_size - len(standing)
        return (
            f"the training stands still. Hanging, as it seems: {suspect}. All that stand: "
            f"{'; '.join(map(str, standing))}" + (f"; {missing} others are silent or move" if missing else "")
        )

    def _keep_stacks(self, mine: Standing) -> None:
        """Into the log and the run's storage, which may be what hangs."""
        text = f"{mine}\n\n{stacks()}"
        logger.error("no progress: %s", text)
        path = f"health/hang-step-{mine.step:08d}-worker-{mine.rank}.txt"

        def write() -> None:
            try:
                self._run.write_bytes(path, text.encode())
            except (OSError, UserError) as error:
                logger.warning("the stacks could not be kept: %s", error)

        writing = threading.Thread(target=write, name="stacks", daemon=True)
        writing.start()
        writing.join(timeout=_STORAGE_S)


@contextmanager
def watched(plan: TrainingPlan, context: WorkerContext, clock: Clock) -> Iterator[None]:
    """Watches what the clock says for the time of the block, where that is asked for."""
    if plan.health.hang_s is None:
        yield
        return
    with Watchdog(plan.health, clock, context, plan.run, plan.board, plan.warn):
        yield
