"""The block of a VQA task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.evaluation.tasks.annotations import digest_of
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.vqa.answers import FREQUENT_ANSWERS
from pipeline.evaluation.tasks.vqa.data import VQAData
from pipeline.fine_tuning.config import VQAFineTuning, wait_for_the_end
from sharding.given_path import GivenPath

if TYPE_CHECKING:
    from sharding.storage import Storage


class VQATask(TaskConfig):
    """Questions about images, answered by a model that was fine-tuned for it (GLSCL, section 6).

    Attributes:
        data: the split that is answered.
        train: the splits that the model is fine-tuned on.
        answers: size of the vocabulary: the most frequent answers of ``train``.
        answer2id: address of a JSON file with the vocabulary instead: a list, or numbers by answer.
        fine_tune: how; the paper's recipe unless the block says otherwise.
    """

    VERSION: ClassVar[int] = 3

    kind: Literal["vqa"] = "vqa"
    data: VQAData
    train: Annotated[list[VQAData], Field(min_length=1)]
    answers: Annotated[int, Field(ge=2)] = FREQUENT_ANSWERS
    answer2id: GivenPath | None = None
    fine_tune: VQAFineTuning = VQAFineTuning()

    @model_validator(mode="before")
    @classmethod
    def _last(cls, block: Any) -> Any:
        return wait_for_the_end(block, fine_tuned=True)

    @property
    def fine_tuning(self) -> VQAFineTuning:
        return self.fine_tune

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        for number, split in enumerate(self.train):
            if split.questions == self.data.questions:
                raise ValueError(
                    f"train.{number}.questions: {split.questions} is what 'data' asks: not held out"
                )
            if split.annotations is None:
                raise ValueError(f"train.{number}.annotations: is required, to train on its answers")
        return self

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        parts = [self.data.digest(storage, "data")]
        parts += [split.digest(storage, f"train.{number}") for number, split in enumerate(self.train)]
        if self.answer2id is not None:
            parts.append(digest_of(storage, {"answer2id": self.answer2id}, {}))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
