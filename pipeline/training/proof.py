"""Proof of what a run was trained on: its consumption ledger against what its configuration and data demand.

Each step's slots are computed again from the run's record and the datasets' manifests (``data_order``) and
compared with what the workers noted (``consumption``). Of each whole epoch it is proven besides, without trusting
that computation, that its steps hold every sample of the dataset exactly once: their hashes add up to those of
all samples.

Takes memory for a batch, the plan of an epoch, and the ledger's parts as stored (some 40 bytes a step); time of
about half a microsecond for each sample the run was shown, and once for each sample of a dataset. Reads no
sample and no index.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.training.checkpoints import Checkpoint
from pipeline.training.config import TrainBlock
from pipeline.training.consumption import (
    MODULUS,
    RETRACTED,
    Gap,
    PartReference,
    SampleHash,
    StepRecord,
    read_ledger,
)
from pipeline.training.data_order import DataOrder, StepData
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.order import EMPTY
from sharding.storage import Storage


@dataclass(frozen=True)
class Mismatch:
    """A step that was not trained on what it should have been, or (``step`` None) an epoch that does not add up."""

    step: int | None
    dataset: str
    epoch: int
    reason: str


@dataclass
class EpochProof:
    """What is proven of one epoch of a dataset, as far as the run has come.

    Attributes:
        samples: of the dataset, retracted ones included.
        stages: names of the stages it went through.
        steps, proven: of the epoch up to the checkpoint, and those of them that match the ledger.
        planned: samples that had their slot in these steps.
        trained: samples trained on in the proven steps.
        masked: samples in them that kept their slot but could not be read, by cause.
        retracted: samples in them that were left out by the manifest's overlay.
        complete: each sample of the dataset was trained on exactly once, or is among masked and retracted.
    """

    dataset: str
    epoch: int
    samples: int
    stages: list[str] = field(default_factory=list)
    steps: int = 0
    proven: int = 0
    planned: int = 0
    trained: int = 0
    masked: Counter[str] = field(default_factory=Counter)
    retracted: int = 0
    complete: bool = False
    total: int = 0  # of the hashes of trained, masked and retracted samples

    @property
    def finished(self) -> bool:
        """Whether every sample had its slot."""
        return self.planned == self.samples


@dataclass
class Proof:
    """The outcome, up to ``checkpoint``. ``steps``: those that were asked for; ``parts``: of the ledger."""

    checkpoint: Checkpoint
    parts: int
    gaps: list[Gap]
    steps: int = 0
    proven: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    epochs: list[EpochProof] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every step asked for is proven, and every finished epoch complete."""
        return self.proven == self.steps and not self.mismatches


