"""What is due of each task, and what goes first. Pure functions of the configuration and the checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.ledger import EvaluationKey, EvaluationState
from pipeline.evaluation.tasks.base import After, TaskConfig

if TYPE_CHECKING:
    from pipeline.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Limits:
    """When a task runs and within what, its own words filled up with those of the ``evaluate`` block."""

    after: After
    attempts: int
    timeout_s: float
    gpus: float


@dataclass(frozen=True)
class Due:
    """One evaluation that waits."""

    key: EvaluationKey
    checkpoint: Checkpoint
    task: TaskConfig
    limits: Limits
    state: EvaluationState


class Schedule:
    """Which checkpoints are due for which task.

    Args:
        config: the ``evaluate`` block.
        only: names of the tasks that run; None: all.
        every_checkpoint: whatever a task's ``after`` says, all checkpoints are due.
    """

    def __init__(
        self, config: EvaluateConfig, *, only: Collection[str] | None = None, every_checkpoint: bool = False
    ) -> None:
        self.tasks = [task for task in config.tasks if only is None or task.name in only]
        self._places = {task.name: place for place, task in enumerate(config.tasks)}
        self._config, self._every = config, every_checkpoint

    def limits(self, task: TaskConfig) -> Limits:
        """What holds for a task."""
        block = self._config
        return Limits(
            after=task.after or block.after,
            attempts=task.attempts or block.attempts,
            timeout_s=task.timeout_s or block.timeout_s,
            gpus=block.gpus if task.gpus is None else task.gpus,
        )

    def due(self, task: TaskConfig, checkpoints: Sequence[Checkpoint], *, over: bool) -> list[Checkpoint]:
        """The checkpoints that a task is to be run on; not those between two, written on leaving.

        Args:
            checkpoints: all there are, by step.
            over: whether no more will come: then the last of them is the end.
        """
        after = "checkpoint" if self._every else self.limits(task).after
        checkpoints = [checkpoint for checkpoint in checkpoints if not checkpoint.record.get("interim")]
        if after == "checkpoint":
            return checkpoints
        last = list(checkpoints[-1:]) if over else []
        if after == "end":
            return last
        ends = [checkpoint for checkpoint in checkpoints if checkpoint.record.get("stage_end")]
        return ends + [checkpoint for checkpoint in last if checkpoint not in ends]

    def ordered(self, waiting: Iterable[Due]) -> list[Due]:
        """What waits, the first to run first.

        By priority; of equals, what has not failed yet before what has, so that one bad checkpoint holds nothing
        up; then the newest checkpoint, whose numbers say how the training is doing now; its tasks in the order of
        the configuration, one after the other, as they share the loaded model.
        """
        return sorted(
            waiting,
            key=lambda due: (
                -due.task.priority,
                due.state.failures,
                -due.checkpoint.step,
                self._places[due.task.name],
            ),
        )
