"""The one YAML file of a job: its schema, its defaults, and what is wrong with it in plain words.

The schema is a tree of frozen pydantic models. Each room owns the model of its own block
(``sharding.prepare.PrepareConfig``, ``cluster.config.ClusterConfig``, ...); this file composes them into
:class:`JobConfig` and checks what only the whole can tell (does the mixture name a dataset that exists,
do the workers divide the lanes). Nothing starts before the whole file is valid.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.config import ClusterConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.tasks.registry import TASK_TAGS
from pipeline.fine_tuning.config import RetrievalFineTuning
from pipeline.redaction import without_credentials
from pipeline.scoring import ITC
from pipeline.tracking import TrackingConfig
from pipeline.training.config import Block, CheckpointBlock, TrainBlock
from pipeline.training.health.config import HealthBlock
from pipeline.yaml_reader import parse_content, parse_yaml, read_content
from sharding.errors import UserError
from sharding.filters.config import FilterConfig
from sharding.given_path import SENT, GivenPath, means_the_same_everywhere
from sharding.prepare import PrepareConfig
from sharding.prepared import PreparedConfig
from sharding.sources.config import SourceConfig
from sharding.storage import StorageConfig


class ModelBlock(Block):
    """Which GLSCL is trained: a preset, and the fields of ``model.GLSCLConfig`` that differ from it."""

    preset: Literal["tiny", "base"] = "base"
    overrides: dict[str, Any] = Field(default_factory=dict)
    weights: list[GivenPath] = Field(
        default_factory=list,
        description="files to begin with: CLIP, RoBERTa or released GLSCL weights, see model/importers",
    )
    tokenizer: str = Field(
        default="builtin", description="'builtin' (RoBERTa's vocabulary) or a Hugging Face name or folder"
    )

    @field_validator("tokenizer")
    @classmethod
    def _same_everywhere(cls, tokenizer: str, info: ValidationInfo) -> str:
        # A folder here, for transformers; elsewhere a name of the hub, or nothing.
        folder = tokenizer.startswith((".", "~")) or os.path.isdir(tokenizer)
        if info.context == SENT and folder and not means_the_same_everywhere(tokenizer):
            raise ValueError(
                f"got {tokenizer!r}; a job sent to a cluster needs an absolute path (of a folder that all its "
                "machines have), or a Hugging Face name"
            )
        return tokenizer

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        from model import GLSCLConfig, ModelConfigurationError

        known = GLSCLConfig.own_fields()
        for key in self.overrides:
            if key not in known:
                raise ValueError(f"model.overrides: unknown field '{key}'{did_you_mean(key, known)}")
        try:
            GLSCLConfig.preset(self.preset, **self.overrides)
        except ModelConfigurationError as error:
            raise ValueError(re.sub(r"\bmodel\.(?=\w)", self._place, str(error))) from None
        return self

    def _place(self, found: re.Match[str]) -> str:
        name = re.match(r"\w+", found.string[found.end() :])
        assert name is not None
        return "model.overrides." if name[0] in self.overrides else "the preset's "


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
    health: HealthBlock = HealthBlock()
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
        if self.train.precision == "fp16":
            _check_fp16("train", self.cluster.worker.gpus)
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
            recipe = task.fine_tuning
            if recipe is not None and recipe.resolution % model.patch_size:
                raise ValueError(
                    f"evaluate task '{task.name}', fine_tune.resolution: {recipe.resolution} is not a multiple of the "
                    f"model's patch_size {model.patch_size}"
                )
            if isinstance(recipe, RetrievalFineTuning):
                trained = self.datasets.get(recipe.dataset)
                if trained is None:
                    raise ValueError(
                        f"evaluate task '{task.name}', fine_tune.dataset: there is no dataset '{recipe.dataset}'"
                        f"{did_you_mean(recipe.dataset, self.datasets)}"
                    )
                if trained.modality != recipe.modality:
                    raise ValueError(
                        f"evaluate task '{task.name}', fine_tune.modality: got {recipe.modality}; the dataset "
                        f"'{recipe.dataset}' is of {trained.modality}s"
                    )
            if recipe is not None and recipe.precision == "fp16":
                gpus = (self.cluster.fine_tuning or self.cluster.worker).gpus
                _check_fp16(f"evaluate task '{task.name}', fine_tune", gpus)
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


def _check_fp16(place: str, gpus: float) -> None:
    if not gpus:
        raise ValueError(
            f"{place}.precision: DeepSpeed does not train in fp16 on CPUs; give each worker a GPU "
            "(cluster.worker.gpus), or choose bf16 or bf16-autocast"
        )


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, the list of them where none is near."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(names))}" if len(names) <= 12 else ""


def load_job(
    path: str | Path,
    overrides: typing.Sequence[str] = (),
    *,
    sent: bool = False,
    content: bytes | None = None,
) -> JobConfig:
    """Read, override and validate a job file.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` strings, values parsed as YAML; list items by number
            (``train.stages.0.steps=100``).
        sent: the job is to run on other machines: relative paths are faults.
        content: of the file, where it was read already.

    Raises:
        UserError: one line for each fault, naming the field, the value and what would be right.
    """
    tree = parse_content(read_content(path) if content is None else content, path)
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else "is no mapping"
        raise UserError(
            f"{path}: {what}: must be a mapping with the keys {', '.join(JobConfig.model_fields)}"
        )
    return parse_job(tree, str(path), overrides, sent=sent)


def parse_job(
    tree: dict[str, Any], origin: str, overrides: typing.Sequence[str] = (), *, sent: bool = False
) -> JobConfig:
    """Override and validate a job given as plain data; ``origin`` is named in errors."""
    for override in overrides:
        _apply_override(tree, override)
    try:
        job = JobConfig.model_validate(tree, context=SENT if sent else None)
    except UnicodeEncodeError:  # of pydantic; of a record, since what YAML is read from has none
        raise UserError(f"{origin}: holds half of a surrogate pair, which is no text") from None
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
    else:
        lines = list(_switches_as_numbers(tree, job, ""))
        if not lines:
            return job
    # A refused branch of a union reports each alternative: the same line need not stand twice.
    unique = dict.fromkeys(without_credentials(line) for line in lines)
    raise UserError("\n".join(f"{origin}: {line}" for line in unique))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """The value stands in no message: it may be a secret."""
    key, separator, raw = override.partition("=")
    if not separator or not key:
        shown = re.match(r"[\w.-]*", key)
        assert shown is not None
        raise UserError(f"--set {shown[0]}: must be dotted.key=value")
    if not key.isprintable():  # also bytes of the command line that are no text
        raise UserError(f"--set {key!a}: must be dotted.key=value")
    value = parse_yaml(raw, f"--set {key}", key)
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _descend(node, part, key, ".".join(parents[: depth + 1]), create=True)
    if isinstance(node, list):
        _descend(node, last, key, key, create=False)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {key}: {'.'.join(parents)} is a single value, it has no '{last}'")


def _descend(node: Any, part: str, key: str, path: str, *, create: bool) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
            items = f"the list has items 0 to {len(node) - 1}" if node else "the list is empty"
            raise UserError(f"--set {key}: {path}: {items}")
        return node[int(part)]
    if isinstance(node, dict):
        if create and node.get(part) is None:
            node[part] = {}
        return node[part]
    raise UserError(f"--set {key}: {path} is below a single value")


def _switches_as_numbers(value: Any, taken: Any, field: str) -> typing.Iterator[str]:
    """Switches in the place of numbers, which pydantic takes for 1 and 0.

    Args:
        value: as the file has it.
        taken: as the configuration has it.
        field: where, dotted.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            below = taken.get(key) if isinstance(taken, dict) else getattr(taken, key, None)
            yield from _switches_as_numbers(item, below, f"{field}.{key}" if field else key)
    elif isinstance(value, list) and isinstance(taken, list | tuple) and len(value) == len(taken):
        for number, (item, below) in enumerate(zip(value, taken, strict=True)):
            yield from _switches_as_numbers(item, below, f"{field}.{number}")
    elif isinstance(value, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield f"{field}: got {str(value).lower()}; must be a number"


def _explain(detail: Any) -> str:
    tags = (_FROM_SOURCE, _PREPARED, *TASK_TAGS)
    tagged = [p for p in detail["loc"] if not str(p).startswith("function-")]
    location = [part for part in _without_kinds(tagged) if part not in tags]
    field = ".".join(str(part) for part in location) or "job"
    if detail["type"] == "union_tag_invalid":
        kind = detail["input"]["kind"]
        expected = re.findall(r"'([^']*)'", detail["ctx"]["expected_tags"])
        kinds = [TASK_TAGS.get(tag, tag) for tag in expected]
        return f"{field}.kind: got {_shortened(kind)}{did_you_mean(str(kind), kinds)}"
    if detail["type"] == "union_tag_not_found":
        return f"{field}.kind: is required"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(JobConfig, tagged[:-1])
        return f"{field}: unknown key{did_you_mean(str(location[-1]), known)}"
    if detail["type"] == "missing":
        return f"{field}: is required"
    shown = _shown(detail["input"], location)
    if detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float):
        return f"{field}: got {shown}; must be text: put it in quotes"
    if detail["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return f"{field}: got {shown}; must be a block of keys"
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return message if not location or field in message else f"{field}: {message}"
    return f"{field}: got {shown}; {_decapitalised(detail['msg'])}"


def _without_kinds(location: list[Any]) -> typing.Iterator[Any]:
    """A location without the kinds of sources and filters, which pydantic names as if they were keys."""
    key = None
    for part in location:
        if part in _KINDS_BELOW.get(key, ()):
            key = None
            continue
        yield part
        key = key if isinstance(part, int) else part


def _kinds_of(union: Any) -> frozenset[str]:
    models = typing.get_args(typing.get_args(union)[0])
    return frozenset(typing.get_args(model.model_fields["kind"].annotation)[0] for model in models)


_KINDS_BELOW: dict[Any, frozenset[str]] = {
    "source": _kinds_of(SourceConfig),
    "filters": _kinds_of(FilterConfig),
}


def _shown(value: Any, location: list[Any]) -> str:
    # A mistyped secret must not come back in an error text.
    if any(
        word in str(part).lower()
        for part in location
        for word in ("secret", "access_key", "password", "token", "env_vars")
    ):
        return "(hidden)"
    if isinstance(value, dict | list) and value:
        return "a block of keys" if isinstance(value, dict) else "a list"  # whatever it holds
    return _shortened(value)


def _shortened(value: Any) -> str:
    text = without_credentials(repr(value))
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
