"""The training loop: what every worker runs, to be read from top to bottom.

:func:`train` -> for each stage :func:`_run_stage` -> for each step :func:`_train_step`. All workers take the same
path: whatever one decides alone (a damaged checkpoint, a loss that is not finite) is agreed on first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Sampler

from cluster.board import Board
from cluster.workers import WorkerContext
from model import backward_in_parts
from pipeline.config import JobConfig, StageBlock
from pipeline.tracking import MetricLogger
from pipeline.training.batches import Batch, Slot, StageSampler, stage_loader
from pipeline.training.checkpoints import Checkpoint, resume, save_checkpoint
from pipeline.training.consumption import ConsumptionRecorder, PartReference
from pipeline.training.engine import build_engine, build_model, gradient_norm, model_config, optimizer_step
from pipeline.training.health import BadSampleGuard, check_finite
from pipeline.training.prefetch import PrefetchedSampler, in_flight, open_cache
from pipeline.training.schedule import learning_rate_scale, set_learning_rates
from pipeline.training.weights import load_weights
from sharding.manifest import load_manifest
from sharding.reader import ShardReader
from sharding.seeds import derive_seed
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """All that a worker needs to know; travels from the driver to the workers.

    Attributes:
        job: the validated job.
        datasets: folder of each prepared dataset, relative to the job's storage, or its url.
        run_path: the run's folder, relative to the job's storage.
        tracking_key: names the MLflow run before it has an id (the server may be away at the start).
        tracking_run: the id of the MLflow run, if there is one yet.
        scratch: local folder for checkpoints on their way and for the shard cache.
        board: where progress is posted for the driver, if it watches.
    """

    job: JobConfig
    datasets: dict[str, str]
    run_path: str
    tracking_key: str
    tracking_run: str | None
    scratch: Path
    board: Board | None = None

    def warn(self, message: str) -> None:
        """Tell the worker's log and, through the board, the person at the driver."""
        logger.error(message)
        if self.board is not None:
            self.board.post("warning", message)


@dataclass
class _Worker:
    """One worker's live parts."""

    plan: TrainingPlan
    context: WorkerContext
    run: Storage
    engine: Any
    peaks: list[float]
    readers: dict[str, ShardReader]
    metrics: MetricLogger | None
    guard: BadSampleGuard
    consumption: ConsumptionRecorder
    seconds: dict[str, float] = field(default_factory=dict)


def train(context: WorkerContext, plan: TrainingPlan) -> None:
    """Train all stages of the job from its newest good checkpoint, or from the beginning. Collective.

    Raises:
        UserError: the run was begun with other data, workers or ZeRO stage.
        NonFiniteLoss, BadDataLimit: see ``health``.
    """
    job = plan.job
    started = time.monotonic()
    storage = open_storage(job.storage)
    run = storage.at(plan.run_path)
    readers = _open_readers(storage, plan, context.local_world_size)
    model = build_model(job.model, job.train, job.seed)
    load_weights(
        model,
        job.model.weights,
        storage,
        plan.scratch / f"weights-{context.rank}",
        tell=context.rank == 0,
    )
    engine, peaks = build_engine(model, job.train, context)
    identity = _identity(job, readers)
    newest = resume(engine, run, context, plan.scratch, expected=identity, warn=plan.warn)
    step = newest.step if newest else 0
    consumed = PartReference(**newest.record["consumption"]) if newest else None
    if context.rank == 0:
        logger.info("%s at step %d of %d", "resuming" if newest else "starting", step, job.train.total_steps)
        _tell_retracted(readers, newest)

    metrics = None
    if context.rank == 0:
        metrics = MetricLogger(
            job.tracking, plan.tracking_key, run_id=plan.tracking_run, spool=run.at("tracking")
        )
    with closing(metrics) if metrics else nullcontext():
        worker = _Worker(
            plan=plan,
            context=context,
            run=run,
            engine=engine,
            peaks=peaks,
            readers=readers,
            metrics=metrics,
            guard=BadSampleGuard(job.train.bad_sample_limit, context.device),
            consumption=ConsumptionRecorder(run, identity["shards"], consumed),
        )
        worker.seconds["startup"] = time.monotonic() - started
        first = 0
        for index, stage in enumerate(job.train.stages):
            if step < first + stage.steps:
                _run_stage(worker, index, stage, first, step - first)
                step = first + stage.steps
            first += stage.steps


