"""The one YAML file of a job: its schema, its defaults, and what is wrong with it in plain words.

The schema is a tree of frozen pydantic models. Each room owns the model of its own block
(``sharding.prepare.PrepareConfig``, ``cluster.config.ClusterConfig``, ...); this file composes them into
:class:`JobConfig` and checks what only the whole can tell (does the mixture name a dataset that exists,
do the workers divide the lanes). Nothing starts before the whole file is valid.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from cluster.config import ClusterConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.tasks.registry import KINDS, TASK_TAGS
from pipeline.scoring import ITC
from pipeline.tracking import TrackingConfig
from sharding.errors import UserError
from sharding.order import LARGEST_WINDOW
from sharding.prepare import PrepareConfig
from sharding.prepared import PreparedConfig
from sharding.storage import StorageConfig

ObjectiveName = Literal["itc", "itm", "mlm", "mgsc", "mltc"]

#: Weights of the pre-training loss (GLSCL, section 3; MLTC: 0.2 for each modality).
PAPER_OBJECTIVES: dict[ObjectiveName, float] = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}

#: Keys of DeepSpeed's configuration that the job decides elsewhere, and where.
DEEPSPEED_OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch, train.accumulation and train.workers",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clipping",
    "optimizer": "train.learning_rate, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "compile": "train.compile",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "the checkpoints block",
}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Block(BaseModel):
    """A block of the YAML: unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelBlock(Block):
    """Which GLSCL is trained: a preset, and the fields of ``model.GLSCLConfig`` that differ from it."""

    preset: Literal["tiny", "base"] = "base"
    overrides: dict[str, Any] = Field(default_factory=dict)
    weights: list[str] = Field(
        default_factory=list,
        description="files to begin with: CLIP, RoBERTa or released GLSCL weights, see model/importers",
    )
    tokenizer: str = Field(
        default="builtin", description="'builtin' (RoBERTa's vocabulary) or a Hugging Face name or folder"
    )

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        from model import GLSCLConfig

        known = GLSCLConfig.preset(self.preset).to_dict()
        for key in self.overrides:
            if key not in known:
                raise ValueError(f"model.overrides: unknown field '{key}'{did_you_mean(key, known)}")
        GLSCLConfig.preset(self.preset, **self.overrides)
        return self


class AugmentationBlock(Block):
    """What happens to training pictures; drawn per sample from the run's seed.

    ``crop`` is the smallest share of the picture's area a random resized crop keeps (1: CLIP's resize and
    centre crop, the paper's recipe for images); ``flip`` is the chance of a mirror image; ``rand_augment``
    applies RandAugment(2, 9) as the paper does on video.
    """

    crop: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    flip: Fraction = 0.0
    rand_augment: bool = False


class StageBlock(Block):
    """One stretch of training with its own resolution, data mixture and objectives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    steps: Annotated[int, Field(gt=0)]
    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    objectives: Annotated[dict[ObjectiveName, Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        default_factory=lambda: dict(PAPER_OBJECTIVES)
    )
    resolution: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="pixels; default: the model's image_size"
    )
    frames: Annotated[int, Field(ge=1)] = Field(4, description="frames drawn from a clip (images have one)")
    global_batch: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="default: train.global_batch"
    )
    checkpoint_every: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="steps; the stage's end always"
    )
    augmentation: AugmentationBlock = AugmentationBlock()


class ScheduleBlock(Block):
    """Learning-rate schedule over the whole run: linear warm-up, then decay (GLSCL: 10 %, linear to 0)."""

    warmup: Fraction = 0.1
    decay: Literal["linear", "cosine", "constant"] = "linear"


class TrainBlock(Block):
    """The training: workers, batch, optimizer, DeepSpeed and the stages."""

    workers: Annotated[int, Field(ge=1)] = 1
    global_batch: Annotated[int, Field(gt=1)] = Field(
        default=4096, description="samples of one optimizer step"
    )
    accumulation: Annotated[int, Field(ge=1)] = Field(
        1, description="contrastive batches of one global batch"
    )
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="samples a worker computes at once: its share of a contrastive batch is then worked off in parts, "
        "with the same gradient and about a third more time; null: all at once",
    )
    lanes: Annotated[int, Field(ge=1)] = Field(default=64, description="see 'Sample order' in the README")
    shuffle_window: Annotated[int, Field(ge=1, le=LARGEST_WINDOW)] = Field(
        16384, description="samples shuffled among each other"
    )
    loader_processes: Annotated[int, Field(ge=0)] = 1
    cache_mb: Annotated[int, Field(ge=0)] = Field(
        0, description="local shard cache of a node; 0: range reads"
    )
    precision: Literal["fp32", "bf16-autocast", "bf16", "fp16"] = Field(
        "fp32",
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
    schedule: ScheduleBlock = ScheduleBlock()
    activation_checkpointing: bool = Field(
        default=False, description="recompute each block in the backward instead of keeping its activations"
    )
    compile: bool = Field(default=False, description="torch.compile for each block; needs a compiler")
    bad_sample_limit: Fraction = Field(
        0.01, description="share of unreadable samples above which the run stops"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(3, description="restarts after a worker's death")
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    stages: Annotated[list[StageBlock], Field(min_length=1)]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def parts(self, stage: StageBlock) -> int:
        """In how many parts a worker computes its share of a stage's contrastive batch."""
        share = (stage.global_batch or self.global_batch) // (self.accumulation * self.workers)
        return share // self.micro_batch if self.micro_batch else 1

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, owner in DEEPSPEED_OWNED.items():
            if key in self.deepspeed:
                raise ValueError(f"train.deepspeed.{key} is decided by {owner}: set it there")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(
                f"train.deepspeed.zero_optimization.stage: got {self.zero_stage}; must be 0, 1, 2 or 3"
            )
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("train.precision: bf16 needs train.deepspeed.zero_optimization.stage 1, 2 or 3")
        if self.lanes % self.workers:
            raise ValueError(
                f"train.lanes: got {self.lanes}, which {self.workers} workers do not divide; "
                f"workers that do: {divisors(self.lanes)}"
            )
        for stage in self.stages:
            batch = stage.global_batch or self.global_batch
            unit = self.lanes * self.accumulation
            if batch % unit:
                raise ValueError(
                    f"stage '{stage.name}': a global batch of {batch} is not a multiple of lanes x accumulation "
                    f"= {unit}; the nearest that is: {max(unit, round(batch / unit) * unit)}"
                )
            self._check_micro_batch(stage, batch)
        if len({self.parts(stage) for stage in self.stages}) > 1:
            raise ValueError(
                "train.micro_batch: the stages' global batches make a different number of parts; it must be the same"
            )
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"train.stages: two stages are named '{name}'")
        return self

    def _check_micro_batch(self, stage: StageBlock, batch: int) -> None:
        group, share = batch // (self.lanes * self.accumulation), batch // (self.accumulation * self.workers)
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


