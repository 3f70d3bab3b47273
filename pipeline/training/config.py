"""The blocks of the YAML that say how something is trained: pre-training, and the tasks that fine-tune.

::

    Recipe     how the weights are moved: workers, batch, learning rates, precision, DeepSpeed
    Course     a recipe with its stages, which is what the training loop and the order of samples work by
    TrainBlock the course of the pre-training, as it stands in the YAML under ``train``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.training.deepspeed_block import check_block, with_whole_numbers
from sharding.order import LARGEST_WINDOW

ObjectiveName = Literal["itc", "itm", "mlm", "mgsc", "mltc"]

#: Weights of the pre-training loss (GLSCL, section 3; MLTC: 0.2 for each modality).
PAPER_OBJECTIVES: dict[ObjectiveName, float] = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}

#: Samples of a batch: what larger ones could be divided by takes long to say.
LARGEST_BATCH = 2**31

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Block(BaseModel):
    """A block of the YAML: unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AugmentationBlock(Block):
    """What happens to training pictures; drawn per sample from the run's seed.

    ``crop`` is the smallest share of the picture's area a random resized crop keeps (1: CLIP's resize and
    centre crop, the paper's recipe for images); ``flip`` is the chance of a mirror image; ``rand_augment``
    applies RandAugment(2, 9) as the paper does on video.
    """

    crop: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    flip: Fraction = 0.0
    rand_augment: bool = False


class ScheduleBlock(Block):
    """Learning-rate schedule of the run or of a stage: linear warm-up, then decay (GLSCL: 10 %, linear to 0)."""

    warmup: Fraction = 0.1
    decay: Literal["linear", "cosine", "constant"] = "linear"


