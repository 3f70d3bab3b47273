"""One job from raw corpus to evaluated checkpoints: prepare -> train -> evaluate, each resumable.

    storage: raw corpus --prepare--> datasets/ --train--> runs/NAME/checkpoints/ --evaluate--> runs/NAME/evaluations/

Run again after any interruption, a job goes on where it stopped: finished shards, checkpoints and evaluations
are found in the storage and not made twice.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.board import Board
from cluster.errors import WorkerOutOfMemory, WorkersStopped
from cluster.session import session
from pipeline.config import JobConfig, did_you_mean
from pipeline.errors import OutOfMemory, Regressed, RunTakenOver, Unhealthy
from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.report import LiveReport, print_report
from pipeline.evaluation.runner import Runner
from pipeline.fine_tuning.launch import FineTuningSetup
from pipeline.goodput.accounting import account
from pipeline.goodput.records import LifeRecorder, read_records
from pipeline.goodput.table import account_metrics, account_table
from pipeline.lease import Lease, hold
from pipeline.patience import patiently
from pipeline.progress import Task, show_progress
from pipeline.results import Results
from pipeline.runs import ConfigurationRefused, RunFolder, open_run_folder, read_record, run_path
from pipeline.scoring import scorers_of
from pipeline.scratch import check_scratch, only_copy, scratch_folder
from pipeline.tokenizer import check_tokenizer
from pipeline.tracking import Tracker, TrackingConfig, environment_tags, flatten_params
from pipeline.tracking.changes import log_refusal
from pipeline.tracking.preparation import PreparationTracker
from pipeline.training.checkpoints import list_checkpoints, remains
from pipeline.watch import Watch
from sharding.errors import BadDataLimit, StorageFault, UserError
from sharding.forkserver import remove_abandoned_sockets
from sharding.manifest import REPORT_PATH
from sharding.prepare import PrepareConfig, PreparedDataset, Progress, check_source, prepare
from sharding.prepared import PreparedConfig, open_prepared
from sharding.report import closing_table
from sharding.scoring import Scorers
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)

#: Causes of dropping that the line of a running preparation names.
_CAUSES_SHOWN = 3
_INDEXED_AT_ONCE = 4  # tars of another program's dataset


def prepare_job(job: JobConfig, console: Console) -> dict[str, PreparedDataset]:
    """Turn the raw corpora of a job into shards (what is there already is kept); prints the counts."""
    job = _settled(job)
    storage = _open(job)
    _check_sources(job, storage)
    with session(job.cluster, workers=0):
        return _prepare_all(job, storage, console)


def run_job(job: JobConfig, console: Console) -> None:
    """Prepare, train and evaluate; ends with the table of evaluations and where everything is.

    Raises:
        UserError: another driver is at work on the run.
    """
    job = _settled(job)
    check_tokenizer(job, fetch=True)
    storage = _open(job)
    _check_sources(job, storage)
    read_record(storage.at(run_path(job)))  # of another run, or damaged: before anything is done
    with (
        hold(storage.at(run_path(job))) as lease,
        _swept(),
        session(job.cluster, workers=job.train.workers),
    ):
        prepared = _prepare_all(job, storage, console)
        with _tracked_run(job, storage, prepared, trains=True) as (run, tracker):
            report = LiveReport(run.storage, job.name, tracker)
            results = Results(job, run, tracker, report)
            lease.when_lost(results.taken_over)
            dispatcher = _dispatcher(job, storage, run, results, prepared)
            dispatcher.start()
            report.start(lambda: _unfinished(dispatcher))
            try:
                with LifeRecorder(None if _is_trained(job, run) else run.storage) as life:
                    _train(job, run, prepared, tracker, dispatcher, console, results, lease)
                    life.evaluating()
                    _await_evaluations(dispatcher, console)
                _account(run, tracker, console)
                _close(run, tracker, report, console)
            except WorkersStopped:
                assert results.error is not None
                if isinstance(results.error, Regressed):
                    _account(run, tracker, console)
                    _close(run, tracker, report, console)
                raise results.error from None
            except KeyboardInterrupt:
                _say_interrupted(run, console)
                raise
            finally:
                dispatcher.stop()
                report.stop()


def evaluate_job(
    job: JobConfig, console: Console, *, tasks: Sequence[str] | None = None, missing: bool = False
) -> None:
    """Evaluate the checkpoints of a job's run that are not evaluated yet (or failed), and print the table.

    Args:
        tasks: only these; None: all.
        missing: all checkpoints without a result of a task's present version, not those alone that are due.

    Raises:
        UserError: there is no checkpoint, or no such task.
    """
    for name in tasks or ():
        known = [task.name for task in job.evaluate.tasks]
        if name not in known:
            raise UserError(f"--tasks: the job has no evaluate task '{name}'{did_you_mean(name, known)}")
    job = _settled(job)
    check_tokenizer(job, fetch=True)
    storage = _open(job)
    read_record(storage.at(run_path(job)))
    if not list_checkpoints(storage.at(run_path(job))):
        raise UserError(
            f"{storage.url_of(run_path(job))} holds no checkpoint to evaluate: train first (glscl run)"
        )
    with _swept(), session(job.cluster, workers=0):
        prepared = _evaluation_data(job, storage, console)
        with _tracked_run(job, storage, prepared) as (run, tracker):
            report = LiveReport(run.storage, job.name, tracker)
            dispatcher = _dispatcher(
                job,
                storage,
                run,
                Results(job, run, tracker, report),
                prepared,
                retry_failed=True,
                only=tasks,
                every_checkpoint=missing,
            )
            dispatcher.start()
            report.start(lambda: _unfinished(dispatcher))
            try:
                _await_evaluations(dispatcher, console)
                _close(run, tracker, report, console)
            finally:
                dispatcher.stop()
                report.stop()


def _settled(job: JobConfig) -> JobConfig:
    """The job with its tracking as it is from here on, whatever the environment becomes; mistakes in it end here."""
    tracking = job.tracking.resolved(Path.cwd())
    tracking.check()
    return job.model_copy(update={"tracking": tracking})


@contextmanager
def _swept() -> Iterator[None]:
    """In the end removes what workers, which Ray kills, leave in the folder for temporary files."""
    try:
        yield
    finally:
        remove_abandoned_sockets()


def _open(job: JobConfig) -> Storage:
    check_scratch()
    storage = open_storage(job.storage)
    storage.check(write=True)
    return storage


def _check_sources(job: JobConfig, storage: Storage) -> None:
    """Mistakes that the first look shows end here, before Ray takes its time to start."""
    for name, config in job.datasets.items():
        if not isinstance(config, PreparedConfig):
            check_source(name, config, storage)


def _prepare_all(job: JobConfig, storage: Storage, console: Console) -> dict[str, PreparedDataset]:
    prepared = {}
    scorers = {  # first: mistakes end here
        name: scorers_of(config)
        for name, config in job.datasets.items()
        if not isinstance(config, PreparedConfig)
    }
    for name, config in job.datasets.items():
        if isinstance(config, PreparedConfig):
            prepared[name] = _open_prepared(name, config, storage, console)
        else:
            prepared[name] = _prepare_one(job, name, config, scorers[name], storage, console)
    console.print(closing_table(dataset.manifest for dataset in prepared.values()))
    reports = {}
    for name, dataset in prepared.items():
        folder = storage.resolve(dataset.path)
        if folder.exists(REPORT_PATH):  # a merge, or another program's shards, have none
            reports[f"report of {name}"] = folder.url_of(REPORT_PATH)
    _print_addresses(reports, console)
    return prepared


def _evaluation_data(job: JobConfig, storage: Storage, console: Console) -> dict[str, PreparedDataset]:
    """The datasets that the job's tasks name. Shards that cannot be opened are left out: their tasks will fail."""
    names = {task.dataset_name for task in job.evaluate.tasks}
    prepared = {}
    for name, config in job.datasets.items():
        if name not in names:
            continue
        if not isinstance(config, PreparedConfig):
            prepared[name] = _prepare_one(job, name, config, scorers_of(config), storage, console)
            continue
        try:
            prepared[name] = _open_prepared(name, config, storage, console)
        except UserError as error:
            logger.error("datasets.%s cannot be used: %s", name, error)
    return prepared


