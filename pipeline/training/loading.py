"""How samples come to the training, whatever they are: slots, batches of them, and the processes that load them.

Everything is a function of (the data's digests, run seed, stage, step): the loader's state is the step. Which
samples a global batch holds is told by ``data_order``. A global batch of G samples is A contrastive batches of
C = G/A; each of the L lanes gives C/L consecutive samples (a *group*) to a contrastive batch, and each worker
holds a contiguous slice of the lanes::

    global batch   lane 0: a0 a0 a1 a1   lane 1: a0 a0 a1 a1   ...      A = 2, C/L = 2
    worker 0, accumulation step 0:  lane 0's a0 a0 | lane 1's a0 a0 | ...   each | a group
"""

from __future__ import annotations

import multiprocessing.forkserver
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.training.config import Course, Stage
from pipeline.training.consumption import RETRACTED
from pipeline.training.data_order import DataOrder, Ordered
from pipeline.training.health.stacks import write_stacks_on_signal
from pipeline.training.transport import SharedPixels, send_batches_through_slots
from sharding.errors import StorageFault, UserError
from sharding.forkserver import forkserver

#: Batches that each loader process works on ahead of the training.
PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class Slot:
    """A place in a batch: where its sample lies, or ``row`` -1 for the empty slots at an epoch's end."""

    dataset: str
    shard: int
    row: int
    epoch: int


@dataclass
class TrainingBatch:
    """One worker's part of a contrastive batch of B samples: what the training loop has to know of it.

    Attributes:
        valid: bool [B]; the other samples enter no loss.
        keys: of the samples.
        slots: where each sample lies.
        causes: why a sample is not valid; None for those that are, and for empty slots.
    """

    valid: torch.Tensor
    keys: list[str]
    slots: list[Slot]
    causes: list[str | None]

    @property
    def bad(self) -> Counter[str]:
        """Unreadable samples by cause; neither empty slots nor retracted samples are bad."""
        return Counter(cause for cause in self.causes if cause not in (None, RETRACTED))

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on ``device``."""

    @abstractmethod
    def pin_memory(self) -> Self:
        """Page-locked copies, so that :meth:`to` overlaps with computing (the DataLoader calls this)."""


class StageSampler(Sampler[list[Slot]]):
    """The slots of one worker's batches, from ``start_step`` to the stage's end, ``accumulation`` lists a step."""

    def __init__(
        self,
        stage: Stage,
        train: Course,
        datasets: Mapping[str, Ordered],
        *,
        seed: int,
        start_step: int,
        worker: int,
        workers: int,
    ) -> None:
        self._stage, self._train, self._start_step = stage, train, start_step
        self._worker, self._workers = worker, workers
        self._order = DataOrder(train, datasets, seed)

    @property
    def group_size(self) -> int:
        """Samples that one lane gives to one contrastive batch."""
        return self._train.batch_of(self._stage) // (
            self._train.lanes * self._train.accumulation_of(self._stage)
        )

    @property
    def batch_size(self) -> int:
        """Samples of one worker in one contrastive batch."""
        return self._train.batch_of(self._stage) // (self._train.accumulation_of(self._stage) * self._workers)

    def __len__(self) -> int:
        return (self._stage.steps - self._start_step) * self._train.accumulation_of(self._stage)

    def __iter__(self) -> Iterator[list[Slot]]:
        for step in self._order.stage(self._stage, self._start_step):
            slots = self._order.slots(step, self._worker, self._workers)
            lanes = self._train.lanes // self._workers
            accumulation = self._train.accumulation_of(self._stage)
            by_batch = slots.reshape(lanes, accumulation, self.group_size, 2).swapaxes(0, 1)
            for part in by_batch:
                yield [
                    Slot(step.dataset, shard, row, step.epoch) for shard, row in part.reshape(-1, 2).tolist()
                ]


def import_ahead(*modules: str) -> None:
    """Let the server that forks loader processes start now, in the background, and import ``modules`` once for all.

    Each loader process of each stage would else import torch and what comes with it for itself, which takes seconds
    of a core and some hundred MB. To be called before anything else is forked by this process's server.
    """
    forkserver().set_forkserver_preload(["__main__", *modules])
    multiprocessing.forkserver.ensure_running()


def pixel_memory(processes: int, size: int) -> SharedPixels | None:
    """Memory for the pixels of batches on their way, ``size`` bytes each; None where no process loads them."""
    # The batch at hand and the one before it come on top of those under way.
    return SharedPixels(processes, PREFETCHED_BATCHES + 2, size) if processes else None


def batch_loader(
    dataset: Dataset[Any],
    sampler: Sampler[list[Slot]],
    collate: Callable[[Sequence[Any]], TrainingBatch],
    processes: int,
) -> DataLoader[Any]:
    """Batches in the sampler's order, made by so many processes ahead of the training, or (0) when asked for."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=processes,
        collate_fn=collate,
        # s3fs and gloo threads do not survive a fork; the server process forks before either exists.
        multiprocessing_context=forkserver() if processes else None,
        prefetch_factor=PREFETCHED_BATCHES if processes else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_loader_process,
    )


@contextmanager
def in_one_line() -> Iterator[None]:
    """Faults of the storage that a loader process met, as it told them: torch makes its whole traceback the message."""
    try:
        yield
    except (StorageFault, UserError) as error:
        lines = str(error).splitlines()
        if not lines or not lines[0].startswith("Caught "):
            raise
        raise type(error)(lines[-1].partition(f"{type(error).__name__}: ")[2] or lines[-1]) from None


def _begin_loader_process(_: int) -> None:
    # Loader processes share the cores with the training; more threads each only contend.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    send_batches_through_slots()
    write_stacks_on_signal()
