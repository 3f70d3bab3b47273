"""The ``evaluate:`` block of a job: which tasks, on which data, after which checkpoints, and within what
limits.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.evaluation.tasks.base import After
from pipeline.evaluation.tasks.registry import AnyTask


class EvaluateConfig(BaseModel):
    """What is evaluated, and when. A task may say otherwise for itself.

    Attributes:
        tasks: run for each checkpoint that is due.
        after: which checkpoints are due: every one, those at the end of a stage, or the last alone.
        concurrent: evaluations at once; each takes one ``evaluation`` slot of the cluster.
        attempts: how often an evaluation is tried before it is given up.
        timeout_s: limit of one attempt, seconds; then its process is killed.
        gpus: GPUs (or a share of one) for each evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: list[AnyTask] = Field(default_factory=list)
    after: After = "checkpoint"
    concurrent: Annotated[int, Field(ge=1)] = 1
    attempts: Annotated[int, Field(ge=1)] = 2
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    gpus: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"evaluate.tasks: two tasks are named {name!r}")
        return self
