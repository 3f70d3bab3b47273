"""The training loop: what every worker runs, to be read from top to bottom.

:func:`train` -> for each stage :func:`_run_stage` -> for each step :func:`_train_step`. All workers take the same
path: whatever one decides alone (a damaged checkpoint, a loss that is not finite) is agreed on first. What is
trained is the learner's to know (``learner``): pre-training, or the fine-tuning of a task.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.utils.data import DataLoader

from cluster.board import Board
from cluster.workers import WorkerContext
from pipeline.goodput.records import AttemptRecorder
from pipeline.goodput.utilisation import Utilisation
from pipeline.lease import Fence
from pipeline.tracking import MetricLogger, TrackingConfig
from pipeline.training.checkpoints import Checkpoint, delete_checkpoint, list_checkpoints
from pipeline.training.checkpoints.resuming import resume
from pipeline.training.checkpoints.writer import CheckpointWriter
from pipeline.training.clock import Clock
from pipeline.training.config import Course, Stage
from pipeline.training.consumption import (
    ConsumptionRecorder,
    PartReference,
    StepRecord,
    refuse_other_shards,
)
from pipeline.training.deepspeed_block import check_offload
from pipeline.training.engine import (
    begin_stage,
    build_engine,
    gradient_norm,
    loss_scale,
    optimizer_step,
)
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.memory import explained
from pipeline.training.health.monitor import Monitor
from pipeline.training.health.samples import BadSampleGuard
from pipeline.training.health.watchdog import watched
from pipeline.training.health.windows import again_after_rollback, freed_by_rollback
from pipeline.training.learner import Learner, Part, Subject
from pipeline.training.loading import TrainingBatch, in_one_line
from pipeline.training.preemption import Preemption
from pipeline.training.schedule import learning_rate_at, set_learning_rates
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
        health: what is done when something goes wrong.
        fence: keeps workers that outlived their driver from writing beside those of the next one.
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
    health: HealthBlock = field(default_factory=HealthBlock)
    fence: Fence | None = None
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
    health: Monitor
    checkpoints: CheckpointWriter
    preemption: Preemption
    time: AttemptRecorder
    utilisation: Utilisation
    seconds: dict[str, float] = field(default_factory=dict)


def train(context: WorkerContext, plan: TrainingPlan) -> None:
    """Train all stages of the plan from its newest good checkpoint, or from the beginning. Collective.

    Raises:
        UserError: the run was begun with other data, workers or ZeRO stage.
        NonFiniteLoss, LossSpike, BadDataLimit, OutOfMemory: see ``health``.
        Leaving: the workers were told to (``preemption``); the last step is in a checkpoint.
    """
    keeps = context.rank == 0 and plan.rehearsal is None
    with (
        explained(plan.course, context),
        AttemptRecorder(plan.run if keeps else None, context.world_size) as recorder,
        watched(plan, context, recorder.clock),
    ):
        again_after_rollback(partial(_attempt, context, plan, recorder))


def _attempt(context: WorkerContext, plan: TrainingPlan, recorder: AttemptRecorder) -> None:
    """From the newest checkpoint to the end."""
    course = plan.course.resized(context.world_size)  # an elastic group has not always all its workers
    plan = replace(plan, course=course)
    started = time.monotonic()
    preemption = Preemption(context)
    with recorder.clock.phase("build"):
        learner = plan.subject.learner(context, plan.scratch)
        check_offload(course.deepspeed, course.PLACE)
        engine, peaks = build_engine(learner.build_model(), course, context)
        utilisation = Utilisation(learner.step_flops, course.precision, context, recorder)
    identity = _identity(plan, learner)
    with recorder.clock.phase("resume"):
        newest = resume(engine, plan.run, context, plan.scratch, expected=identity, warn=plan.warn)
    step = newest.step if newest else 0
    shards = {name: data.shards_digest for name, data in learner.data.items()}
    if newest is not None:
        refuse_other_shards(newest.record, shards, course, plan.run.url_of(newest.path))
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
    consumption = ConsumptionRecorder(plan.run, shards, consumed)
    judged = newest.record["health"] if newest else None
    checkpoints = CheckpointWriter(plan.run, context, plan.scratch, committed=partial(_tidy, plan))
    with freed_by_rollback(engine), closing(metrics) if metrics else nullcontext(), closing(checkpoints):
        worker = _Worker(
            plan=plan,
            context=context,
            learner=learner,
            engine=engine,
            peaks=peaks,
            metrics=metrics,
            guard=BadSampleGuard(course.bad_sample_limit, context.device, course.PLACE),
            consumption=consumption,
            health=Monitor(
                plan.health, course, engine, context, plan.run, consumption, judged, warn=plan.warn
            ),
            checkpoints=checkpoints,
            preemption=preemption,
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
        recorder.clock.step(course.total_steps, long=True)  # what is on its way to the storage and to MLflow


def _identity(plan: TrainingPlan, learner: Learner) -> dict[str, Any]:
    """What a checkpoint must agree on for the run to go on from it, besides what the shards hold."""
    return {
        "seed": plan.seed,
        "precision": plan.course.precision,
        **learner.identity(),
    }


def _run_stage(worker: _Worker, index: int, stage: Stage, first: int, start: int) -> None:
    """Train one stage from its own step ``start``; ``first`` is the run's step at which the stage begins."""
    plan = worker.plan
    begin_stage(worker.engine, plan.course, stage)
    batches = _timed(worker.learner.loader(stage, start), worker.time.clock)
    every = stage.checkpoint_every or plan.checkpoint_every
    worker.preemption.agree()
    worker.preemption.leave(worker.checkpoints)
    for step in range(first + start, first + stage.steps):
        worker.checkpoints.check()
        done = step + 1
        with worker.time.step(done, long=step == first + start):
            if worker.health.leaves_out(done):
                record = _leave_out(worker, stage, step, batches)
            else:
                record = _train_step(worker, stage, step, batches)
        if plan.rehearsal is not None:
            plan.rehearsal.step()
            continue
        if worker.metrics is not None:
            worker.metrics.log(done, record)
        if plan.board is not None and worker.context.rank == 0:
            plan.board.post("training", {"step": done, "stage": stage.name, **record})
        last = done == first + stage.steps
        due = last or (done - first) % every == 0
        leaving = worker.preemption.agree()
        if due or leaving:
            with worker.time.clock.phase("checkpoint"):
                _checkpoint(worker, index, done, stage_end=last, interim=not due)
                if done < plan.course.total_steps:
                    worker.preemption.leave(worker.checkpoints)


