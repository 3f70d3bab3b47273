"""One job from raw corpus to evaluated checkpoints: prepare -> train -> evaluate, each resumable.

    storage: raw corpus --prepare--> datasets/ --train--> runs/NAME/checkpoints/ --evaluate--> runs/NAME/evaluations/

Run again after any interruption, a job goes on where it stopped: finished shards, checkpoints and evaluations
are found in the storage and not made twice.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from rich.console import Console

from cluster.board import Board
from cluster.session import session
from cluster.workers import run_workers
from pipeline.config import JobConfig
from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.report import html_report, print_report, text_report
from pipeline.progress import show_progress
from pipeline.runs import RunFolder, open_run_folder, run_path
from pipeline.tracking import Tracker, environment_tags, flatten_params
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.loop import TrainingPlan, train
from pipeline.watch import Watch, checkpoint_entry
from sharding.errors import UserError
from sharding.prepare import PreparedDataset, Progress, prepare
from sharding.report import print_counts
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)


def prepare_job(job: JobConfig, console: Console) -> dict[str, PreparedDataset]:
    """Turn the raw corpora of a job into shards (what is there already is kept); prints the counts."""
    storage = _open(job)
    with session(job.cluster, workers=0):
        return _prepare_all(job, storage, console)


def run_job(job: JobConfig, console: Console) -> None:
    """Prepare, train and evaluate; ends with the table of evaluations and where everything is."""
    storage = _open(job)
    with session(job.cluster, workers=job.train.workers):
        prepared = _prepare_all(job, storage, console)
        run = open_run_folder(job, storage, {name: dataset.path for name, dataset in prepared.items()})
        tracker = _open_tracker(job, run, prepared)
        status = "FAILED"
        try:
            dispatcher = _dispatcher(job, storage, run, tracker)
            dispatcher.start()
            try:
                _train(job, storage, run, prepared, tracker, dispatcher, console)
                _await_evaluations(dispatcher, console)
            finally:
                dispatcher.stop()
            _report(job, run, tracker, console)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)


def evaluate_job(job: JobConfig, console: Console) -> None:
    """Evaluate the checkpoints of a job's run that are not evaluated yet, and print the table."""
    storage = _open(job)
    if not list_checkpoints(storage.at(run_path(job))):
        raise UserError(f"{storage.url_of(run_path(job))} holds no checkpoint to evaluate: train first (glscl run)")
    with session(job.cluster, workers=0):
        prepared = _prepare_all(job, storage, console)
        run = open_run_folder(job, storage, {name: dataset.path for name, dataset in prepared.items()})
        tracker = _open_tracker(job, run, prepared)
        try:
            dispatcher = _dispatcher(job, storage, run, tracker)
            dispatcher.start()
            try:
                _await_evaluations(dispatcher, console)
            finally:
                dispatcher.stop()
            _report(job, run, tracker, console)
        finally:
            tracker.finish("FINISHED")


def _open(job: JobConfig) -> Storage:
    storage = open_storage(job.storage)
    storage.check(write=True)
    return storage


def _prepare_all(job: JobConfig, storage: Storage, console: Console) -> dict[str, PreparedDataset]:
    prepared = {}
    for name, config in job.datasets.items():
        with show_progress(console, f"preparing {name}") as task:

            def show(progress: Progress, task: object = task) -> None:
                _show_preparation(progress, task)

            prepared[name] = prepare(name, config, storage, in_flight=job.cluster.num_cpus or 2, progress=show)
    print_counts(console, {name: dataset.manifest for name, dataset in prepared.items()})
    return prepared
