"""The process that evaluates: takes an assignment, writes the numbers to the ledger, answers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.ledger import EvaluationKey, Ledger, Outcome
from pipeline.evaluation.result import TaskResult
from pipeline.evaluation.statistics import bootstrap_intervals
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.patience import patiently
from sharding.errors import BadData, BadDataLimit, StorageFault

if TYPE_CHECKING:
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage

_NICENESS = 5  # gives way to the training where both share cores


@dataclass(frozen=True)
class Assignment:
    """One attempt at one evaluation; ``started`` in seconds since the epoch."""

    run: Storage
    checkpoint: Checkpoint
    checkpoint_record: dict[str, Any]
    task: TaskConfig
    version: str
    storage: Storage
    dataset: Storage | None
    data_digest: str
    tokenizer: str
    seed: int
    attempt: int
    started: float

    @property
    def key(self) -> EvaluationKey:
        """Its place in the ledger."""
        return EvaluationKey(self.checkpoint.digest[:16], self.task.name, self.version)

    def outcome(self, result: TaskResult | None = None, cause: str | None = None) -> Outcome:
        """The record of its end, now: with what was found, or the cause for which nothing was."""
        found: dict[str, Any] = {}
        if result is not None:
            found["metrics"] = result.metrics
            found["intervals"] = bootstrap_intervals(result.families, seed=self.seed, task=self.task.name)
            found["details"] = result.details
        return Outcome(
            checkpoint=self.checkpoint_record,
            task=self.task.name,
            version=self.version,
            dataset={"name": self.task.dataset_name or self.task.name, "digest": self.data_digest},
            started=self.started,
            finished=max(self.started, time.time()),  # the driver's clock may differ, or have been set
            attempt=self.attempt,
            kind=self.task.kind,
            settings=self.task.decisive(),
            seed=self.seed,
            cause=cause,
            **found,
        )


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed; ``permanent`` when trying again must end the same way."""

    cause: str
    permanent: bool


RunnerFactory = Callable[[], Callable[[Assignment], TaskResult]]


class EvaluationActor:
    """Evaluates one checkpoint after the other in one process, with one thread.

    Args:
        runner: makes the function that evaluates; called once, here, as it imports much.
    """

    def __init__(self, runner: RunnerFactory) -> None:
        import ray

        os.nice(_NICENESS)
        if not ray.get_gpu_ids():
            # Ray hides no GPUs from a process that asked for none; the training needs their memory.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._evaluate = runner()

    def ready(self) -> bool:
        """Answers once the process is up."""
        return True

    def evaluate(self, assignment: Assignment) -> Outcome | Failure:
        """Runs one attempt. Every error is an answer: the caller decides whether it is tried again."""
        try:
            result = self._evaluate(assignment)
            finish = partial(Ledger(assignment.run).finish, assignment.outcome(result), result)
            # What took minutes to find is not given up for a disk that is full for one.
            return patiently(finish, f"evaluation {assignment.task.name}")
        except Exception as error:  # noqa: BLE001 - whatever fails is recorded with its cause, and reported
            # Broken data and the user's mistakes (ValueError) are there at the next attempt too.
            permanent = isinstance(error, BadData | BadDataLimit | ValueError | NotImplementedError)
            return Failure(_cause(error), permanent and not isinstance(error, StorageFault))


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    if isinstance(error, BadData | BadDataLimit | ValueError | StorageFault) and text:
        return text
    place = ""
    if error.__traceback__ is not None:
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        place = f" at {os.path.basename(last.tb_frame.f_code.co_filename)}:{last.tb_lineno}"
    return f"{type(error).__name__}: {text}{place}"
