"""The block of a classification task."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from pipeline.evaluation.tasks.annotations import digest_of
from pipeline.evaluation.tasks.base import TaskConfig
from sharding.given_path import GivenPath

if TYPE_CHECKING:
    from sharding.storage import Storage


class ClassificationTask(TaskConfig):
    """Images into classes by their ITC embeddings, zero-shot. Addresses may be relative to the job's storage.

    Attributes:
        images: a folder of one folder for each class, with the images of the class in it, at any depth.
        prompts: sentences with ``{}`` where the name of the class belongs. A class is the mean of their embeddings.
        class_names: address of a JSON object with the class's name for each folder; without it a class is called
            as its folder, with spaces for underscores.
        limit: only so many images, as evenly from all classes as there are.
    """

    kind: Literal["classification"] = "classification"
    images: GivenPath
    prompts: list[str] = Field(default=["a photo of a {}."], min_length=1)
    class_names: GivenPath | None = None

    @field_validator("prompts")
    @classmethod
    def _hold_the_class(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
            except ValueError as error:
                raise ValueError(f"{prompt!r} is no prompt: {error}") from None
            if fields != [""]:
                raise ValueError(f"{prompt!r} must hold {{}} once, where the name of the class belongs")
        return prompts

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        names = {} if self.class_names is None else {"class_names": self.class_names}
        return digest_of(storage, names, {"images": self.images})
