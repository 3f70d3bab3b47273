"""A training in which things go wrong at will: a model of a few weights, made data, real engine and loop."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from cluster.workers import WorkerContext
from pipeline.training.config import Course, Stage
from pipeline.training.learner import Losses, Part
from pipeline.training.loading import Slot, StageSampler, TrainingBatch, batch_loader
from tests.fixtures.groups import run_processes

WIDTH = 6


class SmallConfig(PreTrainedConfig):
    model_type = "small-health"


class SmallModel(PreTrainedModel):
    """One encoder, and two heads of which a batch may leave the second out."""

    config_class = SmallConfig
    _tied_weights_keys = None

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.vision_encoder = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)
        self.post_init()

    def forward(self, inputs: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.vision_encoder(inputs))
        losses = {"first": (self.first(hidden) - inputs.sum(dim=1, keepdim=True)).square().mean()}
        if second:
            losses["second"] = (self.second(hidden) - inputs.prod(dim=1, keepdim=True)).square().mean()
        return losses

    def parameter_groups(self, rate: float, decay: float, **_: float) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": rate, "weight_decay": decay, "name": "encoders"}]


def small_model() -> SmallModel:
    torch.manual_seed(3)
    return SmallModel(SmallConfig())


def small_course(workers: int, *, zero: int = 1, steps: int = 8, **changes: Any) -> Course:
    zero_block: dict[str, Any] = {"stage": zero, **changes.pop("zero_block", {})}
    return Course.model_validate(
        {
            "workers": workers,
            "global_batch": 8,
            "accumulation": 2,
            "lanes": 4,
            "shuffle_window": 8,
            "loader_processes": 0,
            "learning_rate": 1e-2,
            "schedule": {"warmup": 0.0, "decay": "constant"},
            "deepspeed": {"zero_optimization": zero_block},
            "stages": [{"name": "all", "steps": steps, "mixture": {"made": 1}}],
            **changes,
        }
    )


@dataclass(frozen=True)
class _Shard:
    samples: int


@dataclass(frozen=True)
class Made:
    """Data for ``pipeline.training.data_order``."""

    shards_digest: str = "ab" * 32
    shards: Sequence[_Shard] = (_Shard(20), _Shard(20))


@dataclass
class MadeBatch(TrainingBatch):
    inputs: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def to(self, device: torch.device) -> Self:
        return replace(self, inputs=self.inputs.to(device))

    def pin_memory(self) -> Self:
        return self


class MadeSamples(Dataset[Any]):
    """Batches of slots; ``sleeps`` seconds before the ``number``-th, from 0."""

    def __init__(self, number: int | None, sleeps: float) -> None:
        self._number, self._sleeps, self._given = number, sleeps, 0

    def __getitems__(self, slots: Sequence[Slot]) -> Sequence[Slot]:
        if self._given == self._number:
            time.sleep(self._sleeps)
        self._given += 1
        return slots


def collate(slots: Sequence[Slot]) -> MadeBatch:
    def row(slot: Slot) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * slot.shard + slot.row)
        return torch.rand(WIDTH, generator=generator)

    return MadeBatch(
        valid=torch.tensor([slot.row >= 0 for slot in slots]),
        keys=[f"{slot.shard}-{slot.row}" for slot in slots],
        slots=list(slots),
        causes=[None] * len(slots),
        inputs=torch.stack([row(slot) for slot in slots]),
    )


@dataclass(frozen=True)
class Faults:
    """What goes wrong, by step from 1.

    Attributes:
        factors: of the loss of worker ``rank`` (NaN, or large).
        sleeps: for so many seconds its loader is asleep in the step ``asleep_in``.
    """

    factors: Mapping[int, float] = field(default_factory=dict)
    rank: int = 0
    asleep_in: int | None = None
    sleeps: float = 0.0


@dataclass(frozen=True)
class SmallSubject:
    course: Course
    seed: int
    faults: Faults = Faults()

    def learner(self, context: WorkerContext, scratch: Path) -> SmallLearner:
        return SmallLearner(self, context)


class SmallLearner:
    """See ``pipeline.training.learner.Learner``."""

    def __init__(self, subject: SmallSubject, context: WorkerContext) -> None:
        self._subject, self._context = subject, context
        self.data = {"made": Made()}

    def identity(self) -> dict[str, Any]:
        return {}

    def details(self) -> dict[str, Any]:
        return {"data": {"made": "0"}}

    def weights(self, stage: Stage) -> dict[str, float]:
        return {"first": 1.0, "second": 0.5}

    def build_model(self) -> SmallModel:
        return small_model()

    def begins(self, record: Mapping[str, Any] | None) -> None:
        pass

    def loader(self, stage: Stage, start_step: int) -> DataLoader[Any]:
        subject, context = self._subject, self._context
        sampler = StageSampler(
            stage,
            subject.course,
            self.data,
            seed=subject.seed,
            start_step=start_step,
            worker=context.rank,
            workers=context.world_size,
        )
        faults, number = subject.faults, None
        if faults.asleep_in is not None and context.rank == faults.rank:
            number = (faults.asleep_in - 1 - start_step) * subject.course.accumulation
        samples = MadeSamples(number, faults.sleeps)
        return batch_loader(samples, sampler, collate, subject.course.loader_processes)

    def step_flops(self, stage: Stage, batch: Any) -> float:
        return 0.0  # nobody counts

    def forward_backward(self, engine: Any, stage: Stage, batch: MadeBatch, part: Part) -> Losses:
        faults = self._subject.faults
        losses = engine(batch.inputs, second=True)
        if self._context.rank == faults.rank and part.number == 0:
            losses = {name: loss * faults.factors.get(part.step + 1, 1.0) for name, loss in losses.items()}
        engine.backward(losses["first"] + 0.5 * losses["second"])
        return Losses({name: loss.detach() for name, loss in losses.items()}, {})


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Whole and in fp32, on every worker. Collective."""
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_partition_weights()):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def run_group(function: Callable[..., None], workers: int, *arguments: Any) -> None:
    """``function(context, *arguments)`` in so many processes, joined over gloo."""
    run_processes(_worker, workers, free_port(), function, arguments, count=workers)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _worker(rank: int, workers: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    function(join_group(rank, workers, port), *arguments)


def join_group(rank: int, workers: int, port: int) -> WorkerContext:
    """In a process of its own."""
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    return WorkerContext(rank, workers, rank, workers, 0, torch.device("cpu"))
