"""The ``fine_tune`` block of a task: how the checkpoint is fine-tuned before it is evaluated.

A preset for each kind of task (GLSCL, section 6); whatever is left out of the block is the preset's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.training.config import LARGEST_BATCH, AugmentationBlock, Course, Recipe, ScheduleBlock, Stage
from sharding.order import steps_per_epoch

#: Names the one stage of a fine-tuning, and its data.
STAGE, DATA = "fine-tuning", "train"

#: RandAugment, which the paper applies on fine-tuning; the square is CLIP's resize and centre crop.
_AUGMENTED = AugmentationBlock(rand_augment=True)


class FineTuningCourse(Course):
    """A fine-tuning as the training loop works by it."""

    PLACE: ClassVar[str] = "fine_tune"


class FineTuning(Recipe):
    """The recipe of a fine-tuning.

    Attributes:
        epochs: over the task's training data.
        steps: optimizer steps instead.
        resolution: side of the images in pixels; the position embedding is interpolated to it, and the task
            evaluates at it.
        checkpoint_every: steps.
    """

    PLACE: ClassVar[str] = "fine_tune"
    #: Fields that change the cost of a fine-tuning, not its numbers (beyond rounding).
    COST_ONLY: ClassVar[frozenset[str]] = frozenset(
        {
            "workers",
            "loader_processes",
            "activation_checkpointing",
            "bad_sample_limit",
            "max_failures",
            "checkpoint_every",
        }
    )

    epochs: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] | None = None
    resolution: Annotated[int, Field(gt=0)] = 384
    augmentation: AugmentationBlock = _AUGMENTED
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        self._check_global_batch(self.global_batch, "fine_tune.global_batch")
        return self

    def course(self, samples: int, frames: int = 1) -> FineTuningCourse:
        """What the training loop works by, over so many samples."""
        per_epoch = steps_per_epoch(samples, self.lanes, self.global_batch)
        stage = Stage(
            name=STAGE,
            steps=self.steps or self.epochs * per_epoch,
            mixture={DATA: 1.0},
            resolution=self.resolution,
            frames=frames,
            checkpoint_every=self.checkpoint_every,
            augmentation=self.augmentation,
        )
        recipe = {name: getattr(self, name) for name in Recipe.model_fields}
        return FineTuningCourse(**recipe, stages=[stage])


class VQAFineTuning(FineTuning):
    """VQAv2: learning rate 5e-6, the answer head at 50 times that, the fusion at 10; 10 epochs, batch 512, 384 px."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    head_multiplier: Annotated[float, Field(gt=0)] = 50.0
    fusion_multiplier: Annotated[float, Field(gt=0)] = 10.0
    global_batch: Annotated[int, Field(gt=1, le=LARGEST_BATCH)] = 512


class NLVR2FineTuning(FineTuning):
    """NLVR2: learning rate 1e-5, head and fusion at 10 times that; batch 256, 288 px.

    The paper's recipe does not say for how long: 10 epochs, as METER's.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    head_multiplier: Annotated[float, Field(gt=0)] = 10.0
    fusion_multiplier: Annotated[float, Field(gt=0)] = 10.0
    global_batch: Annotated[int, Field(gt=1, le=LARGEST_BATCH)] = 256
    resolution: Annotated[int, Field(gt=0)] = 288


#: Where the preset for clips (MSR-VTT, LSMDC) differs from that for images (Flickr30k, COCO).
_CLIPS: Mapping[str, Any] = {
    "global_batch": 256,
    "resolution": 224,
    "itc_weight": 1.0,
    "schedule": ScheduleBlock(warmup=0.05),
}


class RetrievalFineTuning(FineTuning):
    """Retrieval: learning rate 5e-6, head and fusion at 5 times that; batch 512, 384 px. Clips: batch 256, 224 px.

    The paper's factors are 5 to 10, by data set; its recipe does not say for how long: 10 epochs, as METER's.

    Attributes:
        dataset: name of one of the job's ``datasets``, which is trained on.
        modality: of that dataset; decides the preset.
        negatives: random captions of other samples that the true one is ranked against.
        itc_weight: of the contrastive loss beside the ranking loss.
    """

    dataset: str
    modality: Literal["image", "video"] = "image"
    negatives: Annotated[int, Field(ge=1)] = 15
    itc_weight: Annotated[float, Field(ge=0)] = 0.5
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    global_batch: Annotated[int, Field(gt=1, le=LARGEST_BATCH)] = 512

    @model_validator(mode="before")
    @classmethod
    def _of_clips(cls, block: Any) -> Any:
        if isinstance(block, Mapping) and block.get("modality") == "video":
            return {**_CLIPS, **block}
        return block


def wait_for_the_end(block: Any, *, fine_tuned: bool) -> Any:
    """A task's block of the YAML, with what differs where the task fine-tunes, unless the block says otherwise.

    After the last checkpoint alone, after the tasks that do not, and with a week of time: it is a training.
    """
    if not isinstance(block, Mapping) or not fine_tuned:
        return block
    return {"after": "end", "priority": -1, "timeout_s": 7 * 86400.0} | {
        name: value for name, value in block.items() if value is not None
    }
