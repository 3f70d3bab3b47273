"""Steps that a rollback leaves out: a list kept with the run, and the way back.

Layout, below the run's folder::

    health/left-out.json        the windows, in the order of the rollbacks; written before the workers go back

A run goes back by starting again within its processes, from the newest checkpoint, as after a worker's death.
Steps within a window draw their batches and count, for learning rates, order of samples and metrics alike, but
nothing is computed from them; the consumption ledger masks their samples.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.errors import RolledBack
from pipeline.patience import patiently
from sharding.errors import BadData
from sharding.storage import Storage

if TYPE_CHECKING:
    from cluster.workers import WorkerContext

logger = logging.getLogger(__name__)

PATH = "health/left-out.json"
FORMAT = "glscl-left-out-steps"


@dataclass(frozen=True)
class Window:
    """Steps ``first`` to ``last``, counted from 1; ``last`` is the spike's."""

    first: int
    last: int


class LeftOut:
    """The windows of a run, the same on every worker. Collective.

    Raises:
        BadData: the list is damaged.
    """

    def __init__(self, run: Storage, context: WorkerContext) -> None:
        self._run, self._rank = run, context.rank
        box: list[Any] = [_read(run) if context.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=context.device)
        if isinstance(box[0], BadData):
            raise box[0]
        self.windows: list[Window] = box[0]

    def __contains__(self, step: int) -> bool:
        return any(window.first <= step <= window.last for window in self.windows)

    def add(self, window: Window) -> None:
        """Keep one more; on return it is safe. Collective."""
        self.windows.append(window)
        if self._rank == 0:
            windows = [asdict(one) for one in self.windows]
            record = {"format": FORMAT, "version": 1, "windows": windows}
            patiently(lambda: self._run.write_json(PATH, record), "the rollback")
        dist.barrier()


def _read(run: Storage) -> list[Window] | BadData:
    """The list as it is stored; a fault is returned, for every worker to raise."""
    try:
        record = run.read_json(PATH)
        if record["format"] != FORMAT:
            raise KeyError("format")
        return [Window(int(one["first"]), int(one["last"])) for one in record["windows"]]
    except FileNotFoundError:
        return []
    except (BadData, KeyError, TypeError, ValueError) as error:
        return BadData("damaged-record", f"{run.url_of(PATH)} is damaged ({error})")


@contextmanager
def freed_by_rollback(engine: Any) -> Iterator[None]:
    """Takes an engine out of DeepSpeed's registers when a rollback leaves the block."""
    try:
        yield
    except RolledBack:
        engine.destroy()
        raise


def again_after_rollback(attempt: Callable[[], None]) -> None:
    """Call it until it does not ask to begin anew. What it held is freed in between."""
    while True:
        try:
            return attempt()
        except RolledBack as error:
            logger.warning("%s", error)
        gc.collect()  # the engine and its hooks hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
