"""The block of an alignment task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pipeline.evaluation.tasks.annotations import digest_of
from pipeline.evaluation.tasks.base import TaskConfig
from sharding.given_path import GivenPath

if TYPE_CHECKING:
    from sharding.storage import Storage


class AlignmentTask(TaskConfig):
    """How much of the words' attention falls onto the regions they name: ALIGN-BENCH (GLSCL).

    Attributes:
        annotations: a folder of pickles, one for each image (ALIGN-BENCH's ``pkls``), or one pickle of all.
        images: the folder of the images.
    """

    kind: Literal["alignment"] = "alignment"
    annotations: GivenPath
    images: GivenPath

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        if self.annotations.endswith(".pkl"):
            return digest_of(storage, {"annotations": self.annotations}, {"images": self.images})
        # Names and sizes stand for a folder of gigabytes, as they do for images.
        return digest_of(storage, {}, {"annotations": self.annotations, "images": self.images})
