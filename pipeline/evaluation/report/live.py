"""The report of a run while it runs: written again when evaluations have finished, not too often."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.evaluation.ledger import EvaluationKey, Ledger, Outcome
from pipeline.evaluation.report.page import html_report
from pipeline.evaluation.report.terminal import text_report
from pipeline.evaluation.result import Example
from pipeline.tracking.links import run_page
from sharding.errors import BadData, UserError

if TYPE_CHECKING:
    from pipeline.tracking import Tracker
    from sharding.storage import Storage

log = logging.getLogger("pipeline.evaluation")

#: Path of the page below the run.
PAGE = "reports/evaluation.html"

_LEAST_S = 30.0  # between two pages
_GATHER_S = 1.0  # outcomes often come several at once
_SHARE = 0.05  # of the time, at most, goes into making pages


class LiveReport:
    """Collects outcomes, tells MLflow of each, and keeps the page in the storage and in MLflow up to date.

    Args:
        run: the run's folder in storage.
        name: of the run.
        tracker: of the run.
        least_s: seconds between two pages, at least.
    """

    def __init__(self, run: Storage, name: str, tracker: Tracker, least_s: float = _LEAST_S) -> None:
        self._run, self._name, self._tracker, self._least_s = run, name, tracker, least_s
        self._ledger = Ledger(run)
        self._examples: dict[EvaluationKey, Sequence[Example]] = {}
        self._lock = threading.Lock()
        self._outcomes: dict[EvaluationKey, Outcome] = {}
        self._unfinished: Callable[[], int] = lambda: 0
        self._news = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="report", daemon=True)

    @property
    def address(self) -> str:
        """Of the page."""
        return self._run.url_of(PAGE)

    def add(self, outcome: Outcome) -> None:
        """Takes an outcome, done or given up; may be told the same again. Returns at once."""
        entry = outcome.entry(self._run)
        self._tracker.evaluation(replace(entry, tags={**entry.tags, "report": self.address}))
        with self._lock:
            self._outcomes[outcome.key] = outcome
        self._news.set()

    def outcomes(self) -> list[Outcome]:
        """All so far, by step and task."""
        with self._lock:
            found = list(self._outcomes.values())
        return sorted(found, key=lambda one: (one.step, one.task, one.version))

    def start(self, unfinished: Callable[[], int]) -> None:
        """Begins to write, in a thread of its own; ``unfinished``: counts evaluations that are yet to finish."""
        self._unfinished = unfinished
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what it has not written yet, :meth:`write` does."""
        self._stop.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()

    def write(self) -> None:
        """Writes the page of all outcomes so far, if there are any.

        Raises:
            StorageFault, UserError: the storage cannot be reached, or refuses.
        """
        outcomes = self.outcomes()
        if not outcomes:
            return
        page = html_report(
            outcomes,
            self._name,
            examples=self._examples_of,
            address=lambda outcome, name: self._run.url_of(self._ledger.file_path(outcome, name)),
            links=self._links(),
            unfinished=self._unfinished(),
        )
        self._run.write_bytes(PAGE, page.encode("utf-8", "replace"))
        self._tracker.report(page, text_report(outcomes))

    def _links(self) -> dict[str, str]:
        links = {"run": self._run.url}
        handle = self._tracker.handle
        if handle is not None:
            links["MLflow"] = run_page(handle)
        return links

    def _examples_of(self, outcome: Outcome) -> Sequence[Example]:
        """They never change; those of the checkpoints that were shown before are let go."""
        if outcome.key not in self._examples:
            for key in [key for key in self._examples if key.task == outcome.task][:-1]:
                del self._examples[key]
            try:
                self._examples[outcome.key] = self._ledger.examples(outcome)
            except BadData as error:
                log.warning("the report lacks examples: %s", error)
                self._examples[outcome.key] = ()
        return self._examples[outcome.key]

    def _loop(self) -> None:
        while True:
            self._news.wait()
            if self._stop.wait(min(_GATHER_S, self._least_s)):
                return
            self._news.clear()
            began = time.monotonic()
            try:
                self.write()
            except (OSError, UserError) as error:  # the last page is written by who waits for it
                log.warning("the report could not be written, next try later: %s", error)
                self._news.set()
            self._stop.wait(max(self._least_s, (time.monotonic() - began) / _SHARE))
