"""The block of an NLVR2 task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.nlvr2.data import NLVR2Data
from pipeline.fine_tuning.config import NLVR2FineTuning, wait_for_the_end

if TYPE_CHECKING:
    from sharding.storage import Storage


class NLVR2Task(TaskConfig):
    """Statements about pairs of images, judged by a model that was fine-tuned for it (GLSCL, section 6).

    Attributes:
        data: the split that is judged.
        train: the splits that the model is fine-tuned on.
        fine_tune: how; the paper's recipe unless the block says otherwise.
    """

    kind: Literal["nlvr2"] = "nlvr2"
    data: NLVR2Data
    train: Annotated[list[NLVR2Data], Field(min_length=1)]
    fine_tune: NLVR2FineTuning = NLVR2FineTuning()

    @model_validator(mode="before")
    @classmethod
    def _last(cls, block: Any) -> Any:
        return wait_for_the_end(block, fine_tuned=True)

    @property
    def fine_tuning(self) -> NLVR2FineTuning:
        return self.fine_tune

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        for number, split in enumerate(self.train):
            if split.statements == self.data.statements:
                raise ValueError(
                    f"train.{number}.statements: {split.statements} is what 'data' asks: not held out"
                )
        return self

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        parts = [self.data.digest(storage, "data")]
        parts += [split.digest(storage, f"train.{number}") for number, split in enumerate(self.train)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
