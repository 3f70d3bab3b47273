"""The block of a retrieval task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.fine_tuning.config import RetrievalFineTuning, wait_for_the_end
from sharding.manifest import load_manifest

if TYPE_CHECKING:
    from sharding.storage import Storage


class RetrievalTask(TaskConfig):
    """Captions <-> pictures or clips of a dataset, zero-shot or fine-tuned (GLSCL, section 6).

    Attributes:
        dataset: name of one of the job's ``datasets`` (held-out pairs).
        frames: frames taken from a clip; a dataset of images ignores it.
        rerank: so many candidates of each query, the best by ITC, are ranked again by the matching head; 0:
            none; ``all``: every caption is paired with every picture (small sets).
        cache_mb: memory for encoder states that wait for their pairs; what does not fit is encoded again.
        fine_tune: the checkpoint is fine-tuned first, on another of the job's datasets; None: zero-shot.
    """

    VERSION: ClassVar[int] = 2

    COST_ONLY: ClassVar[frozenset[str]] = TaskConfig.COST_ONLY | {"cache_mb"}

    kind: Literal["retrieval"] = "retrieval"
    dataset: str
    frames: Annotated[int, Field(ge=1)] = 4
    rerank: Annotated[int, Field(ge=0)] | Literal["all"] = 16
    cache_mb: Annotated[int, Field(ge=1)] = 512

    fine_tune: RetrievalFineTuning | None = None

    @model_validator(mode="before")
    @classmethod
    def _last(cls, block: Any) -> Any:
        return wait_for_the_end(
            block, fine_tuned=isinstance(block, dict) and block.get("fine_tune") is not None
        )

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        if self.fine_tune is not None and self.fine_tune.dataset == self.dataset:
            raise ValueError(f"fine_tune.dataset: {self.dataset} is what is measured on: not held out")
        return self

    @property
    def fine_tuning(self) -> RetrievalFineTuning | None:
        return self.fine_tune

    @property
    def dataset_name(self) -> str | None:
        return self.dataset

    @property
    def frames_taken(self) -> int:
        return self.frames

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        digest = load_manifest(datasets[self.dataset]).digest
        if self.fine_tune is None:
            return digest
        trained = load_manifest(datasets[self.fine_tune.dataset]).digest
        return hashlib.sha256(f"{digest} {trained}".encode()).hexdigest()
