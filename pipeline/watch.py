"""What the driver does while the workers train: shows progress, tells MLflow of checkpoints, clears old ones away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.board import Board
from pipeline.config import JobConfig
from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.goodput.accounting import account
from pipeline.goodput.records import read_records
from pipeline.goodput.table import account_metrics
from pipeline.patience import patiently
from pipeline.progress import Task
from pipeline.tracking import CheckpointEntry, Tracker
from pipeline.training.checkpoints import Checkpoint, delete_checkpoint, list_checkpoints
from pipeline.training.retention import expendable
from sharding.errors import UserError
from sharding.storage import Storage

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger(__name__)

_PROGRESS_S = 0.5
_CHECKPOINTS_S = 3.0


def checkpoint_entry(run: Storage, checkpoint: Checkpoint) -> CheckpointEntry:
    """The checkpoint as MLflow shows it: a link and digests, no weights."""
    params = {f"data.{name}": digest for name, digest in checkpoint.record["data"].items()}
    params["stage_name"] = str(checkpoint.record["stage_name"])
    return CheckpointEntry(
        checkpoint.step, checkpoint.stage, run.url_of(checkpoint.path), checkpoint.digest, params
    )


def progress_note(news: Mapping[str, Any]) -> str:
    """A step's metrics in short. A step that was skipped has no loss, one that was left out no speed either."""
    note = str(news["stage"])
    if "loss/total" in news:
        note += f"  loss {news['loss/total']:.3f}"
    if "speed/samples_per_s" in news:
        note += (
            f"  {news['speed/samples_per_s']:.0f} samples/s  "
            f"waiting for data {news['time/waiting_for_data_share']:.0%}"
        )
    if news.get("health/skipped_steps"):
        note += f"  {news['health/skipped_steps']:.0f} steps skipped"
    return note


class Watch:
    """A thread beside the training, for the time of a ``with`` block."""

    def __init__(
        self,
        job: JobConfig,
        run: Storage,
        board: Board,
        tracker: Tracker,
        dispatcher: Dispatcher,
        progress: Task,
    ) -> None:
        self._job, self._run, self._board = job, run, board
        self._tracker, self._dispatcher, self._progress = tracker, dispatcher, progress
        self._told: set[str] = set()
        self._known: dict[str, Checkpoint] = {}
        self._accounted: int | None = None  # the step; None: nothing was looked at yet
        self._warning = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._show_progress()
            patiently(self.look_at_checkpoints, "looking at the checkpoints")

    def look_at_checkpoints(self) -> None:
        """Tell MLflow of new checkpoints and delete those that no rule keeps."""
        checkpoints = list_checkpoints(self._run, self._known)
        for checkpoint in checkpoints:
            if checkpoint.digest not in self._told and not checkpoint.record.get("interim"):
                self._told.add(checkpoint.digest)
                self._tracker.checkpoint(checkpoint_entry(self._run, checkpoint))
        self._account(checkpoints)
        rules = self._job.checkpoints
        best = self._dispatcher.best_step(rules.keep_best) if rules.keep_best else None
        for checkpoint in expendable(checkpoints, rules, pinned=self._dispatcher.pinned(), best=best):
            logger.info("deleting the checkpoint of step %d (retention)", checkpoint.step)
            delete_checkpoint(self._run, checkpoint)

    def _account(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Tell MLflow at each checkpoint where the time went; of the last step that is told when all has ended."""
        newest = checkpoints[-1].step if checkpoints else 0
        if self._accounted is not None and self._accounted < newest < self._job.train.total_steps:
            found = account(*read_records(self._run))
            if found is not None:
                self._tracker.metrics(newest, account_metrics(found))
        self._accounted = newest

    def _loop(self) -> None:
        looked, told = 0.0, ""
        while not self._stop.wait(_PROGRESS_S):
            self._show_progress()
            if time.monotonic() - looked >= _CHECKPOINTS_S:
                looked = time.monotonic()
                try:
                    self.look_at_checkpoints()
                except (OSError, UserError) as error:
                    if str(error) != told:
                        logger.warning(
                            "checkpoints could not be looked at, tried every %g s: %s", _CHECKPOINTS_S, error
                        )
                    told = str(error)
                else:
                    told = ""

    def _show_progress(self) -> None:
        notes = self._board.read()
        warning = notes.get("warning", "")
        if warning != self._warning:
            self._warning = warning
            logger.error(warning)
        news = notes.get("training")
        if news is not None:
            self._progress.update(news["step"], progress_note(news))
