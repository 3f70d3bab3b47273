"""Fine-tuning as the training loop sees it: the checkpoint's weights, a task's examples, the losses of its head."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from cluster.workers import WorkerContext
from model import GLSCLPreTrainedModel, GLSCLProcessor
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.fine_tuning.config import DATA, FineTuningCourse
from pipeline.fine_tuning.examples import Collator, FineTuningBatch, Sample
from pipeline.training.checkpoints import Checkpoint, fetch_model
from pipeline.training.config import Stage
from pipeline.training.data_order import Ordered
from pipeline.training.learner import Losses, Part, reseed_dropout
from pipeline.training.loading import StageSampler, batch_loader, import_ahead, pixel_memory
from sharding.seeds import derive_seed
from sharding.storage import Storage

if TYPE_CHECKING:
    from model import GLSCLConfig

_NICENESS = 5  # gives way to the training where both share cores


class SizedDataset(Protocol):
    """Samples by slot, and the bytes of the largest one's pixels."""

    @property
    def largest_pixels(self) -> int: ...
    def __getitems__(self, slots: Sequence[Any]) -> list[Sample]: ...


@dataclass(frozen=True)
class Judged:
    """What a forward over B samples gives: the loss to go back from, its terms by name, and [B] how right each is.

    ``loss`` and ``terms`` are scaled so that their mean over the workers is that of one with the whole batch.
    """

    loss: torch.Tensor
    terms: Mapping[str, torch.Tensor]
    right: torch.Tensor


class TaskTraining(Protocol):
    """What a kind of task contributes to its fine-tuning.

    Attributes:
        data: what is trained on.
        weights: of the terms of its loss, by name.
        labels: how many labels an example has; 0: none.
    """

    @property
    def data(self) -> Ordered: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def labels(self) -> int: ...

    def load_model(self, folder: Path) -> GLSCLPreTrainedModel:
        """The task's model with the weights of ``folder``; what it lacks is drawn from torch's generator."""

    def dataset(self, stage: Stage, seed: int) -> SizedDataset:
        """The examples for the loader processes."""

    def judge(self, engine: Any, batch: FineTuningBatch) -> Judged:
        """A forward. Collective."""


@dataclass(frozen=True)
class Material:
    """Where the things are that a fine-tuning reads.

    Attributes:
        storage: the job's; addresses in the task's block are resolved against it.
        datasets: the job's prepared datasets by name.
        folder: of this fine-tuning in the run's storage.
    """

    storage: Storage
    datasets: Mapping[str, Storage]
    folder: Storage


def open_training(task: TaskConfig, material: Material) -> TaskTraining:
    """The examples of a task, read and checked, with what trains on them.

    Raises:
        UserError: annotations, images or a dataset that are not there or do not fit, in one line.
    """
    module: Any = importlib.import_module(f"pipeline.fine_tuning.{task.kind}")
    training: TaskTraining = module.open_training(task, material)
    return training


def model_class(kind: str) -> type[GLSCLPreTrainedModel]:
    """The class of the model that a kind of task fine-tunes and evaluates."""
    module: Any = importlib.import_module(f"pipeline.fine_tuning.{kind}")
    found: type[GLSCLPreTrainedModel] = module.MODEL
    return found


@dataclass(frozen=True)
class FineTuningSubject:
    """The fine-tuning of a checkpoint for a task.

    Attributes:
        task: its block; what is trained on is there.
        course: its recipe, over its number of samples.
        seed: of the run.
        material: see :class:`Material`.
        run: the run's folder, whose ``checkpoint`` is fine-tuned.
        tokenizer: see :meth:`model.GLSCLProcessor.from_config`.
    """

    task: TaskConfig
    course: FineTuningCourse
    seed: int
    material: Material
    run: Storage
    checkpoint: Checkpoint
    tokenizer: str

    def learner(self, context: WorkerContext, scratch: Path) -> FineTuner:
        os.nice(max(0, _NICENESS - os.nice(0)))
        if self.course.loader_processes:
            import_ahead("pipeline.fine_tuning.examples")
        return FineTuner(self, open_training(self.task, self.material), context, scratch)


class FineTuner:
    """See ``pipeline.training.learner.Learner``."""

    def __init__(
        self, subject: FineTuningSubject, training: TaskTraining, context: WorkerContext, scratch: Path
    ) -> None:
        self._subject, self._training, self._context, self._scratch = subject, training, context, scratch
        self._config: GLSCLConfig | None = None

    @property
    def data(self) -> Mapping[str, Ordered]:
        return {DATA: self._training.data}

    def identity(self) -> dict[str, Any]:
        return {"fine_tuned_from": self._subject.checkpoint.digest}

    def details(self) -> dict[str, Any]:
        return {"data": {DATA: self._training.data.shards_digest}, "task": self._subject.task.name}

    def weights(self, stage: Stage) -> dict[str, float]:
        return dict(self._training.weights)

    def build_model(self) -> GLSCLPreTrainedModel:
        subject = self._subject
        self._scratch.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(derive_seed(subject.seed, "initialisation", subject.task.kind))
        with tempfile.TemporaryDirectory(prefix="pretrained-", dir=self._scratch) as folder:
            model = self._training.load_model(fetch_model(subject.run, subject.checkpoint, Path(folder)))
        [stage] = subject.course.stages
        assert stage.resolution is not None
        model.resize_images(stage.resolution)
        if subject.course.activation_checkpointing:
            model.activation_checkpointing_enable()
        self._config = model.config
        model.train()
        return model

    def begins(self, record: Mapping[str, Any] | None) -> None:
        """Nothing is to be told: what is trained on stands in the annotations, and is the same at each start."""

    def loader(self, stage: Stage, start_step: int) -> DataLoader[Any]:
        subject, context = self._subject, self._context
        assert self._config is not None, "the model is built first"
        sampler = StageSampler(
            stage,
            subject.course,
            self.data,
            seed=subject.seed,
            start_step=start_step,
            worker=context.rank,
            workers=context.world_size,
        )
        dataset = self._training.dataset(stage, subject.seed)
        assert isinstance(dataset, Dataset)
        processes = subject.course.loader_processes
        memory = pixel_memory(processes, dataset.largest_pixels * sampler.batch_size)
        processor = GLSCLProcessor.from_config(self._config, tokenizer=subject.tokenizer)
        return batch_loader(dataset, sampler, Collator(processor, self._training.labels, memory), processes)

    def step_flops(self, stage: Stage, batch: FineTuningBatch) -> float:
        return 0.0

    def forward_backward(self, engine: Any, stage: Stage, batch: FineTuningBatch, part: Part) -> Losses:
        reseed_dropout(self._subject.seed, part, self._context.rank)
        judged = self._training.judge(engine, batch)
        names = list(judged.terms)
        found = torch.stack(
            [
                *(judged.terms[name].detach().float() for name in names),
                judged.right.float().masked_fill(~batch.valid, 0.0).sum(),
                batch.valid.sum().float(),
            ]
        )
        dist.all_reduce(found)
        *sums, right, samples = found
        losses = {name: total / self._context.world_size for name, total in zip(names, sums, strict=True)}
        engine.backward(judged.loss)
        return Losses(losses, {"accuracy": right / samples.clamp(min=1.0)})


def right_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How right the likeliest label is: [B] of ``logits`` and ``labels`` [B, A]."""
    return labels.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
