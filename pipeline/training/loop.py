"""The training loop: what every worker runs, to be read from top to bottom.

:func:`train` -> for each stage :func:`_run_stage` -> for each step :func:`_train_step`. All workers take the same
path: whatever one decides alone (a damaged checkpoint, a loss that is not finite) is agreed on first. What is
trained is the learner's to know (``learner``): pre-training, or the fine-tuning of a task.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from cluster.board import Board
from cluster.workers import WorkerContext
from pipeline.goodput.records import AttemptRecorder
from pipeline.goodput.utilisation import Utilisation
from pipeline.tracking import MetricLogger, TrackingConfig
from pipeline.training.checkpoints import (
    Checkpoint,
    delete_checkpoint,
    list_checkpoints,
    resume,
    save_checkpoint,
)
from pipeline.training.config import Course, Stage
from pipeline.training.consumption import ConsumptionRecorder, PartReference
from pipeline.training.engine import build_engine, gradient_norm, optimizer_step
from pipeline.training.health import BadSampleGuard
from pipeline.training.learner import Learner, Part, Subject
from pipeline.training.loading import TrainingBatch
from pipeline.training.schedule import learning_rate_scale, set_learning_rates
from sharding.storage import Storage

logger = logging.getLogger(__name__)


class RehearsalOver(Exception):
    """Raised on every worker by :meth:`Rehearsal.step` when enough steps were rehearsed."""


class Rehearsal(Protocol):
    """Some steps of which nothing is kept: no checkpoint, no metric, no record of their time."""

    def begin(self, engine: Any) -> None:
        """Called once, before the first step."""

    def step(self) -> None:
        """Called after each step. Raises :class:`RehearsalOver` at the last one."""


@dataclass(frozen=True)
class TrainingPlan:
    """All that a worker needs to know; travels from the driver to the workers.

    Attributes:
        subject: what is trained, on which data.
        course: stages, batch, learning rates, precision.
        seed: of every draw.
        run: the folder in storage for checkpoints, the consumption ledger and undelivered metrics.
        checkpoint_every: steps, where a stage does not say.
        keep_last: so many checkpoints stay; None: the driver clears them away, as it knows what needs them.
        tracking: where metrics go.
        tracking_key: names the MLflow run before it has an id (the server may be away at the start).
        tracking_run: the id of the MLflow run, if there is one yet.
        scratch: local folder for checkpoints on their way and for the shard cache.
        board: where progress is posted for the driver, if it watches.
        rehearsal: train some steps for their own sake (a profile).
    """

    subject: Subject
    course: Course
    seed: int
    run: Storage
    checkpoint_every: int
    tracking: TrackingConfig
    tracking_key: str
    tracking_run: str | None
    scratch: Path
    keep_last: int | None = None
    board: Board | None = None
    rehearsal: Rehearsal | None = None

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
    learner: Learner
    engine: Any
    peaks: list[float]
    metrics: MetricLogger | None
    guard: BadSampleGuard
    consumption: ConsumptionRecorder
    time: AttemptRecorder
    utilisation: Utilisation
    seconds: dict[str, float] = field(default_factory=dict)


def train(context: WorkerContext, plan: TrainingPlan) -> None:
    """Train all stages of the plan from its newest good checkpoint, or from the beginning. Collective.

    Raises:
        UserError: the run was begun with other data, workers or ZeRO stage.
        NonFiniteLoss, BadDataLimit: see ``health``.
    """
    keeps = context.rank == 0 and plan.rehearsal is None
    with AttemptRecorder(plan.run if keeps else None, context.world_size) as recorder:
        _train(context, plan, recorder)


def _train(context: WorkerContext, plan: TrainingPlan, recorder: AttemptRecorder) -> None:
    course = plan.course
    started = time.monotonic()
    with recorder.clock.phase("build"):
        learner = plan.subject.learner(context, plan.scratch)
        engine, peaks = build_engine(learner.build_model(), course, context)
        utilisation = Utilisation(learner.step_flops, course.precision, context, recorder)
    identity = _identity(plan, learner)
    with recorder.clock.phase("resume"):
        newest = resume(
            engine, plan.run, context, plan.scratch, expected=identity, warn=plan.warn, place=course.PLACE
        )
    step = newest.step if newest else 0
    consumed = PartReference(**newest.record["consumption"]) if newest else None
    if context.rank == 0:
        logger.info("%s at step %d of %d", "resuming" if newest else "starting", step, course.total_steps)
        learner.begins(newest.record if newest else None)

    metrics = None
    if plan.rehearsal is not None:
        plan.rehearsal.begin(engine)
    elif context.rank == 0:
        metrics = MetricLogger(
            plan.tracking, plan.tracking_key, run_id=plan.tracking_run, spool=plan.run.at("tracking")
        )
    with closing(metrics) if metrics else nullcontext():
        worker = _Worker(
            plan=plan,
            context=context,
            learner=learner,
            engine=engine,
            peaks=peaks,
            metrics=metrics,
            guard=BadSampleGuard(course.bad_sample_limit, context.device, course.PLACE),
            consumption=ConsumptionRecorder(plan.run, identity["shards"], consumed),
            time=recorder,
            utilisation=utilisation,
        )
        worker.seconds["startup"] = time.monotonic() - started
        first = 0
        for index, stage in enumerate(course.stages):
            if step < first + stage.steps:
                _run_stage(worker, index, stage, first, step - first)
                step = first + stage.steps
            first += stage.steps


def _identity(plan: TrainingPlan, learner: Learner) -> dict[str, Any]:
    """What a checkpoint must agree on for the run to go on from it.

    Samples may be retracted while a run goes on: what its shards hold must be the same.
    """
    return {
        "seed": plan.seed,
        "zero_stage": plan.course.zero_stage,
        "precision": plan.course.precision,
        "shards": {name: data.shards_digest for name, data in learner.data.items()},
        **learner.identity(),
    }


def _run_stage(worker: _Worker, index: int, stage: Stage, first: int, start: int) -> None:
    """Train one stage from its own step ``start``; ``first`` is the run's step at which the stage begins."""
    plan = worker.plan
    batches = iter(worker.learner.loader(stage, start))
    every = stage.checkpoint_every or plan.checkpoint_every
    for step in range(first + start, first + stage.steps):
        done = step + 1
        with worker.time.step(done):
            record = _train_step(worker, stage, step, batches)
        if plan.rehearsal is not None:
            plan.rehearsal.step()
            continue
        if worker.metrics is not None:
            worker.metrics.log(done, record)
        if plan.board is not None and worker.context.rank == 0:
            plan.board.post("training", {"step": done, "stage": stage.name, **record})
        last = done == first + stage.steps
        if last or (done - first) % every == 0:
            with worker.time.clock.phase("checkpoint"):
                _checkpoint(worker, index, done, stage_end=last)