def _prepare_one(
    job: JobConfig, name: str, config: PrepareConfig, scorers: Scorers, storage: Storage, console: Console
) -> PreparedDataset:
    slots = _preparation_slots()
    with (
        show_progress(console, f"preparing {name}", remaining=False) as task,
        PreparationTracker(job.tracking, in_flight=slots) as tracker,
    ):

        def update(progress: Progress) -> None:
            _show_preparation(task, progress)
            tracker.update(progress)

        dataset = prepare(
            name,
            config,
            storage,
            in_flight=slots,
            progress=update,
            on_start=tracker.start,
            scorers=scorers,
        )
        tracker.finish(dataset, storage.at(dataset.path))
        return dataset


def _open_prepared(name: str, config: PreparedConfig, storage: Storage, console: Console) -> PreparedDataset:
    """Shards that are there already; those of another program's are indexed on first use."""
    with show_progress(console, f"indexing {name}") as task:

        def show(done: int, total: int) -> None:
            task.update(done, total=total)

        manifest = open_prepared(name, config, storage, jobs=_INDEXED_AT_ONCE, progress=show)
    return PreparedDataset(config.prepared, manifest)


def _preparation_slots() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _show_preparation(task: Task, progress: Progress) -> None:
    if progress.phase in ("duplicates", "report"):
        return  # takes no time worth showing
    note = f"{progress.phase}  {progress.rate:,.0f} inputs/s"
    if progress.remaining_s is not None and progress.done < progress.total:
        note += f"  {timedelta(seconds=round(progress.remaining_s))} left"
    dropped = progress.counts.dropped
    if dropped:
        ranked = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        causes = ", ".join(f"{cause} {number:,}" for cause, number in ranked[:_CAUSES_SHOWN])
        more = ", ..." if len(ranked) > _CAUSES_SHOWN else ""
        note += f"  {sum(dropped.values()):,} dropped ({causes}{more})"
    task.update(progress.done, note, total=progress.total or None)