def _timed(loader: DataLoader[Any], clock: Clock) -> Iterator[tuple[TrainingBatch, float]]:
    """Batches, each with the seconds the training waited for it."""
    iterator = iter(loader)
    while True:
        asked = time.monotonic()
        with clock.phase("data"), in_one_line():
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.monotonic() - asked


def _train_step(
    worker: _Worker, stage: Stage, step: int, batches: Iterator[tuple[TrainingBatch, float]]
) -> dict[str, float]:
    """One optimizer step over ``accumulation`` contrastive batches; returns what is worth tracking."""
    course, context, engine, clock = worker.plan.course, worker.context, worker.engine, worker.time.clock
    began, waited = time.monotonic(), 0.0
    samples = 0
    totals: dict[str, float] = {}
    scale = learning_rate_at(course, step)
    accumulation = course.accumulation_of(stage)
    set_learning_rates(engine.optimizer.param_groups, worker.peaks, scale)
    worker.health.begin()
    for number in range(accumulation):
        batch, seconds = next(batches)
        waited += seconds
        worker.consumption.add(step + 1, batch)
        worker.health.saw(batch, seconds)
        worker.utilisation.add(stage, batch)
        batch = batch.to(context.device)
        with clock.phase("forward and backward"):
            found = worker.learner.forward_backward(engine, stage, batch, Part(step, number))
            worker.guard.update(int(batch.valid.sum()) + batch.bad.total(), batch.bad)
        if number + 1 < accumulation:
            optimizer_step(engine, course)  # counts the part; the last one's is made once the step is judged
        samples += len(batch.keys) * context.world_size
        for name, value in {**found.losses, **found.metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(value) / accumulation
    weights = worker.learner.weights(stage)
    with clock.phase("optimizer"):
        totals |= worker.health.finish(
            step + 1, stage.name, {name: totals[name] for name in weights}, weights
        )
    if not worker.health.made:
        worker.time.skip()
    return _record(worker, stage, totals, scale, samples, began, waited)


def _leave_out(
    worker: _Worker, stage: Stage, step: int, batches: Iterator[tuple[TrainingBatch, float]]
) -> dict[str, float]:
    """A step that a rollback left out: its batches are drawn and noted, and that is all."""
    for _ in range(worker.plan.course.accumulation_of(stage)):
        batch, _ = next(batches)
        worker.consumption.add(step + 1, batch)
    worker.time.skip()
    return worker.health.left_out(step + 1)


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
    record |= {
        name if "/" in name else f"train/{name}": totals[name] for name in totals.keys() - losses.keys()
    }
    record |= {f"learning_rate/{name}": peak * scale for name, peak in _rates(worker).items()}
    record["train/gradient_norm"] = gradient_norm(worker.engine)
    record["train/loss_scale"] = loss_scale(worker.engine)
    record["speed/samples_per_s"] = samples / elapsed
    record |= worker.utilisation.of_step(elapsed)
    record["time/step_s"] = elapsed
    record["time/waiting_for_data_share"] = waited / elapsed
    record["memory/worker_rss_gib"] = psutil.Process().memory_info().rss / 2**30
    if worker.context.device.type == "cuda":
        record["memory/cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    record["data/bad_samples"] = float(worker.guard.causes.total())
    background = worker.checkpoints.seconds()
    if background is not None:
        record["time/checkpoint_background_s"] = background
    for name, seconds in worker.seconds.items():
        record[f"time/{name}_s"] = seconds
    worker.seconds.clear()
    return {name: value for name, value in record.items() if math.isfinite(value)}  # all that MLflow can show


def _rates(worker: _Worker) -> dict[str, float]:
    """Peak learning rate by kind of group ("encoders", "fusion", "heads"), decayed or not alike."""
    groups = worker.engine.optimizer.param_groups
    names = [str(group.get("name", index)) for index, group in enumerate(groups)]
    return {name.removesuffix("_no_decay"): peak for name, peak in zip(names, worker.peaks, strict=True)}


def _checkpoint(worker: _Worker, stage_index: int, step: int, *, stage_end: bool, interim: bool) -> None:
    """Take a snapshot, to be written and committed in the background. Collective.

    ``interim``: on leaving, at a step at which none was due.
    """
    began = time.monotonic()
    plan, learner = worker.plan, worker.learner
    trained_on = worker.consumption.take(worker.context)
    worker.checkpoints.save(
        worker.engine,
        step=step,
        stage=stage_index,
        details={
            **_identity(plan, learner),
            **learner.details(),
            "shards": {name: data.shards_digest for name, data in learner.data.items()},
            "zero_stage": plan.course.zero_stage,
            "stage_name": plan.course.stages[stage_index].name,
            "stage_end": stage_end,
            "interim": interim,
            "bad_samples": dict(worker.guard.causes),
            "health": worker.health.state(),
            "tracking_key": plan.tracking_key,
        },
        before_commit=partial(_settle, worker, trained_on),
    )
    worker.seconds["checkpoint"] = time.monotonic() - began


def _settle(worker: _Worker, trained_on: list[StepRecord]) -> dict[str, Any]:
    """On worker 0 before a commit: steps before a checkpoint are never computed again, so that what is known of
    them must be safe before it exists."""
    if worker.plan.fence is not None:
        worker.plan.fence.check()
    if worker.metrics is not None:
        worker.metrics.flush(timeout_s=10.0)
    return {"consumption": asdict(worker.consumption.write(trained_on))}


def _tidy(plan: TrainingPlan, saved: Checkpoint) -> None:
    """On worker 0 after a commit."""
    if plan.keep_last is not None:
        for old in list_checkpoints(plan.run)[: -plan.keep_last]:
            delete_checkpoint(plan.run, old)