def _open_readers(storage: Storage, plan: TrainingPlan, workers_on_node: int) -> dict[str, ShardReader]:
    """A reader for each dataset that some stage trains on."""
    names = sorted({name for stage in plan.job.train.stages for name in stage.mixture})
    datasets = {name: storage.resolve(plan.datasets[name]) for name in names}
    manifests = {name: load_manifest(dataset) for name, dataset in datasets.items()}
    remote = {name: manifests[name] for name, dataset in datasets.items() if dataset.local_path("") is None}
    cache = open_cache(plan.scratch / "shards", plan.job.train, remote, workers_on_node)
    return {
        name: ShardReader(dataset, manifests[name], cache if name in remote else None, fetches=False)
        for name, dataset in datasets.items()
    }


def _prefetched(worker: _Worker, batches: StageSampler) -> Sampler[list[Slot]]:
    """The batches, with a process that fetches their shards ahead where this worker's node has a cache."""
    caches = [reader.cache for reader in worker.readers.values() if reader.cache is not None]
    if not caches:
        return batches
    share = caches[0].byte_limit // worker.context.local_world_size
    behind = in_flight(worker.plan.job.train)
    return PrefetchedSampler(batches, worker.readers, byte_limit=share, behind=behind)


def _tell_retracted(readers: dict[str, ShardReader], newest: Checkpoint | None) -> None:
    """Say what is left out of each dataset, and where that is no longer what it was at the checkpoint."""
    for name, reader in readers.items():
        manifest = reader.manifest
        if manifest.dropped:
            share = f"{manifest.dropped} of {manifest.samples} samples"
            logger.info("%s: %s are retracted; their slots stay empty", name, share)
        if newest is not None and newest.record["data"][name] != manifest.digest:
            logger.warning("%s: other samples are retracted than at step %d", name, newest.step)


def _identity(job: JobConfig, readers: dict[str, ShardReader]) -> dict[str, Any]:
    """What a checkpoint must agree on for the run to go on from it.

    Samples may be retracted while a run goes on: what its shards hold must be the same.
    """
    return {
        "seed": job.seed,
        "zero_stage": job.train.zero_stage,
        "precision": job.train.precision,
        "shards": {name: reader.manifest.shards_digest for name, reader in readers.items()},
    }


def _run_stage(worker: _Worker, index: int, stage: StageBlock, first: int, start: int) -> None:
    """Train one stage from its own step ``start``; ``first`` is the run's step at which the stage begins."""
    job, context = worker.plan.job, worker.context
    loader = stage_loader(
        stage,
        job.train,
        worker.readers,
        model_config(job.model),
        tokenizer=job.model.tokenizer,
        seed=job.seed,
        start_step=start,
        worker=context.rank,
        workers=context.world_size,
        around=lambda sampler: _prefetched(worker, sampler),
    )
    batches = _timed(loader)
    every = stage.checkpoint_every or job.checkpoints.every
    for step in range(first + start, first + stage.steps):
        record = _train_step(worker, stage, step, batches)
        done = step + 1
        if worker.metrics is not None:
            worker.metrics.log(done, record)
        if worker.plan.board is not None and context.rank == 0:
            worker.plan.board.post("training", {"step": done, "stage": stage.name, **record})
        last = done == first + stage.steps
        if last or (done - first) % every == 0:
            _checkpoint(worker, index, done, stage_end=last)


def _timed(loader: DataLoader[Any]) -> Iterator[tuple[Batch, float]]:
    """Batches, each with the seconds the training waited for it."""
    iterator = iter(loader)
    while True:
        asked = time.monotonic()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.monotonic() - asked


