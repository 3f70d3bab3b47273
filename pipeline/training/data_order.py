"""Which samples each step of a run trains on: the stages' mixtures over the order of ``sharding.order``.

A pure function of (the manifests' shards, the run's seed, its stages): every worker computes its own part, a
restart any step without those before it, and ``glscl verify-epoch`` all of them after the fact.

An epoch belongs to the dataset, not to the stage: a stage that goes on with a dataset takes up its epoch where
the stage before left it, also with batches of another size. So at any step of a run, however short its stages,
no sample was shown more than once more than another of its dataset. For L = 2 lanes of 10 samples::

    stage      | first: G = 4 | second: G = 8
    lane 0     | a b | c d    | e f g h | i j . . | f a i c | ...      a batch is of one epoch:
    epoch      | 0   | 0      | 0       | 0       | 1                  the dots are empty slots
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sharding.order import EpochOrder, batch_slots, epoch_order, steps_per_epoch
from sharding.seeds import derive_seed

if TYPE_CHECKING:
    from pipeline.training.config import Course, Stage


class Sized(Protocol):
    """A shard, as far as the order is concerned."""

    @property
    def samples(self) -> int: ...


class Ordered(Protocol):
    """Data that can be put in order: a dataset's manifest, or what a task reads in a format of its own.

    Attributes:
        shards_digest: of what the shards hold, so that other data have another order.
        shards: what lies together, in a fixed order; a sample is (number of its shard, row).
    """

    @property
    def shards_digest(self) -> str: ...
    @property
    def shards(self) -> Sequence[Sized]: ...


@dataclass(frozen=True)
class StepData:
    """Where the samples of one step come from.

    Attributes:
        dataset, epoch: of all its samples.
        taken: samples that each lane gave in this epoch before the first batch of this size.
        position: which batch of this size, from 0.
        global_batch: slots of the step over all workers.
    """

    dataset: str
    epoch: int
    taken: int
    position: int
    global_batch: int


@dataclass(frozen=True)
class _Progress:
    """How far a dataset has been shown: its epoch, and how many samples of it each lane has given."""

    epoch: int = 0
    taken: int = 0


def draw_mixture(seed: int, stage: str, steps: int, mixture: Mapping[str, float]) -> list[str]:
    """The dataset of each of a stage's steps, drawn by the mixture's weights; the same on every worker."""
    names, picks = _draw(seed, stage, steps, mixture)
    return [names[pick] for pick in picks]


def _draw(seed: int, stage: str, steps: int, mixture: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Names, and for each step the number of its name: int64 [steps]. 30 ms for a million steps."""
    names = sorted(mixture)
    weights = np.array([mixture[name] for name in names], dtype=np.float64)
    raw = np.random.Philox(key=derive_seed(seed, "mixture", stage)).random_raw(steps)
    draws = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    borders = np.cumsum(weights)[:-1] / weights.sum()
    return names, np.searchsorted(borders, draws, side="right")


class DataOrder:
    """The samples of every step of a run.

    Holds the plan of one epoch of each dataset at hand (two numbers a shard), and one small number a step.

    Args:
        train: its lanes, window, global batch and stages decide.
        datasets: each dataset that a stage trains on.
        seed: of the run.
    """

    def __init__(self, train: Course, datasets: Mapping[str, Ordered], seed: int) -> None:
        self._train, self._seed = train, seed
        self._shards = {name: dataset.shards_digest for name, dataset in datasets.items()}
        self._counts = {
            name: np.array([shard.samples for shard in dataset.shards], dtype=np.int64)
            for name, dataset in datasets.items()
        }
        self._samples = {name: int(counts.sum()) for name, counts in self._counts.items()}
        self._orders: dict[str, EpochOrder] = {}

    def samples(self, dataset: str) -> int:
        """Samples of an epoch, retracted ones included."""
        return self._samples[dataset]

    def stage(self, stage: Stage, start_step: int = 0) -> Iterator[StepData]:
        """The steps of a stage, from its own step ``start_step`` on. O(steps before) once, then O(1) each.

        Args:
            stage: one of the run's, told by its name (the number of its steps may differ).
        """
        progress = self._before(stage)
        names, picks = _draw(self._seed, stage.name, stage.steps, stage.mixture)
        done = np.bincount(picks[:start_step], minlength=len(names)).tolist()
        global_batch = stage.global_batch or self._train.global_batch
        for pick in picks[start_step:].tolist():
            name = names[pick]
            yield self._locate(name, progress.get(name, _Progress()), done[pick], global_batch)
            done[pick] += 1

    def slots(self, step: StepData, worker: int = 0, workers: int = 1) -> np.ndarray:
        """int64 [global_batch / workers, 2]: (shard, row) of one worker's slots, see ``sharding.order.batch_slots``."""
        order = self._order(step.dataset, step.epoch)
        return batch_slots(order, step.position, step.global_batch, worker, workers, taken=step.taken)

    def _before(self, stage: Stage) -> dict[str, _Progress]:
        """How far each of the stage's datasets has been shown when it begins."""
        progress: dict[str, _Progress] = {}
        for earlier in self._train.stages:
            if earlier.name == stage.name:
                return progress
            names, picks = _draw(self._seed, earlier.name, earlier.steps, earlier.mixture)
            global_batch = earlier.global_batch or self._train.global_batch
            for name, steps in zip(names, np.bincount(picks, minlength=len(names)).tolist(), strict=True):
                if steps and name in stage.mixture:
                    last = self._locate(name, progress.get(name, _Progress()), steps - 1, global_batch)
                    per_lane = global_batch // self._train.lanes
                    taken = last.taken + (last.position + 1) * per_lane
                    progress[name] = _Progress(last.epoch, taken)
        raise ValueError(f"the run has no stage '{stage.name}'")

    def _locate(self, name: str, progress: _Progress, steps: int, global_batch: int) -> StepData:
        """The dataset's batch after ``steps`` others of this size, which began at ``progress``."""
        samples, lanes = self._samples[name], self._train.lanes
        left = steps_per_epoch(samples, lanes, global_batch, progress.taken)
        if steps < left:
            return StepData(name, progress.epoch, progress.taken, steps, global_batch)
        epochs, position = divmod(steps - left, steps_per_epoch(samples, lanes, global_batch))
        return StepData(name, progress.epoch + 1 + epochs, 0, position, global_batch)

    def _order(self, name: str, epoch: int) -> EpochOrder:
        held = self._orders.get(name)
        if held is None or held.epoch != epoch:
            train = self._train
            held = epoch_order(
                self._shards[name], self._seed, epoch, self._counts[name], train.lanes, train.shuffle_window
            )
            self._orders[name] = held
        return held
