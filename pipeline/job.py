"""One job from raw corpus to evaluated checkpoints: prepare -> train -> evaluate, each resumable.

    storage: raw corpus --prepare--> datasets/ --train--> runs/NAME/checkpoints/ --evaluate--> runs/NAME/evaluations/

Run again after any interruption, a job goes on where it stopped: finished shards, checkpoints and evaluations
are found in the storage and not made twice.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.board import Board
from cluster.session import session
from cluster.workers import run_workers
from pipeline.config import JobConfig
from pipeline.errors import NonFiniteLoss
from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.report import html_report, print_report, text_report
from pipeline.progress import Task, show_progress
from pipeline.runs import RunFolder, open_run_folder, run_path
from pipeline.scoring import scorers_of
from pipeline.tracking import Tracker, environment_tags, flatten_params
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.loop import TrainingPlan, train
from pipeline.watch import Watch
from sharding.errors import BadDataLimit, StorageFault, UserError
from sharding.prepare import PreparedDataset, Progress, prepare
from sharding.report import closing_table
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
        with _tracked_run(job, storage, prepared) as (run, tracker):
            dispatcher = _dispatcher(job, storage, run, tracker, prepared)
            dispatcher.start()
            try:
                _train(job, run, prepared, tracker, dispatcher, console)
                _await_evaluations(dispatcher, console)
                _close(job, run, tracker, dispatcher, console)
            finally:
                dispatcher.stop()


def evaluate_job(job: JobConfig, console: Console) -> None:
    """Evaluate the checkpoints of a job's run that are not evaluated yet (or failed), and print the table."""
    storage = _open(job)
    if not list_checkpoints(storage.at(run_path(job))):
        raise UserError(
            f"{storage.url_of(run_path(job))} holds no checkpoint to evaluate: train first (glscl run)"
        )
    with session(job.cluster, workers=0):
        prepared = _prepare_all(job, storage, console)
        with _tracked_run(job, storage, prepared) as (run, tracker):
            dispatcher = _dispatcher(job, storage, run, tracker, prepared, retry_failed=True)
            dispatcher.start()
            try:
                _await_evaluations(dispatcher, console)
                _close(job, run, tracker, dispatcher, console)
            finally:
                dispatcher.stop()


def _open(job: JobConfig) -> Storage:
    storage = open_storage(job.storage)
    storage.check(write=True)
    return storage


def _prepare_all(job: JobConfig, storage: Storage, console: Console) -> dict[str, PreparedDataset]:
    prepared = {}
    scorers = {name: scorers_of(config) for name, config in job.datasets.items()}  # first: mistakes end here
    for name, config in job.datasets.items():
        with show_progress(console, f"preparing {name}") as task:
            show = functools.partial(_show_preparation, task)
            prepared[name] = prepare(
                name,
                config,
                storage,
                in_flight=_preparation_slots(),
                progress=show,
                scorers=scorers[name],
            )
    console.print(closing_table(dataset.manifest for dataset in prepared.values()))
    return prepared


def _preparation_slots() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _show_preparation(task: Task, progress: Progress) -> None:
    if progress.phase == "duplicates":
        return  # takes no time worth showing
    note = f"{progress.phase}  {progress.rate:.0f} inputs/s"
    dropped = sum(progress.counts.dropped.values())
    if dropped:
        note += f"  {dropped} dropped"
    task.update(progress.done, note, total=progress.total or None)


@contextmanager
def _tracked_run(
    job: JobConfig, storage: Storage, prepared: dict[str, PreparedDataset]
) -> Iterator[tuple[RunFolder, Tracker]]:
    """The run's folder and its MLflow run, whose status tells how the block ended."""
    run = open_run_folder(job, storage, {name: dataset.path for name, dataset in prepared.items()})
    digests = {f"data.{name}": dataset.manifest.digest for name, dataset in prepared.items()}
    tracker = Tracker(
        job.tracking.resolved(Path.cwd()),
        name=job.name,
        key=run.key,
        params=flatten_params(job),
        tags={**environment_tags(), **digests, "storage": run.storage.url},
        existing_run_id=run.tracking_run,
        on_open=run.note_tracking,
    )
    status = "FAILED"
    try:
        yield run, tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.leftovers(run.storage.at("tracking"))  # metrics that a worker could not deliver
        tracker.finish(status)