def _train_step(
    worker: _Worker, stage: StageBlock, step: int, batches: Iterator[tuple[Batch, float]]
) -> dict[str, float]:
    """One optimizer step over ``accumulation`` contrastive batches; returns what is worth tracking."""
    train, context, engine = worker.plan.job.train, worker.context, worker.engine
    began = time.monotonic()
    waited = 0.0
    samples = 0
    totals: dict[str, float] = {}
    scale = learning_rate_scale(step, train.total_steps, train.schedule)
    set_learning_rates(engine.optimizer.param_groups, worker.peaks, scale)
    for part in range(train.accumulation):
        batch, seconds = next(batches)
        waited += seconds
        worker.consumption.add(step + 1, batch)
        batch = batch.to(context.device)
        losses, metrics = _forward_backward(worker, stage, batch, step, part)
        worker.guard.update(int(batch.valid.sum()) + batch.bad.total(), batch.bad)
        optimizer_step(engine, train)
        samples += len(batch.keys) * context.world_size
        for name, value in {**losses, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(value) / train.accumulation
    return _record(worker, stage, totals, scale, samples, began, waited)


def _forward_backward(
    worker: _Worker, stage: StageBlock, batch: Batch, step: int, number: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and metrics of contrastive batch ``number`` of a step, its gradient handed to the engine.

    What is left to do is one step of the engine.
    """
    job, context, engine = worker.plan.job, worker.context, worker.engine
    weights = {str(name): weight for name, weight in stage.objectives.items()}
    parts = job.train.parts(stage)

    def reseed(part: int) -> None:
        # Dropout is the one draw that torch makes from its global generator.
        draw = (number, context.rank) if parts == 1 else (number, context.rank, part)
        torch.manual_seed(derive_seed(job.seed, "dropout", step, *draw))

    if parts == 1:
        reseed(0)
        output = engine(**batch.model_inputs(), objectives=weights)
        check_finite(output.losses, batch.keys, step + 1)
        engine.backward(output.loss)
        return output.losses, output.metrics

    done = 0

    def backward(loss: torch.Tensor) -> None:
        nonlocal done
        if done:
            optimizer_step(engine, job.train)  # the part before is counted; nothing is updated yet
        engine.backward(loss * parts)  # the engine averages over the parts, whose gradients belong added up
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
    check_finite(output.losses, batch.keys, step + 1)
    return output.losses, output.metrics


def _record(
    worker: _Worker,
    stage: StageBlock,
    totals: dict[str, float],
    scale: float,
    samples: int,
    began: float,
    waited: float,
) -> dict[str, float]:
    """A step's metrics under the names that MLflow shows."""
    elapsed = time.monotonic() - began
    losses = {name: totals[name] for name in stage.objectives}
    record = {f"loss/{name}": value for name, value in losses.items()}
    record["loss/total"] = sum(stage.objectives[name] * value for name, value in losses.items())
    record |= {f"train/{name}": value for name, value in totals.items() if name not in losses}
    record |= {f"learning_rate/{name}": peak * scale for name, peak in _rates(worker).items()}
    record["train/gradient_norm"] = gradient_norm(worker.engine)
    record["speed/samples_per_s"] = samples / elapsed
    record["time/step_s"] = elapsed
    record["time/waiting_for_data_share"] = waited / elapsed
    record["memory/worker_rss_gib"] = psutil.Process().memory_info().rss / 2**30
    if worker.context.device.type == "cuda":
        record["memory/cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    record["data/bad_samples"] = float(worker.guard.causes.total())
    for name, seconds in worker.seconds.items():
        record[f"time/{name}_s"] = seconds
    worker.seconds.clear()
    return {name: value for name, value in record.items() if value == value}  # MLflow has no place for NaN


def _rates(worker: _Worker) -> dict[str, float]:
    """Peak learning rate by kind of group ("encoders", "fusion", "heads"), decayed or not alike."""
    groups = worker.engine.optimizer.param_groups
    names = [str(group.get("name", index)) for index, group in enumerate(groups)]
    return {name.removesuffix("_no_decay"): peak for name, peak in zip(names, worker.peaks, strict=True)}


def _checkpoint(worker: _Worker, stage_index: int, step: int, *, stage_end: bool) -> None:
    """Save and commit. Collective."""
    began = time.monotonic()
    job = worker.plan.job
    if worker.metrics is not None:
        # Steps before a checkpoint are never computed again: their metrics must be safe before it exists.
        worker.metrics.flush(timeout_s=10.0)
    consumed = worker.consumption.write(worker.context)  # safe before the commit record that vouches for it
    saved: Checkpoint = save_checkpoint(
        worker.engine,
        worker.run,
        worker.context,
        worker.plan.scratch,
        step=step,
        stage=stage_index,
        details={
            **_identity(job, worker.readers),
            "data": {name: reader.manifest.digest for name, reader in worker.readers.items()},
            "consumption": asdict(consumed),
            "stage_name": job.train.stages[stage_index].name,
            "stage_end": stage_end,
            "bad_samples": dict(worker.guard.causes),
            "tracking_key": worker.plan.tracking_key,
        },
    )
    worker.seconds["checkpoint"] = time.monotonic() - began
    if worker.context.rank == 0:
        logger.info("checkpoint of step %d committed (%s)", step, saved.digest[:12])
