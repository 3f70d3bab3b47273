"""What a run's records say of one of its checkpoints, for the model card.

Only what is named here leaves the storage: a job's DeepSpeed block, its tracking address and the paths of its data
may hold credentials, and are of no use to others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.ledger import Ledger, Outcome
from pipeline.export.source import RunSource
from sharding.manifest import MANIFEST_PATH, Manifest, find_manifest

if TYPE_CHECKING:
    from model import GLSCLConfig
    from pipeline.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Data:
    """A dataset the run used. ``manifest`` is None where the dataset is gone, or not the one of ``digest`` any more."""

    name: str
    digest: str
    training: bool
    evaluation: bool
    manifest: Manifest | None


@dataclass(frozen=True)
class Stage:
    """A stage as far as the checkpoint goes: ``done`` of ``steps``; the rest as in the job, defaults filled in."""

    name: str
    done: int
    steps: int
    mixture: dict[str, float]
    objectives: dict[str, float]
    resolution: int
    frames: int
    global_batch: int
    accumulation: int
    learning_rate: float | None
    schedule: dict[str, Any] | None
    augmentation: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """Everything the card tells.

    Args:
        run: the run's name.
        config: of the model.
        parameters: how many the weights hold.
        weights: sha256 by file.
        seed, workers, precision, zero_stage: as the checkpoint's own record has them.
        train: of the job's ``train`` block what decides the weights (see ``_TRAIN``).
        steps: of all stages of the job.
        shared_steps: of those of them that have no schedule of their own.
        begun_with: names of the weights files, without the places they lay in.
        code: of each start of the training that ran other code than the one before; empty: not recorded.
        outcomes: finished evaluations of this checkpoint, failed ones too; of a fine-tuned model those of its task.
        architecture: name of the class whose weights they are.
        fine_tuned: the record of the fine-tuning, where the model is fine-tuned.
        license: as the user states it.
    """

    run: str
    checkpoint: Checkpoint
    config: GLSCLConfig
    parameters: int
    weights: dict[str, str]
    seed: int
    workers: int
    precision: str
    zero_stage: int
    train: dict[str, Any]
    stages: list[Stage]
    steps: int
    shared_steps: int
    begun_with: list[str]
    code: list[dict[str, str]]
    data: list[Data]
    outcomes: list[Outcome]
    architecture: str
    fine_tuned: dict[str, Any] | None
    license: str | None


_TRAIN = (
    *("learning_rate", "fusion_multiplier", "head_multiplier", "weight_decay", "betas", "eps", "clipping"),
    "schedule",
)


def gather(
    source: RunSource,
    checkpoint: Checkpoint,
    weights: Path,
    license_: str | None,
    fine_tuned: dict[str, Any] | None = None,
) -> Facts:
    """The facts of ``checkpoint``, whose verified weights are in the folder ``weights``.

    Args:
        fine_tuned: the record of its fine-tuning, where the weights are those that came of it.
    """
    from model import GLSCLConfig

    configuration, record = source.record["configuration"], checkpoint.record
    train, config = configuration["train"], GLSCLConfig.from_pretrained(weights)
    model = configuration["model"]
    side = GLSCLConfig.preset(model["preset"], **model["overrides"]).image_size  # not a fine-tuned model's
    stages = _stages(train, side, checkpoint.step)
    outcomes = [one for one in Ledger(source.run).outcomes() if one.checkpoint["digest"] == checkpoint.digest]
    if fine_tuned is not None:
        version = (fine_tuned["task"], fine_tuned["task_version"])
        outcomes = [one for one in outcomes if (one.task, one.version) == version]
    committed = checkpoint.files if fine_tuned is None else fine_tuned["files"]
    files = {PurePosixPath(name).name: entry["sha256"] for name, entry in committed.items()}
    return Facts(
        run=PurePosixPath(source.run.url).name,
        checkpoint=checkpoint,
        config=config,
        parameters=_count(weights),
        weights={name: digest for name, digest in files.items() if name.endswith(".safetensors")},
        seed=record["seed"],
        workers=record["world_size"],
        precision=record["precision"],
        zero_stage=record["zero_stage"],
        train={name: train[name] for name in _TRAIN},
        stages=stages,
        steps=sum(stage["steps"] for stage in train["stages"]),
        shared_steps=sum(stage["steps"] for stage in train["stages"] if stage["schedule"] is None),
        begun_with=[PurePosixPath(place).name for place in configuration["model"]["weights"]],
        code=source.record.get("code", []),
        data=_data(source, checkpoint, stages, outcomes),
        outcomes=outcomes,
        architecture=(config.architectures or ["GLSCLForPreTraining"])[0],
        fine_tuned=fine_tuned,
        license=license_,
    )


def _stages(train: dict[str, Any], image_size: int, step: int) -> list[Stage]:
    found, first = [], 0
    for stage in train["stages"]:
        done = min(stage["steps"], step - first)
        if done > 0:
            found.append(
                Stage(
                    name=stage["name"],
                    done=done,
                    steps=stage["steps"],
                    mixture=stage["mixture"],
                    objectives=stage["objectives"],
                    resolution=stage["resolution"] or image_size,
                    frames=stage["frames"],
                    global_batch=stage["global_batch"] or train["global_batch"],
                    accumulation=stage["accumulation"] or train["accumulation"],
                    learning_rate=stage["learning_rate"],
                    schedule=stage["schedule"],
                    augmentation=stage["augmentation"],
                )
            )
        first += stage["steps"]
    return found


def _data(
    source: RunSource, checkpoint: Checkpoint, stages: list[Stage], outcomes: list[Outcome]
) -> list[Data]:
    trained = {name for stage in stages for name in stage.mixture}
    read = {(name, digest) for name, digest in checkpoint.record["data"].items() if name in trained}
    asked = {(one.dataset["name"], one.dataset["digest"]) for one in outcomes}
    return [
        Data(
            name,
            digest,
            training=(name, digest) in read,
            evaluation=(name, digest) in asked,
            manifest=_manifest(source, name, digest),
        )
        for name, digest in (*sorted(read), *sorted(asked - read))
    ]


def _manifest(source: RunSource, name: str, digest: str) -> Manifest | None:
    path = source.record["datasets"].get(name)
    if path is None or not source.root.resolve(path).exists(MANIFEST_PATH):
        return None
    return find_manifest(source.root.resolve(path), digest)


def _count(weights: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in weights.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total
