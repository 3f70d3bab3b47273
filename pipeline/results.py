"""What becomes of the outcomes of evaluations while a job runs: the report, the best by each metric, and falls."""

from __future__ import annotations

import logging
import threading

from pipeline.config import JobConfig
from pipeline.errors import Regressed, RunTakenOver
from pipeline.evaluation.ledger import Ledger, Outcome
from pipeline.evaluation.report import LiveReport
from pipeline.evaluation.standings import Fall, Standings
from pipeline.runs import RunFolder
from pipeline.tracking import Tracker

logger = logging.getLogger(__name__)


class Results:
    """Told of outcomes by the dispatcher, from its thread.

    Attributes:
        stop: set once the training is to be stopped.
        error: why.
        tracking: where MLflow is.
    """

    def __init__(self, job: JobConfig, run: RunFolder, tracker: Tracker, report: LiveReport) -> None:
        self.stop = threading.Event()
        self.error: Regressed | RunTakenOver | None = None
        self.tracking = tracker.config
        self._run, self._tracker, self._report = run.storage, tracker, report
        self._kept = job.checkpoints.keep_best
        self._standings = Standings(job.evaluate.regression, Ledger(run.storage), job.seed)
        self._best: dict[str, Outcome] = {}  # not told yet

    def add(self, outcome: Outcome) -> None:
        """One more, or one of an earlier life."""
        self._report.add(outcome)
        self._best |= self._standings.add(outcome)

    def judge(self) -> None:
        """Once all that are there now are added: moves the marks of the best, and tells what fell."""
        for metric, outcome in self._best.items():
            checkpoint = outcome.entry(self._run).checkpoint
            self._tracker.best(checkpoint, metric, chosen=metric == self._kept)
        self._best = {}
        for fall in self._standings.falls():
            self._tell(fall)

    def _tell(self, fall: Fall) -> None:
        logger.warning("regression: %s", fall)
        self._tracker.tag(f"regression.{fall.rule.metric}", str(fall))
        if fall.rule.action == "stop":
            hint = "evaluate.regression; to go on, raise its drop or let it warn"
            self._end(Regressed(f"the training is stopped: {fall} ({hint})"))

    def taken_over(self, reason: str) -> None:
        """The run is another driver's by now."""
        self._end(RunTakenOver(reason))

    def _end(self, error: Regressed | RunTakenOver) -> None:
        self.error = error
        self.stop.set()
