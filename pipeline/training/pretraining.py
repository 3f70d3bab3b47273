"""Pre-training as the training loop sees it: shards, the five objectives, batches worked off in parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from cluster.workers import WorkerContext
from model import GLSCLForPreTraining, backward_in_parts
from pipeline.config import JobConfig
from pipeline.planning.simulation import Shape, StepFlops
from pipeline.training.batches import Batch, stage_loader
from pipeline.training.config import Stage, StageBlock
from pipeline.training.engine import build_model, model_config, optimizer_step
from pipeline.training.learner import Losses, Part, reseed_dropout
from pipeline.training.loading import Slot, StageSampler, import_ahead
from pipeline.training.prefetch import PrefetchedSampler, in_flight, open_cache
from pipeline.training.weights import load_weights
from sharding.manifest import Manifest, load_manifest
from sharding.reader import ShardReader
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingSubject:
    """The pre-training of a job.

    Attributes:
        job: the validated job.
        datasets: folder of each prepared dataset, relative to the job's storage, or its url.
    """

    job: JobConfig
    datasets: dict[str, str]

    def learner(self, context: WorkerContext, scratch: Path) -> Pretraining:
        job = self.job.model_copy(update={"train": self.job.train.resized(context.world_size)})
        if job.train.loader_processes:
            import_ahead("pipeline.training.batches")
        storage = open_storage(job.storage)
        readers = _open_readers(job, self.datasets, storage, scratch, context.local_world_size)
        return Pretraining(job, storage, readers, context, scratch)


class Pretraining:
    """See ``learner.Learner``."""

    def __init__(
        self,
        job: JobConfig,
        storage: Storage,
        readers: dict[str, ShardReader],
        context: WorkerContext,
        scratch: Path,
    ) -> None:
        self._job, self._storage, self._readers = job, storage, readers
        self._context, self._scratch = context, scratch
        self._flops = StepFlops(model_config(job.model), context.world_size)

    @property
    def data(self) -> Mapping[str, Manifest]:
        return {name: reader.manifest for name, reader in self._readers.items()}

    def identity(self) -> dict[str, Any]:
        return {}

    def details(self) -> dict[str, Any]:
        return {"data": {name: manifest.digest for name, manifest in self.data.items()}}

    def weights(self, stage: Stage) -> dict[str, float]:
        assert isinstance(stage, StageBlock)
        return {str(name): weight for name, weight in stage.objectives.items()}

    def build_model(self) -> GLSCLForPreTraining:
        job, rank = self._job, self._context.rank
        model = build_model(job.model, job.train, job.seed, self._context.device)
        folder = self._scratch / f"weights-{rank}"
        load_weights(model, job.model.weights, self._storage, folder, tell=rank == 0)
        return model

    def begins(self, record: Mapping[str, Any] | None) -> None:
        """Say what is left out of each dataset, and where that is no longer what it was at the checkpoint."""
        for name, manifest in self.data.items():
            if manifest.dropped:
                share = f"{manifest.dropped} of {manifest.samples} samples"
                logger.info("%s: %s are retracted; their slots stay empty", name, share)
            if record is not None and record["data"][name] != manifest.digest:
                logger.warning("%s: other samples are retracted than at step %d", name, record["step"])

    def loader(self, stage: Stage, start_step: int) -> DataLoader[Any]:
        return stage_loader(
            stage,
            self._job.train,
            self._readers,
            model_config(self._job.model),
            tokenizer=self._job.model.tokenizer,
            seed=self._job.seed,
            start_step=start_step,
            worker=self._context.rank,
            workers=self._context.world_size,
            around=self._prefetched,
        )

    def _prefetched(self, batches: StageSampler) -> Sampler[list[Slot]]:
        """The batches, with a process that fetches their shards ahead where this worker's node has a cache."""
        caches = [reader.cache for reader in self._readers.values() if reader.cache is not None]
        if not caches:
            return batches
        share = caches[0].byte_limit // self._context.local_world_size
        behind = in_flight(self._job.train)
        return PrefetchedSampler(batches, self._readers, byte_limit=share, behind=behind)

    def step_flops(self, stage: Stage, batch: Batch) -> float:
        parts = self._job.train.parts(stage)
        samples, frames, _, _, side = batch.pixel_values.shape
        tokens = batch.input_ids.shape[1]
        shape = Shape(samples // parts, frames, side, tokens, batch.group_size, parts)
        return self._flops.of(shape, self.weights(stage))

    def forward_backward(self, engine: Any, stage: Stage, batch: Batch, part: Part) -> Losses:
        job = self._job
        weights = self.weights(stage)
        parts = job.train.parts(stage)

        def reseed(number: int) -> None:
            reseed_dropout(job.seed, part, self._context.rank, *(() if parts == 1 else (number,)))

        if parts == 1:
            reseed(0)
            output = engine(**batch.model_inputs(), objectives=weights)
            engine.backward(output.loss)
            return Losses(output.losses, output.metrics)

        done = 0

        def backward(loss: torch.Tensor) -> None:
            nonlocal done
            if done:
                optimizer_step(engine, job.train)  # the part before is counted; nothing is updated yet
            engine.backward(
                loss * parts
            )  # the engine averages over the parts, whose gradients belong added up
            done += 1

        output = backward_in_parts(
            engine,
            backward,
            batch.parts(parts),
            config=engine.module.config,
            objectives=weights,
            group_size=batch.group_size,
            reseed=reseed,
        )
        assert output.losses is not None
        assert output.metrics is not None
        return Losses(output.losses, output.metrics)


def _open_readers(
    job: JobConfig, prepared: Mapping[str, str], storage: Storage, scratch: Path, workers_on_node: int
) -> dict[str, ShardReader]:
    """A reader for each dataset that some stage trains on."""
    train = job.train
    names = sorted({name for stage in train.stages for name in stage.mixture})
    datasets = {name: storage.resolve(prepared[name]) for name in names}
    manifests = {name: load_manifest(dataset) for name, dataset in datasets.items()}
    remote = {name: manifests[name] for name, dataset in datasets.items() if dataset.local_path("") is None}
    cache = open_cache(scratch / "shards", train, remote, workers_on_node)
    return {
        name: ShardReader(dataset, manifests[name], cache if name in remote else None, fetches=False)
        for name, dataset in datasets.items()
    }
