"""The driver's side of tracking: opens the run, records checkpoints and evaluations, and never stops the
training.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import connect, is_permanent, one_line
from pipeline.tracking.logger import MetricLogger
from pipeline.tracking.results import CheckpointEntry, EvaluationEntry, RunResults
from pipeline.tracking.runs import RunHandle, open_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sharding.storage import Storage

log = logging.getLogger("pipeline.tracking")

_LONGEST_PAUSE_S = 15.0
_REPORT = "evaluation report"
_Action = Callable[[RunResults], object]


class Tracker:
    """Does what it is told in the background, in order, and again until the server has taken it.

    What is still waiting when the driver dies is found again at the next start by asking the storage
    (checkpoints, the ledger), so nothing is kept on disk here.

    Args:
        config: where; ``uri`` absolute (:meth:`TrackingConfig.resolved`).
        name: of the run in MLflow.
        key: unique name of the training, see :func:`open_run`.
        params: flattened configuration.
        tags: digests, versions.
        existing_run_id: noted in ``run.json`` by an earlier life.
        wait_s: how long to wait here for the first answer of the server. After that the training starts
            without
            one, with a clear warning, and the run is made when the server comes. 0: not at all.
        on_open: told the handle once the run exists (to note its id); called from the background thread.
    """

    def __init__(
        self,
        config: TrackingConfig,
        *,
        name: str,
        key: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        existing_run_id: str | None = None,
        wait_s: float = 30.0,
        on_open: Callable[[RunHandle], None] | None = None,
    ) -> None:
        self.config = config
        self._open = lambda: open_run(
            config, name=name, key=key, params=params, tags=tags, existing_run_id=existing_run_id
        )
        self._on_open = on_open
        self.handle: RunHandle | None = None
        self._results: RunResults | None = None
        self._client: MlflowClient | None = None
        self._actions: deque[tuple[str, _Action]] = deque()
        self._report = ("", "")
        self._warned = False
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._attempted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-results", daemon=True)
        self._thread.start()
        if wait_s and not self._attempted.wait(wait_s):
            self._warn("no answer yet")

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; nothing while the server has not been reached."""
        return None if self.handle is None else self.handle.run_id

    def checkpoint(self, checkpoint: CheckpointEntry) -> None:
        """Shows a committed checkpoint as a logged model. Returns at once, like all that follow; may be
        repeated.
        """
        self._add(f"checkpoint of step {checkpoint.step}", lambda r: r.log_checkpoint(checkpoint))

    def evaluation(self, entry: EvaluationEntry) -> None:
        """Shows a finished or failed evaluation."""
        what = f"evaluation {entry.task} of step {entry.checkpoint.step}"
        self._add(what, lambda r: r.log_evaluation(entry))

    def best(self, checkpoint: CheckpointEntry, metric: str, *, chosen: bool = False) -> None:
        """Gives a checkpoint the alias of the best by ``TASK/METRIC``; that of the best of all, where ``chosen``."""
        self._add(
            f"best checkpoint by {metric}, step {checkpoint.step}",
            lambda r: r.mark_best(checkpoint, metric, chosen=chosen),
        )

    def tag(self, name: str, value: str) -> None:
        """A tag of the run, at once as a whole."""
        self._add(f"tag {name}", lambda r: r.tag(name, value))

    def change(self, number: int, change: Mapping[str, Any]) -> None:
        """A change of the configuration, made or refused, of that number; see ``changes.log_change``."""
        self._add(f"change {number} of the configuration", lambda r: r.log_change(number, change))

    def report(self, html: str, text: str) -> None:
        """Stores the evaluation report with the run, in place of the one before; one that still waits is left out."""
        with self._changed:
            self._report = html, text
            waits = any(what == _REPORT for what, _ in list(self._actions)[1:])  # the first may be on its way
        if not waits:
            self._add(_REPORT, lambda r: r.log_report(*self._report))

    def dataset(self, report: str, tags: Mapping[str, str]) -> None:
        """Stores the closing report of a preparation (HTML), and tags, with the run."""
        self._add("preparation report", lambda r: r.log_dataset(report, tags))

    def leftovers(self, spool: Storage) -> None:
        """Sends the metrics that a :class:`MetricLogger` could only keep in ``spool``.

        To be called when no worker logs any more: before the end of a run, and when a run is started again
        that has nothing left to train.
        """
        self._add("metrics kept in " + spool.url, lambda r: self._send_leftovers(spool))

    def finish(self, status: str = "FINISHED", timeout_s: float = 30.0) -> bool:
        """Waits for the rest within the limit, sets the run's status (``FINISHED``, ``FAILED``,
        ``KILLED``), ends.

        Returns:
            whether everything was delivered; what was not is named in a warning. Never raises.
        """
        self._add("end of the run", lambda r: self._terminate(status))
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._actions and time.monotonic() < deadline:
                self._changed.notify_all()
                self._changed.wait(min(0.5, max(0.0, deadline - time.monotonic())))
            left = [what for what, _ in self._actions]
            self._stop.set()
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        if left:
            log.warning(
                "MLflow at %s was not told: %s. It is told when the run is started again",
                self.config.address,
                ", ".join(left),
            )
        return not left

    def _terminate(self, status: str) -> None:
        assert self._client is not None
        assert self.handle is not None
        self._client.set_terminated(self.handle.run_id, status=status)

    def _send_leftovers(self, spool: Storage) -> None:
        assert self.handle is not None
        if any(spool.list()):
            MetricLogger(self.config, self.handle.key, run_id=self.handle.run_id, spool=spool).close()
            if any(spool.list()):
                raise ConnectionError("kept metrics are not delivered yet")

    def _add(self, what: str, action: _Action) -> None:
        with self._changed:
            self._actions.append((what, action))
            self._changed.notify_all()

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.is_set():
            try:
                self._work()
                pause = 0.0
            except Exception as error:  # noqa: BLE001 - must not end a training; it is reported
                self._warn(one_line(error))
                pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE_S)
            self._attempted.set()
            with self._changed:
                self._changed.notify_all()
                if pause:
                    self._changed.wait(pause)
                elif not self._actions and not self._stop.is_set():
                    self._changed.wait()

    def _work(self) -> None:
        if self.handle is None:
            handle = self._open()
            if self._on_open is not None:
                self._on_open(handle)
            self.handle = handle
        if self._results is None:
            self._client = connect(self.config)
            self._results = RunResults(self._client, self.handle)
        self._attempted.set()
        while self._actions and not self._stop.is_set():
            what, action = self._actions[0]
            try:
                action(self._results)
            except Exception as error:
                if not is_permanent(error):
                    raise
                log.warning("MLflow refused the %s: %s", what, one_line(error))
            with self._changed:
                self._actions.popleft()
                self._changed.notify_all()
        if self._warned:
            log.warning("MLflow at %s answers again", self.config.address)
            self._warned = False

    def _warn(self, cause: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "MLflow at %s cannot be used (%s); the run goes on and is recorded there when it comes back",
                self.config.address,
                cause,
            )
