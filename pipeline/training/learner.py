"""What the training loop leaves to the kind of training: model, data, and how a batch becomes a gradient.

    Subject   what is to be learnt, from the configuration; travels to the workers
    Learner   a worker's live side of it

Everything else is the loop's: order of samples, accumulation, learning rates, checkpoints and resuming, the ledger
of what was trained on, health, metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from model import GLSCLPreTrainedModel
from pipeline.training.config import Stage
from pipeline.training.data_order import Ordered
from sharding.seeds import derive_seed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from cluster.workers import WorkerContext


class Subject(Protocol):
    """What is to be learnt. Picklable."""

    def learner(self, context: WorkerContext, scratch: Path) -> Learner:
        """Open it on a worker.

        Args:
            scratch: a folder of this machine, shared by its workers.

        Raises:
            UserError: data or weights that are not there or do not fit.
        """


@dataclass(frozen=True)
class Part:
    """Which of a step's contrastive batches is computed: ``number`` of optimizer step ``step``, both from 0."""

    step: int
    number: int


@dataclass(frozen=True)
class Losses:
    """What came of a contrastive batch, over all workers: scalar losses by name, and what else is worth tracking."""

    losses: Mapping[str, torch.Tensor]
    metrics: Mapping[str, torch.Tensor]


class Learner(Protocol):
    """A kind of training on one worker. All workers call the same methods in the same order."""

    @property
    def data(self) -> Mapping[str, Ordered]:
        """What is trained on, by name."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on for the run to go on from it, besides data, seed and precision."""

    def details(self) -> dict[str, Any]:
        """Facts for the record of each checkpoint."""

    def weights(self, stage: Stage) -> dict[str, float]:
        """The losses of a stage by name, and how much each weighs in what is minimised."""

    def build_model(self) -> GLSCLPreTrainedModel:
        """The model before the first step, in training mode, the same on every worker."""

    def begins(self, record: Mapping[str, Any] | None) -> None:
        """Told on worker 0 the record of the checkpoint that the run goes on from; None: from the beginning."""

    def loader(self, stage: Stage, start_step: int) -> DataLoader[Any]:
        """This worker's batches (``TrainingBatch``) from the stage's own step ``start_step`` to its end."""

    def forward_backward(self, engine: Any, stage: Stage, batch: Any, part: Part) -> Losses:
        """Losses of a contrastive batch, its gradient handed to the engine; one step of the engine is left to do.

        Losses that are not finite are returned as they are: the step is judged as a whole (``health.monitor``).
        """


def reseed_dropout(seed: int, part: Part, rank: int, *more: int) -> None:
    """Dropout is the one draw that torch makes from its global generator: seeded anew for each forward."""
    torch.manual_seed(derive_seed(seed, "dropout", part.step, part.number, rank, *more))
