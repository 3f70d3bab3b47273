"""Runs the fine-tuning of a checkpoint from within an evaluation, and keeps the model that came of it.

Layout, below the run's folder::

    fine-tuning/<task>-v<version>/<checkpoint's digest, 16 digits>/
        checkpoints/, consumption/, tracking/     while it runs, as those of a training; what a kind keeps for itself
        model/config.json, model/model.safetensors, fine-tuned.json      when it has ended; the rest is deleted

The record ``fine-tuned.json`` is written last: with it the model is there, and verified before it is used. Without it
the fine-tuning goes on from its newest checkpoint, whatever was killed: a worker, the evaluation, the driver.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from pipeline.runs import read_record
from pipeline.scratch import scratch_folder
from pipeline.tracking import Tracker, TrackingConfig, environment_tags, flatten_params
from pipeline.training.health.config import HealthBlock
from sharding.errors import BadData, BadDataLimit, StorageFault

if TYPE_CHECKING:
    from pipeline.evaluation.actor import Assignment
    from pipeline.fine_tuning.learner import FineTuningSubject
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage

FOLDER = "fine-tuning"
RECORD = "fine-tuned.json"
FORMAT = "glscl-fine-tuned"

#: Of a record, by whoever uses it.
_READ = ("task", "task_version", "checkpoint", "data", "seed", "steps", "recipe", "finished")
_KEPT = 2  # checkpoints: the newest, and the one before in case it is damaged
_PATIENCE_S = 7 * 86400.0  # for room on the cluster: the evaluation's own time limit is the one that counts


@dataclass(frozen=True)
class FineTuningSetup:
    """What fine-tunings need to know of the job; travels to the evaluations.

    Attributes:
        cluster: the job's block.
        tracking: where metrics go; ``uri`` absolute.
        datasets: the job's prepared datasets by name.
        health: the job's block.
    """

    cluster: ClusterConfig
    tracking: TrackingConfig
    datasets: Mapping[str, Storage]
    health: HealthBlock = field(default_factory=HealthBlock)


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model: its folder on this machine, and what its record says."""

    model: Path
    url: str
    record: dict[str, Any] = field(default_factory=dict)


def fine_tuned(assignment: Assignment, setup: FineTuningSetup, folder: Path) -> FineTuned:
    """The model of an assignment's checkpoint and task: as it is kept, or after its fine-tuning has ended.

    Args:
        folder: on this machine, for the model's files.

    Raises:
        UserError: see ``pipeline.fine_tuning.learner.open_training``.
        BadData: the checkpoint, or the kept model, is not what was committed.
        Unhealthy, BadDataLimit, StorageFault, ClusterError, WorkerGroupError: as a training.
    """
    place = assignment.run.at(
        f"{FOLDER}/{assignment.task.name}-v{assignment.version}/{assignment.checkpoint.digest[:16]}"
    )
    record = _read(place)
    if record is None:
        record = _keep(assignment, place, _train(assignment, setup, place), folder)
    else:
        fetch_fine_tuned(place, record, folder)
    for name, is_folder in {(file.path.split("/")[0], "/" in file.path) for file in place.list()}:
        if name not in ("model", RECORD):
            place.delete(name, recursive=is_folder)
    return FineTuned(folder / "model", place.url_of("model"), record)


def _read(place: Storage) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = place.read_json(RECORD)
    except FileNotFoundError:
        return None
    try:
        whole = record["format"] == FORMAT and set(_READ) <= set(record)
        # Nothing is written anywhere but below the model's folder, whatever a record says.
        whole = whole and all(PurePosixPath(name).parts[0] == "model" for name in record["files"])
        whole = whole and not any(".." in PurePosixPath(name).parts for name in record["files"])
    except (KeyError, TypeError, IndexError):
        whole = False
    if not whole:
        raise BadData("damaged-record", f"{place.url_of(RECORD)} is no record of a fine-tuning; delete it")
    return record


def kept_fine_tunings(run: Storage) -> list[tuple[Storage, dict[str, Any]]]:
    """Fine-tunings of a run's checkpoints that have ended, of all tasks, and their records; the latest first.

    Raises:
        BadData: a record is none.
    """
    paths = [PurePosixPath(file.path) for file in run.list(FOLDER)]
    places = [run.at(str(path.parent)) for path in paths if path.name == RECORD]
    ended = [(place, record) for place in places if (record := _read(place)) is not None]
    return sorted(ended, key=lambda one: one[1]["finished"], reverse=True)


def fetch_fine_tuned(place: Storage, record: dict[str, Any], folder: Path) -> None:
    """Download the model that ``record`` is of to ``folder / "model"``, and verify it.

    Raises:
        BadData: it is not what was committed.
    """
    for name, expected in record["files"].items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.download(name, target, size=expected["size"], sha256=expected["sha256"])
        except (FileNotFoundError, BadData) as error:
            hint = f"delete {place.url_of(RECORD)} to fine-tune again"
            raise BadData("damaged-model", f"{error}; {hint}") from None


