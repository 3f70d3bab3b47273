"""A run on a temporary folder with a dataset and a few checkpoints, for tests of what evaluates them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.actor import Assignment
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.result import Family, Measured, TaskResult
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.training.checkpoints import Checkpoint
from sharding.manifest import Counts, Manifest
from sharding.storage import Storage, open_storage


@dataclass
class EvaluationRun:
    """``steps`` may be changed by a test: the list of committed checkpoints."""

    root: Storage
    run: Storage
    dataset: Storage
    steps: list[int]

    def checkpoints(self, run: Storage) -> Sequence[Checkpoint]:
        """Stands for ``list_checkpoints``."""
        return [self.checkpoint(step) for step in self.steps]

    def checkpoint(self, step: int) -> Checkpoint:
        digest = hashlib.sha256(str(step).encode()).hexdigest()
        record = {"stage_end": step % 20 == 0, "files": {}}
        return Checkpoint(step, step // 21, f"checkpoints/step-{step:08d}", digest, record)

    def config(self, *tasks: str | TaskConfig, **options: object) -> EvaluateConfig:
        made = [task(one) if isinstance(one, str) else one for one in tasks or ("retrieval",)]
        return EvaluateConfig.model_validate({"tasks": made, **options})


def task(name: str, **options: Any) -> RetrievalTask:
    """A task on the run's dataset."""
    return RetrievalTask(name=name, dataset="pairs", **options)


def make_run(folder: Path, steps: list[int]) -> EvaluationRun:
    """A new one."""
    root = open_storage(folder / "storage")
    manifest = Manifest(
        name="pairs",
        modality="image",
        configuration={},
        configuration_digest="0",
        source={},
        shards=[],
        counts=Counts(),
    )
    root.write_json("datasets/pairs/manifest.json", manifest.model_dump(mode="json"))
    return EvaluationRun(root, root.at("runs/one"), root.at("datasets/pairs"), steps)


@dataclass(frozen=True)
class Script:
    """An evaluation that notes each attempt in a file and does what ``steps`` says for the step of the
    checkpoint: actions of :func:`act`, ``X-of-TASK`` for one task alone.
    """

    notes: Path
    steps: Mapping[int, str]

    def __call__(self) -> Callable[[Assignment], TaskResult]:
        return self.evaluate

    def evaluate(self, assignment: Assignment) -> TaskResult:
        step = assignment.checkpoint.step
        earlier = self.attempts().count((assignment.task.name, step))
        with self.notes.open("a") as file:
            file.write(f"{assignment.task.name} {step}\n")
        for action in self.steps.get(step, "").split():
            what, _, name = action.partition("-of-")
            if name in ("", assignment.task.name):
                act(what, earlier)
        metrics = {
            name: Measured(np.full(4, value))
            for name, value in (("t2i_R10", step / 100), ("i2t_R10", step / 200))
        }
        return TaskResult([Family("pairs", list("abcd"), metrics)], facts={"t2i_chance_R10": 0.04})

    def attempts(self) -> list[tuple[str, int]]:
        """(task, step) of every attempt so far."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]


def act(action: str, earlier: int) -> None:
    """``once-X`` does X at the first attempt only."""
    import os
    import signal

    from sharding.errors import BadData

    if action.startswith("once-"):
        if earlier:
            return
        action = action.removeprefix("once-")
    if action == "raise":
        raise RuntimeError("it broke")
    if action == "damaged":
        raise BadData("sha256-mismatch", "model.safetensors is not what was committed")
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        time.sleep(600)
    if action == "slow":
        time.sleep(1.5)