def _dispatcher(
    job: JobConfig,
    storage: Storage,
    run: RunFolder,
    tracker: Tracker,
    prepared: dict[str, PreparedDataset],
    *,
    retry_failed: bool = False,
) -> Dispatcher:
    return Dispatcher(
        run.storage,
        job.evaluate,
        {task.dataset: storage.at(prepared[task.dataset].path) for task in job.evaluate.tasks},
        tokenizer=job.model.tokenizer,
        on_result=lambda outcome: tracker.evaluation(outcome.entry(run.storage)),
        retry_failed=retry_failed,
    )


def _train(
    job: JobConfig,
    run: RunFolder,
    prepared: dict[str, PreparedDataset],
    tracker: Tracker,
    dispatcher: Dispatcher,
    console: Console,
) -> None:
    total = job.train.total_steps
    finished = [checkpoint.step for checkpoint in list_checkpoints(run.storage)]
    if finished and finished[-1] == total:
        console.print(f"training is complete ({total} steps)", highlight=False)
        return
    run.note_code(environment_tags())
    scratch = Path(tempfile.gettempdir()) / f"glscl-{run.key}"
    board = Board()
    plan = TrainingPlan(
        job=job.model_copy(update={"tracking": tracker.config}),
        datasets={name: dataset.path for name, dataset in prepared.items()},
        run_path=run.path,
        tracking_key=run.key,
        tracking_run=tracker.run_id,
        scratch=scratch,
        board=board,
    )
    with (
        show_progress(console, f"training {job.name}", total) as task,
        Watch(job, run.storage, board, tracker, dispatcher, task),
    ):
        run_workers(
            train,
            plan,
            workers=job.train.workers,
            config=job.cluster,
            name=run.key,
            max_failures=job.train.max_failures,
            scratch=scratch / "ray",
            no_retry=(ValueError, NonFiniteLoss, BadDataLimit, StorageFault),
        )
    shutil.rmtree(scratch, ignore_errors=True)


def _await_evaluations(dispatcher: Dispatcher, console: Console) -> None:
    with show_progress(console, "evaluating") as task:
        while not dispatcher.wait(timeout_s=1.0):
            counts = dispatcher.counts()
            done = counts.done + counts.failed
            task.update(done, f"{counts.running} running", total=sum(counts))
        counts = dispatcher.counts()
        task.update(
            counts.done + counts.failed, f"{counts.failed} failed" if counts.failed else "", total=sum(counts)
        )


def _close(
    job: JobConfig, run: RunFolder, tracker: Tracker, dispatcher: Dispatcher, console: Console
) -> None:
    """The closing tables, to the terminal, the storage and MLflow; the best checkpoint gets its mark."""
    outcomes = dispatcher.outcomes()
    if outcomes:
        html, text = html_report(outcomes, job.name), text_report(outcomes)
        run.storage.write_bytes("reports/evaluation.html", html.encode())
        tracker.report(html, text)
        print_report(outcomes, console)
    best = dispatcher.best(job.checkpoints.keep_best) if job.checkpoints.keep_best else None
    if best is not None and job.checkpoints.keep_best is not None:
        metric = job.checkpoints.keep_best
        tracker.best(best.entry(run.storage).checkpoint, metric, best.metrics[metric.partition("/")[2]])
    _print_places(run, tracker, console, report=bool(outcomes))


def _print_places(run: RunFolder, tracker: Tracker, console: Console, *, report: bool) -> None:
    """Where everything is, and how to open the MLflow page."""
    places = {
        "run": run.storage.url,
        "checkpoints": run.storage.url_of("checkpoints"),
        "shards": run.root.url_of("datasets"),
    }
    if report:
        places["report"] = run.storage.url_of("reports/evaluation.html")
    uri = tracker.config.address
    places["MLflow"] = f"mlflow ui --backend-store-uri {uri}" if tracker.config.embedded else uri
    grid = Table.grid(padding=(0, 2))
    for what, where in places.items():
        grid.add_row(what, where)
    console.print()
    console.print(grid, soft_wrap=True, highlight=False)