class Stage(Block):
    """One stretch of training with its own resolution and data mixture."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    steps: Annotated[int, Field(gt=0)]
    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    resolution: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="pixels; default: the model's image_size"
    )
    frames: Annotated[int, Field(ge=1)] = Field(
        default=4, description="frames drawn from a clip (images have one)"
    )
    global_batch: Annotated[int, Field(gt=0, le=LARGEST_BATCH)] | None = Field(
        default=None, description="default: train.global_batch"
    )
    accumulation: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="default: train.accumulation"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="peak of this stage; default: train.learning_rate"
    )
    schedule: ScheduleBlock | None = Field(
        default=None,
        description="over this stage's own steps; default: train.schedule, over the steps of the stages without one",
    )
    checkpoint_every: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="steps; the stage's end always"
    )
    augmentation: AugmentationBlock = AugmentationBlock()


class StageBlock(Stage):
    """A stage of the pre-training, with its objectives."""

    objectives: Annotated[dict[ObjectiveName, Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        default_factory=lambda: dict(PAPER_OBJECTIVES)
    )


class Recipe(Block):
    """How weights are moved: workers, batch, optimizer, precision, DeepSpeed. The defaults are the pre-training's."""

    #: Where the block stands in the YAML, for messages.
    PLACE: ClassVar[str] = "train"

    workers: Annotated[int, Field(ge=1)] = 1
    global_batch: Annotated[int, Field(gt=1, le=LARGEST_BATCH)] = Field(
        default=4096, description="samples of one optimizer step"
    )
    accumulation: Annotated[int, Field(ge=1)] = Field(
        default=1, description="contrastive batches of one global batch"
    )
    lanes: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = Field(
        default=64, description="see 'Sample order' in the README"
    )
    shuffle_window: Annotated[int, Field(ge=1, le=LARGEST_WINDOW)] = Field(
        default=16384, description="samples shuffled among each other"
    )
    loader_processes: Annotated[int, Field(ge=0)] = 1
    precision: Literal["fp32", "bf16-autocast", "bf16", "fp16"] = Field(
        default="fp32",
        description="bf16-autocast: parameters stay fp32, products are bf16; bf16, fp16: parameters too "
        "(the optimizer's copy is fp32)",
    )
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    fusion_multiplier: Annotated[float, Field(gt=0)] = 5.0
    head_multiplier: Annotated[float, Field(gt=0)] = 5.0
    clipping: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="largest gradient norm; null: none"
    )
    schedule: ScheduleBlock = Field(
        default=ScheduleBlock(), description="over the steps of all stages that have none of their own"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute each block in the backward instead of keeping its activations"
    )
    bad_sample_limit: Fraction = Field(
        default=0.01, description="share of unreadable samples above which the run stops"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=3, description="restarts after workers' deaths in a row, without a checkpoint in between"
    )
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 1}})

    @field_validator("deepspeed")
    @classmethod
    def _whole_numbers(cls, block: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = with_whole_numbers(block)
        return whole

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def resized(self, workers: int) -> Self:
        """The same recipe for a group of another size: a worker's share of each batch changes, nothing else."""
        return self.model_copy(update={"workers": workers})

    @model_validator(mode="after")
    def _runs(self) -> Self:
        place = self.PLACE
        check_block(self.deepspeed, self.precision, place)
        if self.zero_stage == 0 and self.precision in ("bf16", "fp16"):
            raise ValueError(
                f"{place}.precision: {self.precision} needs {place}.deepspeed.zero_optimization.stage 1, 2 or 3"
            )
        if self.lanes % self.workers:
            raise ValueError(
                f"{place}.lanes: got {self.lanes}, which {self.workers} workers do not divide; "
                f"workers that do: {divisors(self.lanes)}"
            )
        return self

    def _check_global_batch(self, batch: int, where: str, accumulation: int | None = None) -> None:
        unit = self.lanes * (accumulation or self.accumulation)
        if batch % unit:
            raise ValueError(
                f"{where}: a global batch of {batch} is not a multiple of lanes x accumulation "
                f"= {unit}; the nearest that is: {max(unit, round(batch / unit) * unit)}"
            )


class Course(Recipe):
    """A recipe with the stages it is applied to, one after the other."""

    stages: Annotated[Sequence[Stage], Field(min_length=1)]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def batch_of(self, stage: Stage) -> int:
        """Samples of an optimizer step of a stage, over all workers."""
        return stage.global_batch or self.global_batch

    def accumulation_of(self, stage: Stage) -> int:
        """Contrastive batches of an optimizer step of a stage."""
        return stage.accumulation or self.accumulation

    def parts(self, stage: Stage) -> int:
        """In how many parts a worker computes its share of a stage's contrastive batch."""
        return 1

    def backwards(self, stage: Stage) -> int:
        """Backward passes of a worker in an optimizer step of a stage: DeepSpeed's accumulation steps."""
        return self.accumulation_of(stage) * self.parts(stage)


class TrainBlock(Course):
    """The pre-training: how the weights are moved, and the stages."""

    min_workers: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="with so few the run goes on when nodes are lost, and grows again when they are back; batch, order "
        "and negatives stay what they are; null: always all of them",
    )
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="samples a worker computes at once: its share of a contrastive batch is then worked off in parts, "
        "with the same gradient and about a third more time; null: all at once",
    )
    cache_mb: Annotated[int, Field(ge=0)] = Field(
        default=0, description="local shard cache of a node; 0: range reads"
    )
    compile: bool = Field(default=False, description="torch.compile for each block; needs a compiler")
    stages: Annotated[list[StageBlock], Field(min_length=1)]

    @property
    def sizes(self) -> list[int]:
        """Numbers of workers the run may have, ascending: from ``min_workers`` to ``workers``, those that split all."""
        least = self.workers if self.min_workers is None else self.min_workers
        return [number for number in self._splitting() if least <= number <= self.workers]

    def _splitting(self) -> list[int]:
        """Numbers of workers among which lanes, and parts of every stage's batch, can be divided."""
        contrastive = [self.batch_of(stage) // self.accumulation_of(stage) for stage in self.stages]
        part = self.micro_batch or 1
        return [
            number
            for number in divisors(self.lanes)
            if all(batch % (number * part) == 0 for batch in contrastive)
        ]

    def parts(self, stage: Stage) -> int:
        share = self.batch_of(stage) // (self.accumulation_of(stage) * self.workers)
        return share // self.micro_batch if self.micro_batch else 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for stage in self.stages:
            self._check_global_batch(
                self.batch_of(stage), f"stage '{stage.name}'", self.accumulation_of(stage)
            )
            self._check_micro_batch(stage)
        self._check_sizes()
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"train.stages: two stages are named '{name}'")
        return self

    def _check_sizes(self) -> None:
        if self.min_workers is not None and self.min_workers not in self.sizes:
            possible = [number for number in self._splitting() if number <= self.workers]
            raise ValueError(
                f"train.min_workers: got {self.min_workers}; with {self.lanes} lanes, the stages' global batches and "
                f"train.workers {self.workers} choose from {possible}"
            )

    def _check_micro_batch(self, stage: StageBlock) -> None:
        contrastive = self.batch_of(stage) // self.accumulation_of(stage)
        group, share = contrastive // self.lanes, contrastive // self.workers
        if self.micro_batch is not None and (share % self.micro_batch or self.micro_batch % group):
            possible = [size for size in divisors(share) if size % group == 0]
            raise ValueError(
                f"train.micro_batch: got {self.micro_batch}; stage '{stage.name}' gives a worker {share} samples "
                f"in groups of {group}: choose from {possible}"
            )


class CheckpointBlock(Block):
    """When checkpoints are written and which are kept (the newest and those awaiting evaluation always are)."""

    every: Annotated[int, Field(gt=0)] = Field(default=1000, description="steps; a stage may say otherwise")
    keep_last: Annotated[int, Field(ge=1)] = 2
    keep_every: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="keep those at multiples of so many steps"
    )
    keep_best: str | None = Field(
        default=None, description="'TASK/METRIC' whose best checkpoint is kept, e.g. images/t2i_R10"
    )
    on_stop_s: Annotated[float, Field(ge=0)] = Field(
        default=30.0,
        description="seconds in which the workers may write a last checkpoint when the job is told to end (SIGTERM, "
        "Ctrl-C); a second signal ends it at once",
    )


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]