# Tags of the two kinds of datasets. They are no keys of the YAML, so error messages leave them out.
_FROM_SOURCE, _PREPARED = "(from a source)", "(prepared)"


def _dataset_kind(block: Any) -> str:
    is_prepared = "prepared" in block if isinstance(block, dict) else isinstance(block, PreparedConfig)
    return _PREPARED if is_prepared else _FROM_SOURCE


#: A dataset is made from a source, or is there already.
DatasetConfig = Annotated[
    Annotated[PrepareConfig, Tag(_FROM_SOURCE)] | Annotated[PreparedConfig, Tag(_PREPARED)],
    Discriminator(_dataset_kind),
]


class JobConfig(Block):
    """One job: raw corpus -> shards -> training -> checkpoints -> evaluations -> MLflow."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    seed: Annotated[int, Field(ge=0)] = 0
    storage: StorageConfig
    datasets: Annotated[dict[str, DatasetConfig], Field(min_length=1)]
    model: ModelBlock = Field(
        default_factory=ModelBlock
    )  # made when asked for: it looks into `model`, hence torch
    train: TrainBlock
    checkpoints: CheckpointBlock = CheckpointBlock()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _references(self) -> Self:
        from model import GLSCLConfig

        model = GLSCLConfig.preset(self.model.preset, **self.model.overrides)
        for name in self.datasets:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(
                    f"datasets: '{name}' is no name for a folder (letters, digits, '.', '_', '-')"
                )
        for name, dataset in self.datasets.items():
            score = dataset.score_filter if isinstance(dataset, PrepareConfig) else None
            if score is not None and (score.scorer != ITC or score.model is None):
                raise ValueError(
                    f"datasets.{name}, filter score: give model, the address of a GLSCL model (scorer: {ITC})"
                )
        for stage in self.train.stages:
            for name in stage.mixture:
                if name not in self.datasets:
                    hint = did_you_mean(name, self.datasets)
                    raise ValueError(f"stage '{stage.name}', mixture: there is no dataset '{name}'{hint}")
            if stage.frames > model.max_frames:
                raise ValueError(
                    f"stage '{stage.name}', frames: got {stage.frames} is above the model's {model.max_frames}"
                )
            resolution = stage.resolution or model.image_size
            if resolution % model.patch_size:
                raise ValueError(
                    f"stage '{stage.name}', resolution: {resolution} is not a multiple of the model's "
                    f"patch_size {model.patch_size}"
                )
        for task in self.evaluate.tasks:
            if task.dataset_name is not None and task.dataset_name not in self.datasets:
                raise ValueError(
                    f"evaluate task '{task.name}': there is no dataset '{task.dataset_name}'"
                    f"{did_you_mean(task.dataset_name, self.datasets)}"
                )
            if task.frames_taken > model.max_frames:
                raise ValueError(
                    f"evaluate task '{task.name}', frames: got {task.frames_taken} is above the model's "
                    f"{model.max_frames}"
                )
        if self.evaluate.tasks and self.evaluate.concurrent > self.cluster.evaluations:
            raise ValueError(
                f"evaluate.concurrent: got {self.evaluate.concurrent}; cluster.evaluations has room for "
                f"{self.cluster.evaluations}"
            )
        if self.checkpoints.keep_best is not None:
            task_name = self.checkpoints.keep_best.split("/")[0]
            names = {task.name: None for task in self.evaluate.tasks}
            if task_name not in names or "/" not in self.checkpoints.keep_best:
                raise ValueError(
                    f"checkpoints.keep_best: got '{self.checkpoints.keep_best}'; must be TASK/METRIC with one of the "
                    f"evaluate tasks ({', '.join(names) or 'there are none'})"
                )
        return self


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, the list of them where none is near."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(names))}" if len(names) <= 12 else ""


def load_job(path: str | Path, overrides: typing.Sequence[str] = ()) -> JobConfig:
    """Read, override and validate a job file.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` strings, values parsed as YAML; list items by number
            (``train.stages.0.steps=100``).

    Raises:
        UserError: one line for each fault, naming the field, the value and what would be right.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: must be a mapping with the keys {', '.join(JobConfig.model_fields)}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_job(tree, str(source))


def parse_job(tree: dict[str, Any], origin: str) -> JobConfig:
    """Validate a job given as plain data; ``origin`` is named in errors."""
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        # A refused branch of a union reports each alternative: the same line need not stand twice.
        unique = list(dict.fromkeys(lines))
        raise UserError("\n".join(f"{origin}: {line}" for line in unique)) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: must be dotted.key=value")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _descend(node, part, override, ".".join(parents[: depth + 1]), create=True)
    if isinstance(node, list):
        _descend(node, last, override, key, create=False)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override}: {'.'.join(parents)} is a single value, it has no '{last}'")


def _descend(node: Any, part: str, override: str, path: str, *, create: bool) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise UserError(f"--set {override}: {path}: the list has items 0 to {len(node) - 1}")
        return node[int(part)]
    if isinstance(node, dict):
        if create and node.get(part) is None:
            node[part] = {}
        return node[part]
    raise UserError(f"--set {override}: {path} is below a single value")


def _explain(detail: Any) -> str:
    tags = (_FROM_SOURCE, _PREPARED, *TASK_TAGS)
    tagged = [p for p in detail["loc"] if not str(p).startswith("function-")]
    location = [part for part in tagged if part not in tags]
    field = ".".join(str(part) for part in location) or "job"
    if detail["type"] == "union_tag_invalid":  # the one union that can be: a task's kind
        kind = detail["input"]["kind"]
        return f"{field}.kind: got {_shown(kind, location)}{did_you_mean(str(kind), KINDS)}"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(JobConfig, tagged[:-1])
        return f"{field}: unknown key{did_you_mean(str(location[-1]), known)}"
    if detail["type"] == "missing":
        return f"{field}: is required"
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return message if not location or field in message else f"{field}: {message}"
    return f"{field}: got {_shown(detail['input'], location)}; {_decapitalised(detail['msg'])}"


def _shown(value: Any, location: list[Any]) -> str:
    # A mistyped secret must not come back in an error text.
    if any(
        word in str(part).lower()
        for part in location
        for word in ("secret", "access_key", "password", "token")
    ):
        return "(hidden)"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _decapitalised(message: str) -> str:
    message = message.replace("Input should be", "must be")
    return message[:1].lower() + message[1:]


def _fields_at(schema: Any, location: list[Any]) -> list[str]:
    """Names of the fields a model found at ``location`` below ``schema`` has (of a union: all alternatives, or
    the task that a tag names).
    """
    models = [schema]
    for part in location:
        if part in TASK_TAGS:
            models = [model for model in models if model.model_fields["kind"].default == TASK_TAGS[part]]
        step: list[Any] = []
        for node in models:
            step += _children(node, part)
        models = step or models
    return [name for node in models if _is_model(node) for name in node.model_fields]


def _children(node: Any, part: Any) -> list[Any]:
    if not _is_model(node) or part not in node.model_fields:
        return []
    return _models_in(node.model_fields[part].annotation)


def _models_in(annotation: Any) -> list[Any]:
    """The pydantic models inside ``dict[str, X]``, ``list[X]``, ``X | None``, ``Annotated[X, ...]``."""
    if _is_model(annotation):
        return [annotation]
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        arguments = arguments[:1]
    if origin in (Annotated, dict, list, tuple, typing.Union, types.UnionType):
        return [model for argument in arguments for model in _models_in(argument)]
    return []


def _is_model(node: Any) -> bool:
    return isinstance(node, type) and issubclass(node, BaseModel)