def _train(assignment: Assignment, setup: FineTuningSetup, place: Storage) -> Checkpoint:
    """Train to the end, going on from what is there; the last checkpoint."""
    import ray

    from cluster.resources import for_fine_tuning
    from cluster.workers import run_workers
    from pipeline.errors import Unhealthy
    from pipeline.training.checkpoints import list_checkpoints
    from pipeline.training.loop import TrainingPlan, train

    subject = _subject(assignment, setup, place)
    course = subject.course
    [stage] = course.stages
    key = f"{assignment.checkpoint.digest[:16]}-{assignment.task.name}-v{assignment.version}"
    scratch = scratch_folder(key, place)
    with _tracked(assignment, setup, subject, place, key) as tracker:
        there = list_checkpoints(place)
        if there and there[-1].step == course.total_steps:
            return there[-1]  # whoever trained it was killed before the run in MLflow was ended
        plan = TrainingPlan(
            subject=subject,
            course=course,
            seed=assignment.seed,
            run=place,
            checkpoint_every=stage.checkpoint_every or stage.steps,
            keep_last=_KEPT,
            tracking=setup.tracking,
            tracking_key=key,
            tracking_run=tracker.run_id,
            scratch=scratch,
            health=setup.health,
        )
        run_workers(
            train,
            plan,
            workers=course.workers,
            config=for_fine_tuning(setup.cluster, ray.cluster_resources()),
            name=key,
            max_failures=course.max_failures,
            scratch=scratch / "ray",
            no_retry=(ValueError, BadData, Unhealthy, BadDataLimit, StorageFault),
            patience_s=_PATIENCE_S,
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return list_checkpoints(place)[-1]


def _subject(assignment: Assignment, setup: FineTuningSetup, place: Storage) -> FineTuningSubject:
    """What is trained, once all that it reads has been found good: mistakes end here, before any worker starts."""
    from pipeline.fine_tuning.learner import FineTuningSubject, Material, open_training

    task = assignment.task
    recipe = task.fine_tuning
    assert recipe is not None
    material = Material(assignment.storage, setup.datasets, place)
    samples = sum(shard.samples for shard in open_training(task, material).data.shards)
    return FineTuningSubject(
        task=task,
        course=recipe.course(samples, task.frames_taken),
        seed=assignment.seed,
        material=material,
        run=assignment.run,
        checkpoint=assignment.checkpoint,
        tokenizer=assignment.tokenizer,
    )


@contextmanager
def _tracked(
    assignment: Assignment, setup: FineTuningSetup, subject: FineTuningSubject, place: Storage, key: str
) -> Iterator[Tracker]:
    """A child run in MLflow for the time of the block, whose status tells how it ended."""
    task, checkpoint = assignment.task, assignment.checkpoint
    tags = {
        **environment_tags(),
        "task": task.name,
        "checkpoint": assignment.run.url_of(checkpoint.path),
        "data": assignment.data_digest,
        "storage": place.url,
    }
    parent = (read_record(assignment.run) or {}).get("tracking_run")
    if parent is not None:  # the server may have been away since the run began
        tags["mlflow.parentRunId"] = str(parent)
    tracker = Tracker(
        setup.tracking,
        name=f"{task.name}: fine-tuning of step {checkpoint.step}",
        key=key,
        params=flatten_params(subject.course),
        tags=tags,
    )
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        tracker.leftovers(place.at("tracking"))
        tracker.finish(status)


def _keep(assignment: Assignment, place: Storage, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The weights of the last checkpoint, in ``folder`` and in storage, and the record of them."""
    from pipeline.training.checkpoints import delete_checkpoint, fetch_model

    try:
        model = fetch_model(place, checkpoint, folder)
    except BadData as error:
        delete_checkpoint(place, checkpoint)
        raise RuntimeError(f"{error}; the next attempt goes on from the checkpoint before") from error
    files = {}
    for source in sorted(path for path in model.rglob("*") if path.is_file()):
        name = f"model/{source.relative_to(model).as_posix()}"
        uploaded = place.upload(source, name)
        files[name] = {"size": uploaded.size, "sha256": uploaded.sha256}
    assert assignment.task.fine_tuning is not None
    record = {
        "format": FORMAT,
        "version": 1,
        "files": files,
        "task": assignment.task.name,
        "task_version": assignment.version,
        "checkpoint": assignment.checkpoint_record,
        "data": assignment.data_digest,
        "seed": assignment.seed,
        "steps": checkpoint.step,
        "recipe": assignment.task.fine_tuning.model_dump(mode="json"),
        "bad_samples": checkpoint.record["bad_samples"],
        "finished": time.time(),
    }
    place.write_json(RECORD, record)
    return record