@contextmanager
def _tracked_run(
    job: JobConfig, storage: Storage, prepared: dict[str, PreparedDataset], *, trains: bool = False
) -> Iterator[tuple[RunFolder, Tracker]]:
    """The run's folder and its MLflow run, whose status tells how the block ended. ``trains``: no copy of it may."""
    config = job.tracking
    try:
        run = open_run_folder(job, storage, {name: dataset.path for name, dataset in prepared.items()})
    except ConfigurationRefused as error:
        changes = error.run.changes
        if error.run.tracking_run is not None:
            log_refusal(config, error.run.tracking_run, len(changes), changes[-1])
        raise
    digests = {f"data.{name}": dataset.manifest.digest for name, dataset in prepared.items()}
    with (
        only_copy(run.key, run.storage) if trains else nullcontext(),
        _tracked(job, config, run, digests) as tracker,
    ):
        yield run, tracker


@contextmanager
def _tracked(
    job: JobConfig, config: TrackingConfig, run: RunFolder, digests: Mapping[str, str]
) -> Iterator[Tracker]:
    tracker = Tracker(
        config,
        name=job.name,
        key=run.key,
        params=flatten_params(job),
        tags={**environment_tags(), **digests, "storage": run.storage.url},
        existing_run_id=run.tracking_run,
        on_open=run.note_tracking,
    )
    for number, change in enumerate(run.changes, start=1):
        tracker.change(number, change)
    status = "FAILED"
    try:
        yield tracker
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
    results: Results,
    prepared: dict[str, PreparedDataset],
    *,
    retry_failed: bool = False,
    only: Sequence[str] | None = None,
    every_checkpoint: bool = False,
) -> Dispatcher:
    paths = {n: config.prepared for n, config in job.datasets.items() if isinstance(config, PreparedConfig)}
    paths |= {name: dataset.path for name, dataset in prepared.items()}
    datasets = {name: storage.resolve(path) for name, path in paths.items()}
    return Dispatcher(
        run.storage,
        job.evaluate,
        storage,
        datasets,
        tokenizer=job.model.tokenizer,
        seed=job.seed,
        on_result=results.add,
        after_results=results.judge,
        retry_failed=retry_failed,
        only=only,
        every_checkpoint=every_checkpoint,
        runner=partial(Runner, FineTuningSetup(job.cluster, results.tracking, datasets, job.health)),
    )


