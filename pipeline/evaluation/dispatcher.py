"""Runs the evaluations of new checkpoints beside the training, from a thread of the driver.

    storage: checkpoints ---\
                             >-- dispatcher --> actors (own Ray resource) --> ledger --> on_result (MLflow)
    storage: ledger --------/

What is to do follows from the storage alone, so a killed driver loses nothing. Actors live long: importing
torch and the model costs seconds. They write the numbers to the ledger themselves; the driver then reports
them, and reports all again at the next start, in case it died in between (reporting must be idempotent).

A task whose data cannot be used is marked failed with the cause on every checkpoint that is due; the others go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.evaluation.actor import Assignment, EvaluationActor, Failure, RunnerFactory
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.ledger import (
    EvaluationKey,
    EvaluationState,
    Ledger,
    Outcome,
    best_outcome,
    checkpoint_record,
)
from pipeline.evaluation.runner import Runner
from pipeline.evaluation.schedule import Due, Schedule
from pipeline.evaluation.versions import TaskVersions
from sharding.errors import BadData, StorageFault, UserError

if TYPE_CHECKING:
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage

log = logging.getLogger("pipeline.evaluation")

RESOURCE = "evaluation"
_TICK_S = 0.2
_PATIENCE_S = 60.0
_STARTS = 3  # in a row that may fail, before something must be wrong with the cluster or the code


class EvaluationCounts(NamedTuple):
    """How many evaluations of the checkpoints that are due are in which state."""

    done: int
    failed: int
    running: int
    waiting: int


@dataclass
class _Slot:
    """One actor; ``reply`` is awaited: that of its start, or of its work on ``due``. None: it is idle."""

    actor: Any
    gpus: float
    reply: Any
    since: float
    due: Due | None = None
    assignment: Assignment | None = None
    ready: bool = False

    @property
    def idle(self) -> bool:
        return self.ready and self.assignment is None


class Dispatcher:
    """Evaluates checkpoints as they appear.

    Args:
        run: the run's folder in storage.
        config: the tasks, and the limits.
        storage: the job's; addresses in the tasks' blocks are resolved against it.
        datasets: the job's prepared datasets by name.
        tokenizer: see :meth:`model.GLSCLProcessor.from_config`.
        seed: of the run.
        on_result: told each outcome, done or given up, and at the start all earlier ones; called from the
            dispatcher's thread, must not block for long.
        after_results: called, from the same thread, whenever it was told all that there are at the moment.
        retry_failed: try what is due and was given up in an earlier life once more.
        only: names of the tasks to run; None: all.
        every_checkpoint: run them on all checkpoints, not on those alone that the configuration says.
        runner: makes, in the actor, the function that evaluates.
        checkpoints: lists the committed checkpoints of a run.
        poll_s: seconds between two looks at the storage.
    """

    def __init__(
        self,
        run: Storage,
        config: EvaluateConfig,
        storage: Storage,
        datasets: Mapping[str, Storage],
        *,
        tokenizer: str = "builtin",
        seed: int = 0,
        on_result: Callable[[Outcome], None] = lambda outcome: None,
        after_results: Callable[[], None] = lambda: None,
        retry_failed: bool = False,
        only: Collection[str] | None = None,
        every_checkpoint: bool = False,
        runner: RunnerFactory = Runner,
        checkpoints: Callable[[Storage], Sequence[Checkpoint]] | None = None,
        poll_s: float = 3.0,
    ) -> None:
        if checkpoints is None:
            from pipeline.training.checkpoints import list_checkpoints

            checkpoints = partial(list_checkpoints, known={})  # of this run only
        self._run, self._concurrent, self._storage, self._datasets = run, config.concurrent, storage, datasets
        self._seed = seed
        self._tokenizer, self._on_result, self._runner = tokenizer, on_result, runner
        self._after_results, self._news = after_results, False
        self._list, self._poll_s = checkpoints, poll_s
        self._schedule = Schedule(config, only=only, every_checkpoint=every_checkpoint)
        self._versions = TaskVersions(config.tasks, storage, datasets)
        self._ledger = Ledger(run)
        self._retry_failed = retry_failed
        self._retried: set[EvaluationKey] = set()
        self._slots: list[_Slot] = []
        self._open: list[Due] = []
        self._counts = EvaluationCounts(0, 0, 0, 0)
        self._reported: set[EvaluationKey] = set()
        self._looked = float("-inf")
        self._replayed = 0  # how many tasks' earlier outcomes are reported
        self._over = False  # no checkpoint will be added any more
        self._settled = False  # and all that are there are finished
        self._failed_starts = 0
        self._error: BaseException | None = None
        self._warned_waiting = False
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="evaluations", daemon=True)

    def start(self) -> None:
        """Begins to look for checkpoints; returns at once."""
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until every checkpoint that is there now is evaluated or given up. To be called after the
        training.

        Returns:
            False when the time was over first; calling again goes on waiting.

        Raises:
            Exception: the dispatcher itself broke (not an evaluation: those end as outcomes).
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            if not self._over:
                self._over = True
                self._looked = float("-inf")  # look at once
                self._wake.set()
            while not self._settled and self._error is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
            if self._error is not None:
                raise self._error
        return True

    def stop(self) -> None:
        """Ends the thread and the actors; what was running is open again at the next start."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)
        for slot in self._slots:
            self._kill(slot)
        self._slots.clear()

    def counts(self) -> EvaluationCounts:
        """Where the evaluations stand, for a progress display."""
        return self._counts

    def pinned(self) -> set[int]:
        """Steps whose checkpoints retention must keep: an evaluation of theirs is due and not finished.

        Looks at the storage afresh: a checkpoint committed a moment ago is pinned already. All are, while it is not
        yet known what some task is measured on: what is done, and which is the best, cannot be told before.
        """
        known = self._versions.complete  # before the listings
        checkpoints = self._list(self._run)
        if not known:
            return {checkpoint.step for checkpoint in checkpoints}
        return {due.checkpoint.step for due in self._all_due(checkpoints, over=self._over) if due.state.open}

    def outcomes(self) -> list[Outcome]:
        """All outcomes of the configured tasks in their present version, by step."""
        present = self._versions.present()
        return [o for o in self._ledger.outcomes() if (o.task, o.version) in present]

    def best(self, metric: str) -> Outcome | None:
        """The outcome with the best ``TASK/METRIC`` so far."""
        return best_outcome(self.outcomes(), metric)

    def best_step(self, metric: str) -> int | None:
        """The step of :meth:`best`."""
        best = self.best(metric)
        return None if best is None else best.step

    # What is to do.

    def _all_due(self, checkpoints: Sequence[Checkpoint], *, over: bool) -> list[Due]:
        """Every evaluation that the tasks known so far ask for, finished or not, with its state in the ledger."""
        states = self._ledger.states()
        found = []
        for task in self._schedule.tasks:
            known = self._versions.get(task)
            if known is None:
                continue
            for checkpoint in self._schedule.due(task, checkpoints, over=over):
                key = EvaluationKey(checkpoint.digest[:16], task.name, known.version)
                state = states.get(key, EvaluationState())
                found.append(Due(key, checkpoint, task, self._schedule.limits(task), state))
        return found

    def _look(self) -> None:
        """Compares checkpoints with the ledger; reports outcomes that have not been reported in this life."""
        over, complete = self._over, self._versions.complete  # before the listing: only then it holds all
        known = len(self._versions.present())
        due = self._all_due(self._list(self._run), over=over)
        if known > self._replayed:
            for outcome in self.outcomes():
                self._report(outcome)
            self._replayed = known
        running = {slot.assignment.key for slot in self._slots if slot.assignment is not None}
        waiting, done, failed = [], 0, 0
        for one in due:
            state = self._settle(one)
            done, failed = done + state.done, failed + (state.failed and not state.done)
            if not state.open:
                if one.key not in self._reported:
                    self._report_key(one.key)
            elif one.key not in running:
                waiting.append(one)
        if self._news:
            self._after_results()
            self._news = False
        self._open = self._schedule.ordered(waiting)
        with self._changed:
            self._settled = over and complete and not running and not self._open
            self._counts = EvaluationCounts(done, failed, len(running), len(self._open))
            self._changed.notify_all()

    def _settle(self, due: Due) -> EvaluationState:
        """The state of an evaluation, once what is known without running it is in the ledger."""
        state = due.state
        if self._retry_failed and due.key not in self._retried:
            if state.failed and not state.done:
                self._ledger.reopen(due.key)
                state.failed, state.failures = False, 0
            self._retried.add(due.key)
        known = self._versions.get(due.task)
        assert known is not None
        if known.fault is not None and state.open:
            attempt = self._ledger.claim(due.key, state.attempts)
            self._ledger.fail(self._assignment(due, attempt).outcome(cause=known.fault), give_up=True)
            state.failed = True
        return state

    def _report_key(self, key: EvaluationKey) -> None:
        try:
            self._report(self._ledger.outcome(key))
        except BadData as error:
            self._reported.add(key)
            log.error("%s", error)

    def _report(self, outcome: Outcome) -> None:
        if outcome.key not in self._reported:
            self._reported.add(outcome.key)
            self._news = True
            self._on_result(outcome)

    # The thread.

    def _loop(self) -> None:
        told = ""
        try:
            while not self._stop.is_set():
                try:
                    if self._collect() or time.monotonic() - self._looked >= self._poll_s:
                        self._looked = time.monotonic()
                        self._look()
                    self._assign()
                    if self._versions.learn():  # one at a time: it may take long
                        self._looked = float("-inf")
                        continue
                except StorageFault as error:
                    if str(error) != told:
                        log.warning("evaluations wait for the storage: %s", error)
                    told = str(error)
                    self._stop.wait(self._poll_s)
                else:
                    told = ""
                self._wake.wait(_TICK_S)
                self._wake.clear()
        except BaseException as error:  # raised again by wait(): a fault here must not end the training
            if isinstance(error, UserError | OSError):  # the storage refuses
                log.error("evaluations have stopped; the training goes on: %s", error)
            else:
                log.exception("evaluations have stopped; the training goes on")
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _collect(self) -> bool:
        """Takes what the actors have finished, and kills those whose time is over; True if anything
        changed.
        """
        import ray

        changed = False
        for slot in list(self._slots):
            late = time.monotonic() - slot.since
            if slot.reply is None:
                continue
            if ray.wait([slot.reply], timeout=0)[0]:
                self._take(slot)
                changed = True
            elif slot.due is not None and late > slot.due.limits.timeout_s:
                self._discard(slot)
                cause = f"took longer than {slot.due.limits.timeout_s:g} s"
                self._fail(slot, Failure(cause, permanent=False))
                changed = True
            elif slot.due is None and late > _PATIENCE_S and not self._warned_waiting:
                self._warned_waiting = True
                needs = f" and {slot.gpus:g} GPUs" if slot.gpus else ""
                log.warning('evaluations wait for a free "%s" slot%s of the cluster', RESOURCE, needs)
        return changed

    def _take(self, slot: _Slot) -> None:
        import ray

        reply, slot.reply = slot.reply, None
        try:
            answer = ray.get(reply)
        except ray.exceptions.RayError as error:
            cause = f"the evaluation's process died: {' '.join(str(error).split())[:300]}"
            self._discard(slot)
            if slot.assignment is not None:
                self._fail(slot, Failure(cause, permanent=False))
                return
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise RuntimeError(f"no evaluation process could be started: {cause}") from error
            return
        if slot.assignment is None:
            slot.ready = True
            self._failed_starts = 0
        elif isinstance(answer, Failure):
            self._fail(slot, answer)
        else:
            log.info("evaluated %s of step %d", answer.task, answer.step)
            slot.assignment = slot.due = None

    def _fail(self, slot: _Slot, failure: Failure) -> None:
        assignment, due = slot.assignment, slot.due
        assert assignment is not None
        assert due is not None
        slot.assignment = slot.due = (
            None  # first: if the storage fails now, the evaluation is simply open again
        )
        tried = self._ledger.states().get(assignment.key, EvaluationState()).failures + 1
        give_up = failure.permanent or tried >= due.limits.attempts
        outcome = assignment.outcome(cause=failure.cause)
        self._ledger.fail(outcome, give_up=give_up)
        log.error(
            "evaluation %s of step %d failed (%s): %s",
            outcome.task,
            outcome.step,
            "given up" if give_up else f"attempt {tried} of {due.limits.attempts}",
            failure.cause,
        )

    def _assign(self) -> None:
        """Gives what waits to actors, in order; starts one where none, ready or about to be, would take it."""
        coming = Counter(slot.gpus for slot in self._slots if not slot.ready)
        for due in list(self._open):
            idle = [slot for slot in self._slots if slot.idle]
            if not idle and len(self._slots) >= self._concurrent:
                return
            wanted = due.limits.gpus
            fitting = next((slot for slot in idle if slot.gpus == wanted), None)
            if fitting is not None:
                self._open.remove(due)
                self._begin(fitting, due)
            elif coming[wanted]:
                coming[wanted] -= 1
            else:
                if len(self._slots) >= self._concurrent:
                    self._discard(idle[0])  # has other GPUs than are needed next
                self._slots.append(self._new_slot(wanted))

    def _assignment(self, due: Due, attempt: int) -> Assignment:
        task, known = due.task, self._versions.get(due.task)
        assert known is not None
        return Assignment(
            run=self._run,
            checkpoint=due.checkpoint,
            checkpoint_record=checkpoint_record(due.checkpoint),
            task=task,
            version=known.version,
            storage=self._storage,
            dataset=None if task.dataset_name is None else self._datasets.get(task.dataset_name),
            data_digest=known.data_digest,
            tokenizer=self._tokenizer,
            seed=self._seed,
            attempt=attempt,
            started=time.time(),
        )

    def _begin(self, slot: _Slot, due: Due) -> None:
        attempt = self._ledger.claim(due.key, due.state.attempts)
        slot.due, slot.assignment = due, self._assignment(due, attempt)
        slot.since = time.monotonic()
        slot.reply = slot.actor.evaluate.remote(slot.assignment)
        with self._changed:
            counts = self._counts
            self._counts = counts._replace(running=counts.running + 1, waiting=max(0, counts.waiting - 1))

    def _new_slot(self, gpus: float) -> _Slot:
        import ray

        # No CPUs of Ray's: they all belong to the training workers, and the evaluation would wait for ever.
        actor = (
            ray.remote(EvaluationActor)
            .options(num_cpus=0, num_gpus=gpus, resources={RESOURCE: 1}, max_restarts=0)
            .remote(self._runner)
        )
        return _Slot(actor, gpus, actor.ready.remote(), time.monotonic())

    def _discard(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._kill(slot)

    def _kill(self, slot: _Slot) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(slot.actor)
