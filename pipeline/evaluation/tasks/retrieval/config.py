"""The block of a retrieval task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.evaluation.tasks.base import TaskConfig
from sharding.manifest import load_manifest

if TYPE_CHECKING:
    from sharding.storage import Storage


class RetrievalTask(TaskConfig):
    """Captions <-> pictures or clips of a dataset, zero-shot.

    Attributes:
        dataset: name of one of the job's ``datasets`` (held-out pairs).
        frames: frames taken from a clip; a dataset of images ignores it.
        rerank: so many candidates of each query, the best by ITC, are ranked again by the matching head; 0:
            none; ``all``: every caption is paired with every picture (small sets).
        cache_mb: memory for encoder states that wait for their pairs; what does not fit is encoded again.
    """

    VERSION: ClassVar[int] = 2

    COST_ONLY: ClassVar[frozenset[str]] = TaskConfig.COST_ONLY | {"cache_mb"}

    kind: Literal["retrieval"] = "retrieval"
    dataset: str
    frames: Annotated[int, Field(ge=1)] = 4
    rerank: Annotated[int, Field(ge=0)] | Literal["all"] = 16
    cache_mb: Annotated[int, Field(ge=1)] = 512

    @property
    def dataset_name(self) -> str | None:
        return self.dataset

    @property
    def frames_taken(self) -> int:
        return self.frames

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        return load_manifest(datasets[self.dataset]).digest
