"""The ``evaluate:`` block of a job: which tasks, on which data, after which checkpoints, and within what
limits.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Raised when a task's numbers change for the same checkpoint and data: its old results no longer count.
TASK_VERSIONS = {"retrieval": 1}

# What changes the cost of an evaluation, not its numbers.
_COST_ONLY = {"name", "batch_size", "cache_mb"}


class TaskConfig(BaseModel):
    """One evaluation of a checkpoint.

    Attributes:
        name: of the task in the ledger, in MLflow and in the report.
        kind: what is measured; ``retrieval``: captions <-> pictures or clips of ``dataset``, zero-shot.
        dataset: name of one of the job's ``datasets`` (held-out pairs).
        frames: frames taken from a clip; a dataset of images ignores it.
        resolution: side in pixels; by default the checkpoint's own.
        limit: only the first so many samples.
        rerank: so many candidates of each query are ranked again by the matching head; 0: none.
        batch_size: samples, or pairs, in one pass.
        cache_mb: memory for encoder states that are waiting for their pairs; what does not fit is encoded
            again.
        bad_limit: share of samples that may be unreadable before the evaluation fails.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=80)]
    kind: Literal["retrieval"] = "retrieval"
    dataset: str
    frames: Annotated[int, Field(ge=1)] = 4
    resolution: Annotated[int, Field(gt=0)] | None = None
    limit: Annotated[int, Field(ge=2)] | None = None
    rerank: Annotated[int, Field(ge=0)] = 16
    batch_size: Annotated[int, Field(ge=1)] = 64
    cache_mb: Annotated[int, Field(ge=1)] = 512
    bad_limit: Annotated[float, Field(ge=0, le=1)] = 0.01

    def version(self, dataset_digest: str) -> str:
        """``<version of the kind>-<8 hex digits>``: changes with whatever changes the numbers."""
        decisive = self.model_dump(mode="json", exclude=_COST_ONLY) | {"digest": dataset_digest}
        text = json.dumps(decisive, sort_keys=True)
        return f"{TASK_VERSIONS[self.kind]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class EvaluateConfig(BaseModel):
    """What is evaluated, and when.

    Attributes:
        tasks: run for each checkpoint that is due.
        after: which checkpoints are due: every one, those at the end of a stage, or the last alone.
        concurrent: evaluations at once; each takes one ``evaluation`` slot of the cluster.
        attempts: how often an evaluation is tried before it is given up.
        timeout_s: limit of one attempt, seconds; then its process is killed.
        gpus: GPUs (or a share of one) for each evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: list[TaskConfig] = Field(default_factory=list)
    after: Literal["checkpoint", "stage", "end"] = "checkpoint"
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
