"""The ``evaluate:`` block of a job: which tasks, on which data, after which checkpoints, and within what
limits.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.evaluation.tasks.base import After
from pipeline.evaluation.tasks.registry import AnyTask


class Regression(BaseModel):
    """When a metric has fallen too far below the best checkpoint so far.

    Attributes:
        metric: ``TASK/METRIC``, one that is measured on items.
        drop: how far it may fall, in the metric's own unit (0.05 is five points of a share). A larger fall counts
            only where the 95 % interval of the paired difference excludes zero.
        action: ``warn``, or ``stop`` the training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+/.+$")]
    drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    action: Literal["warn", "stop"] = "warn"

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.metric.partition("/")[0]

    @property
    def name(self) -> str:
        """Name of the metric in the task."""
        return self.metric.partition("/")[2]


class EvaluateConfig(BaseModel):
    """What is evaluated, and when. A task may say otherwise for itself.

    Attributes:
        tasks: run for each checkpoint that is due.
        after: which checkpoints are due: every one, those at the end of a stage, or the last alone.
        concurrent: evaluations at once; each takes one ``evaluation`` slot of the cluster.
        attempts: how often an evaluation is tried before it is given up.
        timeout_s: limit of one attempt, seconds; then its process is killed.
        gpus: GPUs (or a share of one) for each evaluation.
        regression: falls of a metric that warn, or stop the training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: list[AnyTask] = Field(default_factory=list)
    after: After = "checkpoint"
    concurrent: Annotated[int, Field(ge=1)] = 1
    attempts: Annotated[int, Field(ge=1)] = 2
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    regression: list[Regression] = Field(default_factory=list)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"evaluate.tasks: two tasks are named {name!r}")
        for rule in self.regression:
            if rule.task not in names:
                known = ", ".join(names) or "there are none"
                raise ValueError(
                    f"evaluate.regression: got {rule.metric!r}; must be TASK/METRIC with one of the evaluate "
                    f"tasks ({known})"
                )
        return self