def prove(
    run: Storage,
    checkpoints: Sequence[Checkpoint],
    configuration: Mapping[str, Any],
    manifests: Mapping[str, Manifest],
    *,
    epoch: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Proof:
    """Compare the ledger of a run with what it had to be trained on.

    Args:
        run: its folder.
        checkpoints: the one up to which the proof goes, then those before it that are still there, newest
            first: they vouch for the earlier parts where one between is lost.
        configuration: the newest in the run's record.
        manifests: of the datasets that its stages trained on up to there.
        epoch: look at this epoch of each dataset only; None: at all.
        progress: is told of each step.

    Raises:
        UserError: the run has no ledger, or was trained on other data than ``manifests``.
    """
    newest = checkpoints[0]
    _refuse(newest, manifests, run)
    train = TrainBlock.model_validate(configuration["train"])
    order = DataOrder(train, manifests, configuration["seed"])
    vouched = [
        PartReference(**one.record["consumption"]) for one in checkpoints if "consumption" in one.record
    ]
    ledger = read_ledger(run, vouched)
    judge = _Judge(Proof(newest, len(ledger.parts), ledger.gaps), order, manifests)
    planned = ((stage.name, step) for stage in train.stages for step in order.stage(stage))
    records = ledger.records()
    record = next(records, None)
    for number, (stage_name, step) in enumerate(itertools.islice(planned, newest.step), start=1):
        while record is not None and record.step < number:
            record = next(records, None)
        if epoch is None or step.epoch == epoch:
            noted = record if record is not None and record.step == number else None
            judge.step(number, stage_name, step, noted)
            progress(number)
    return judge.close()


def _refuse(checkpoint: Checkpoint, manifests: Mapping[str, Manifest], run: Storage) -> None:
    url = run.url_of(checkpoint.path)
    if "consumption" not in checkpoint.record:
        raise UserError(f"{url} was written without a consumption ledger: nothing can be proven")
    for name, manifest in manifests.items():
        trained_on = checkpoint.record["shards"][name]
        if manifest.shards_digest != trained_on:
            raise UserError(
                f"{url} was trained on other shards of '{name}' (digest {trained_on[:12]}) than lie in its "
                f"dataset's folder now ({manifest.shards_digest[:12]}): nothing can be proven"
            )


class _Judge:
    """Compares step by step, and adds up the epochs."""

    def __init__(self, proof: Proof, order: DataOrder, manifests: Mapping[str, Manifest]) -> None:
        self._proof, self._order, self._manifests = proof, order, manifests
        self._hashes = {name: SampleHash(manifest.shards_digest) for name, manifest in manifests.items()}
        self._current: dict[str, EpochProof] = {}
        self._everything: dict[str, int] = {}

    def step(self, number: int, stage: str, step: StepData, record: StepRecord | None) -> None:
        """Compare one step; None: the ledger has nothing of it."""
        epoch = self._epoch(step)
        if stage not in epoch.stages:
            epoch.stages.append(stage)
        slots = self._order.slots(step)
        planned = slots[slots[:, 0] != EMPTY]
        epoch.steps += 1
        epoch.planned += len(planned)
        self._proof.steps += 1
        if record is None:
            return  # a gap, of which the ledger has given the reason
        masked = np.array([(one.shard, one.row) for one in record.masked], dtype=np.int64).reshape(-1, 2)
        total = (record.digest + self._hashes[step.dataset].total(masked)) % MODULUS
        fault = self._fault(step, record, planned, masked, total, empty=len(slots) - len(planned))
        if fault:
            self._proof.mismatches.append(Mismatch(number, step.dataset, step.epoch, fault))
            return
        self._proof.proven += 1
        epoch.proven += 1
        epoch.trained += record.trained
        causes = Counter(one.cause for one in record.masked)
        epoch.retracted += causes.pop(RETRACTED, 0)
        epoch.masked += causes
        epoch.total = (epoch.total + total) % MODULUS

    def close(self) -> Proof:
        """The outcome, once all steps were seen."""
        for epoch in self._current.values():
            self._close(epoch)
        return self._proof

    def _epoch(self, step: StepData) -> EpochProof:
        held = self._current.get(step.dataset)
        if held is not None and held.epoch == step.epoch:
            return held
        if held is not None:
            self._close(held)
            if not held.finished:
                left = f"the next epoch begins, but {held.samples - held.planned} samples had no slot"
                self._proof.mismatches.append(Mismatch(None, held.dataset, held.epoch, left))
        begun = EpochProof(step.dataset, step.epoch, self._order.samples(step.dataset))
        self._current[step.dataset] = begun
        self._proof.epochs.append(begun)
        return begun

    def _close(self, epoch: EpochProof) -> None:
        if not epoch.finished or epoch.proven != epoch.steps:
            return
        if epoch.total == self._of_all_samples(epoch.dataset):
            epoch.complete = True
        else:
            odd = "its steps do not hold every sample of the dataset once"
            self._proof.mismatches.append(Mismatch(None, epoch.dataset, epoch.epoch, odd))

    def _fault(
        self,
        step: StepData,
        record: StepRecord,
        planned: np.ndarray,
        masked: np.ndarray,
        total: int,
        *,
        empty: int,
    ) -> str | None:
        """What is wrong with a step, in words."""
        if (record.dataset, record.epoch) != (step.dataset, step.epoch):
            return f"is of epoch {record.epoch} of '{record.dataset}' in the ledger"
        counted = record.trained + len(masked)
        if (counted, record.empty) != (len(planned), empty):
            return f"{counted} samples and {record.empty} empty slots, not {len(planned)} and {empty}"
        if len(masked) and not set(map(tuple, masked.tolist())) <= set(map(tuple, planned.tolist())):
            return "a sample was masked that does not belong to it"
        if total != self._hashes[step.dataset].total(planned):
            return "other samples were trained on than belong to it"
        return None

    def _of_all_samples(self, dataset: str) -> int:
        """Sum of the hashes of every sample of a dataset, shard by shard."""
        if dataset not in self._everything:
            total = 0
            for number, shard in enumerate(self._manifests[dataset].shards):
                rows = np.arange(shard.samples, dtype=np.int64)
                total += self._hashes[dataset].total(np.stack([np.full_like(rows, number), rows], axis=1))
            self._everything[dataset] = total % MODULUS
        return self._everything[dataset]