def _train(
    job: JobConfig,
    run: RunFolder,
    prepared: dict[str, PreparedDataset],
    tracker: Tracker,
    dispatcher: Dispatcher,
    console: Console,
    results: Results,
    lease: Lease,
) -> None:
    # Here: with them come torch, DeepSpeed and the model, which preparing and mistakes do without.
    from cluster.workers import run_workers
    from model import TokenizerError
    from pipeline.training.health.memory import advice
    from pipeline.training.loop import TrainingPlan, train
    from pipeline.training.pretraining import PretrainingSubject

    total = job.train.total_steps
    if _is_trained(job, run):
        console.print(f"training is complete ({total} steps)", highlight=False)
        return
    for left in remains(run.storage, list_checkpoints(run.storage)):
        run.storage.delete(left, recursive=True)  # of writes that were killed: none is under way now
    run.note_code(environment_tags())
    scratch = scratch_folder(run.key, run.storage)
    board = Board()
    plan = TrainingPlan(
        subject=PretrainingSubject(job, {name: dataset.path for name, dataset in prepared.items()}),
        course=job.train,
        seed=job.seed,
        run=run.storage,
        checkpoint_every=job.checkpoints.every,
        tracking=tracker.config,
        tracking_key=run.key,
        tracking_run=tracker.run_id,
        scratch=scratch,
        board=board,
        health=job.health,
        fence=lease.fence,
    )
    with (
        show_progress(console, f"training {job.name}", total) as task,
        Watch(job, run.storage, board, tracker, dispatcher, task),
    ):
        try:
            run_workers(
                train,
                plan,
                workers=job.train.workers,
                sizes=job.train.sizes,
                progress=partial(_newest_step, run.storage),
                config=job.cluster,
                name=run.key,
                max_failures=job.train.max_failures,
                scratch=scratch / "ray",
                no_retry=(ValueError, Unhealthy, BadDataLimit, RunTakenOver, StorageFault),
                stop=results.stop,
                grace_s=job.checkpoints.on_stop_s,
            )
        except TokenizerError as error:  # it was here, but is not on every machine
            raise UserError(f"model.tokenizer: {error}, on the machine of a worker") from None
        except WorkerOutOfMemory as error:
            raise OutOfMemory(advice(job.train, f"worker {error.rank}", "host", str(error))) from error
    shutil.rmtree(scratch, ignore_errors=True)


def _newest_step(run: Storage) -> int:
    return max((checkpoint.step for checkpoint in list_checkpoints(run)), default=0)


def _say_interrupted(run: RunFolder, console: Console) -> None:
    checkpoints = list_checkpoints(run.storage)
    where = f"with the checkpoint of step {checkpoints[-1].step}" if checkpoints else "from the beginning"
    console.print(f"interrupted; the same command goes on {where}", highlight=False)


def _is_trained(job: JobConfig, run: RunFolder) -> bool:
    return any(each.step == job.train.total_steps for each in list_checkpoints(run.storage))


def _account(run: RunFolder, tracker: Tracker, console: Console) -> None:
    """Say where the time of all attempts went, to the terminal and MLflow."""
    found = account(*read_records(run.storage))
    if found is not None:
        console.print(account_table(found), "")
        tracker.metrics(found.step, account_metrics(found))


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


def _unfinished(dispatcher: Dispatcher) -> int:
    counts = dispatcher.counts()
    return counts.running + counts.waiting


def _close(run: RunFolder, tracker: Tracker, report: LiveReport, console: Console) -> None:
    """The closing tables, to the terminal, the storage and MLflow."""
    report.stop()
    patiently(report.write, "the report")
    outcomes = report.outcomes()
    if outcomes:
        print_report(outcomes, console)
    _print_places(run, tracker, console, report=report.address if outcomes else None)


def _print_places(run: RunFolder, tracker: Tracker, console: Console, *, report: str | None) -> None:
    """Where everything is, and how to open the MLflow page."""
    places = {
        "run": run.storage.url,
        "checkpoints": run.storage.url_of("checkpoints"),
        "shards": run.root.url_of("datasets"),
    }
    if report is not None:
        places["report"] = report
    uri = tracker.config.address
    places["MLflow"] = f"mlflow ui --backend-store-uri {uri}" if tracker.config.embedded else uri
    console.print()
    _print_addresses(places, console)


def _print_addresses(places: Mapping[str, str], console: Console) -> None:
    """A line each, never cut off: addresses are there to be copied."""
    widest = max(map(len, places), default=0)
    for what, where in places.items():
        console.print(f"{what:<{widest}}  {where}", soft_wrap=True, highlight=False, markup=False)