def _train_step(
    worker: _Worker, stage: Stage, step: int, batches: Iterator[TrainingBatch]
) -> dict[str, float]:
    """One optimizer step over ``accumulation`` contrastive batches; returns what is worth tracking."""
    course, context, engine, clock = worker.plan.course, worker.context, worker.engine, worker.time.clock
    began, waited = time.monotonic(), clock.seconds()["data"]
    samples = 0
    totals: dict[str, float] = {}
    scale = learning_rate_scale(step, course.total_steps, course.schedule)
    set_learning_rates(engine.optimizer.param_groups, worker.peaks, scale)
    for number in range(course.accumulation):
        with clock.phase("data"):
            batch = next(batches)
        worker.consumption.add(step + 1, batch)
        worker.utilisation.add(stage, batch)
        batch = batch.to(context.device)
        with clock.phase("forward and backward"):
            found = worker.learner.forward_backward(engine, stage, batch, Part(step, number))
        worker.guard.update(int(batch.valid.sum()) + batch.bad.total(), batch.bad)
        with clock.phase("optimizer"):
            optimizer_step(engine, course)
        samples += len(batch.keys) * context.world_size
        for name, value in {**found.losses, **found.metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(value) / course.accumulation
    waited = clock.seconds()["data"] - waited
    return _record(worker, stage, totals, scale, samples, began, waited)


def _record(
    worker: _Worker,
    stage: Stage,
    totals: dict[str, float],
    scale: float,
    samples: int,
    began: float,
    waited: float,
) -> dict[str, float]:
    """A step's metrics under the names that MLflow shows."""
    elapsed = time.monotonic() - began
    weights = worker.learner.weights(stage)
    losses = {name: totals[name] for name in weights}
    record = {f"loss/{name}": value for name, value in losses.items()}
    record["loss/total"] = sum(weights[name] * value for name, value in losses.items())
    record |= {f"train/{name}": value for name, value in totals.items() if name not in losses}
    record |= {f"learning_rate/{name}": peak * scale for name, peak in _rates(worker).items()}
    record["train/gradient_norm"] = gradient_norm(worker.engine)
    record["speed/samples_per_s"] = samples / elapsed
    record |= worker.utilisation.of_step(elapsed)
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
    plan, learner = worker.plan, worker.learner
    if worker.metrics is not None:
        # Steps before a checkpoint are never computed again: their metrics must be safe before it exists.
        worker.metrics.flush(timeout_s=10.0)
    consumed = worker.consumption.write(worker.context)  # safe before the commit record that vouches for it
    saved: Checkpoint = save_checkpoint(
        worker.engine,
        plan.run,
        worker.context,
        plan.scratch,
        step=step,
        stage=stage_index,
        details={
            **_identity(plan, learner),
            **learner.details(),
            "consumption": asdict(consumed),
            "stage_name": plan.course.stages[stage_index].name,
            "stage_end": stage_end,
            "bad_samples": dict(worker.guard.causes),
            "tracking_key": plan.tracking_key,
        },
    )
    worker.seconds["checkpoint"] = time.monotonic() - began
    if worker.context.rank == 0:
        logger.info("checkpoint of step %d committed (%s)", step, saved.digest[:12])
        if plan.keep_last is not None:
            for old in list_checkpoints(plan.run)[: -plan.keep_last]:
                delete_checkpoint(plan.run, old)
