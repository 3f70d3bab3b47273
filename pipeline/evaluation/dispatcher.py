"""Runs the evaluations of new checkpoints beside the training, from a thread of the driver.

    storage: checkpoints ---\
                             >-- dispatcher --> actors (own Ray resource) --> ledger --> on_result (MLflow)
    storage: ledger --------/

What is to do follows from the storage alone, so a killed driver loses nothing. Actors live long: importing
torch and the model costs seconds. They write the numbers to the ledger themselves; the driver then reports
them, and reports all again at the next start, in case it died in between (reporting must be idempotent).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from pipeline.evaluation.tasks.base import TaskConfig
from sharding.errors import BadData, StorageFault

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
    """One actor; ``reply`` is awaited: that of its start, or of its ``assignment``. None: it is idle."""

    actor: Any
    reply: Any
    since: float
    assignment: Assignment | None = None
    ready: bool = False


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
        retry_failed: try what was given up in an earlier life once more.
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
        retry_failed: bool = False,
        runner: RunnerFactory = Runner,
        checkpoints: Callable[[Storage], Sequence[Checkpoint]] | None = None,
        poll_s: float = 3.0,
    ) -> None:
        if checkpoints is None:
            from pipeline.training.checkpoints import list_checkpoints

            checkpoints = list_checkpoints
        self._run, self._config, self._storage, self._datasets = run, config, storage, datasets
        self._seed = seed
        self._tokenizer, self._on_result, self._runner = tokenizer, on_result, runner
        self._list, self._poll_s = checkpoints, poll_s
        self._digests = {task.name: task.data_digest(storage, datasets) for task in config.tasks}
        self._ledger = Ledger(run)
        if retry_failed:
            self._ledger.retry_failed()
        self._slots: list[_Slot] = []
        self._open: list[tuple[EvaluationKey, Checkpoint, TaskConfig, EvaluationState]] = []
        self._counts = EvaluationCounts(0, 0, 0, 0)
        self._reported: set[EvaluationKey] = set()
        self._looked = float("-inf")
        self._replayed = False
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

        Looks at the storage afresh: a checkpoint committed a moment ago is pinned already.
        """
        states = self._ledger.states()
        return {
            checkpoint.step
            for checkpoint in self._due(self._list(self._run))
            for task in self._config.tasks
            if states.get(self._key(checkpoint, task), EvaluationState()).open
        }

    def outcomes(self) -> list[Outcome]:
        """All outcomes of the configured tasks in their present version, by step."""
        versions = {(task.name, self._version(task)) for task in self._config.tasks}
        return [o for o in self._ledger.outcomes() if (o.task, o.version) in versions]

    def best(self, metric: str) -> Outcome | None:
        """The outcome with the best ``TASK/METRIC`` so far."""
        return best_outcome(self.outcomes(), metric)

    def best_step(self, metric: str) -> int | None:
        """The step of :meth:`best`."""
        best = self.best(metric)
        return None if best is None else best.step

    # What is to do.

    def _version(self, task: TaskConfig) -> str:
        return task.version(self._digests[task.name])

    def _key(self, checkpoint: Checkpoint, task: TaskConfig) -> EvaluationKey:
        return EvaluationKey(checkpoint.digest[:16], task.name, self._version(task))

    def _due(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        if self._config.after == "checkpoint":
            return list(checkpoints)
        last = list(checkpoints[-1:]) if self._over else []
        if self._config.after == "end":
            return last
        ends = [checkpoint for checkpoint in checkpoints if checkpoint.record.get("stage_end")]
        return ends + [checkpoint for checkpoint in last if checkpoint not in ends]

    def _look(self) -> None:
        """Compares checkpoints with the ledger; reports outcomes that have not been reported in this life."""
        over = self._over  # before the listing: only then it holds all there will ever be
        checkpoints = self._due(self._list(self._run))
        states = self._ledger.states()
        if not self._replayed:
            for outcome in self.outcomes():
                self._report(outcome)
            self._replayed = True
        running = {slot.assignment.key for slot in self._slots if slot.assignment is not None}
        self._open, done, failed = [], 0, 0
        for checkpoint in checkpoints:
            for task in self._config.tasks:
                key = self._key(checkpoint, task)
                state = states.get(key, EvaluationState())
                done, failed = done + state.done, failed + (state.failed and not state.done)
                if not state.open:
                    if key not in self._reported:
                        self._report_key(key)
                elif key not in running:
                    self._open.append((key, checkpoint, task, state))
        with self._changed:
            self._settled = over and not running and not self._open
            self._counts = EvaluationCounts(done, failed, len(running), len(self._open))
            self._changed.notify_all()

    def _report_key(self, key: EvaluationKey) -> None:
        try:
            self._report(self._ledger.outcome(key))
        except BadData as error:
            self._reported.add(key)
            log.error("%s", error)

    def _report(self, outcome: Outcome) -> None:
        if outcome.key not in self._reported:
            self._reported.add(outcome.key)
            self._on_result(outcome)

    # The thread.

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    if self._collect() or time.monotonic() - self._looked >= self._poll_s:
                        self._looked = time.monotonic()
                        self._look()
                    self._assign()
                except StorageFault as error:
                    log.warning("evaluations wait for the storage: %s", error)
                    self._stop.wait(self._poll_s)
                self._wake.wait(_TICK_S)
                self._wake.clear()
        except BaseException as error:  # raised again by wait(): a fault here must not end the training
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
            elif slot.assignment is not None and late > self._config.timeout_s:
                self._discard(slot)
                self._fail(slot, Failure(f"took longer than {self._config.timeout_s:g} s", permanent=False))
                changed = True
            elif slot.assignment is None and late > _PATIENCE_S and not self._warned_waiting:
                self._warned_waiting = True
                log.warning('evaluations wait for a free "%s" slot of the cluster', RESOURCE)
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
            slot.assignment = None

    def _fail(self, slot: _Slot, failure: Failure) -> None:
        assignment = slot.assignment
        assert assignment is not None
        slot.assignment = None  # first: if the storage fails now, the evaluation is simply open again
        tried = self._ledger.states().get(assignment.key, EvaluationState()).failures + 1
        give_up = failure.permanent or tried >= self._config.attempts
        outcome = assignment.outcome(cause=failure.cause)
        self._ledger.fail(outcome, give_up=give_up)
        log.error(
            "evaluation %s of step %d failed (%s): %s",
            outcome.task,
            outcome.step,
            "given up" if give_up else f"attempt {tried} of {self._config.attempts}",
            failure.cause,
        )

    def _assign(self) -> None:
        for slot in self._slots:
            if self._open and slot.assignment is None and slot.ready:
                self._begin(slot)
        # One more actor if there is work that no actor, ready or about to be, would take.
        free = sum(slot.assignment is None for slot in self._slots)
        if len(self._open) > free and len(self._slots) < self._config.concurrent:
            self._slots.append(self._new_slot())

    def _begin(self, slot: _Slot) -> None:
        key, checkpoint, task, state = self._open.pop(0)
        attempt = self._ledger.claim(key, state.attempts)
        slot.assignment = Assignment(
            run=self._run,
            checkpoint=checkpoint,
            checkpoint_record=checkpoint_record(checkpoint),
            task=task,
            version=key.version,
            storage=self._storage,
            dataset=None if task.dataset_name is None else self._datasets[task.dataset_name],
            data_digest=self._digests[task.name],
            tokenizer=self._tokenizer,
            seed=self._seed,
            attempt=attempt,
            started=time.time(),
        )
        slot.since = time.monotonic()
        slot.reply = slot.actor.evaluate.remote(slot.assignment)
        with self._changed:
            counts = self._counts
            self._counts = counts._replace(running=counts.running + 1, waiting=max(0, counts.waiting - 1))

    def _new_slot(self) -> _Slot:
        import ray

        # No CPUs of Ray's: they all belong to the training workers, and the evaluation would wait for ever.
        actor = (
            ray.remote(EvaluationActor)
            .options(num_cpus=0, num_gpus=self._config.gpus, resources={RESOURCE: 1}, max_restarts=0)
            .remote(self._runner)
        )
        return _Slot(actor, actor.ready.remote(), time.monotonic())

    def _discard(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._kill(slot)

    def _kill(self, slot: _Slot) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(slot.actor)
