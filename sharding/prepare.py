"""From a raw corpus to a dataset of shards: the driver of the tasks in ``stages``.

::

    survey -> plan -> encode (a task a shard) -> duplicates -> write -> report -> manifest

The driver lists the source, starts Ray tasks (at most ``in_flight`` at a time) and adds up their records;
media are only opened in tasks. Killed at any moment and run again, it goes on from what is recorded and ends
with the same bytes. What earlier runs recorded is read by the driver itself, many records at a time; of each task
it keeps the record of its shard (about 1.5 kB), so 10^5 tasks take some 150 MB of it, and more samples none.

Two drivers may prepare the same dataset at once: every task writes the same bytes whoever runs it, and whole or
not at all; the slower driver finds the manifest that the quicker one wrote, and returns it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sharding.config import ImageConfig, PrepareConfig, VideoConfig
from sharding.errors import BadDataLimit, StorageFault, StorageRefused, UserError
from sharding.manifest import (
    MANIFEST_PATH,
    REPORT_PATH,
    Counts,
    Manifest,
    ShardRecord,
    canonical_digest,
    load_manifest,
)
from sharding.sources.config import (
    CocoSource,
    FetchConfig,
    FolderSource,
    HuggingFaceSource,
    KarpathySource,
    ScenesSource,
    SourceConfig,
    TableSource,
    WebDatasetSource,
)
from sharding.storage import Storage

if TYPE_CHECKING:
    from sharding.scoring import Scorers
    from sharding.stages import TaskRecord, Work

__all__ = [
    "CocoSource",
    "FetchConfig",
    "FolderSource",
    "HuggingFaceSource",
    "ImageConfig",
    "KarpathySource",
    "Preparation",
    "PrepareConfig",
    "PreparedDataset",
    "Progress",
    "ScenesSource",
    "SourceConfig",
    "TableSource",
    "TaskFailed",
    "VideoConfig",
    "WebDatasetSource",
    "check_name",
    "check_source",
    "dataset_path",
    "prepare",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class TaskFailed(RuntimeError):
    """A task that failed by a bug, or whose process crashed more often than it may. Names the task."""


@dataclass(frozen=True)
class PreparedDataset:
    """``path`` is relative to the storage that ``prepare`` was given; a url where the dataset was there before."""

    path: str
    manifest: Manifest


@dataclass(frozen=True)
class Preparation:
    """A preparation that is about to start its tasks, as ``on_start`` is told.

    Args:
        dataset: the dataset's folder; what is below ``work/`` is removed when the dataset is finished.
        configuration: the JSON value that decides what the dataset holds, and its sha256.
        source: the url, the number of inputs and the digest of their listing.
    """

    name: str
    dataset: Storage
    configuration: dict[str, Any]
    configuration_digest: str
    source: dict[str, Any]
    tasks: int


@dataclass(frozen=True)
class Progress:
    """Where the preparation stands, after each task.

    Args:
        phase: ``"listing"``, ``"encode"``, ``"duplicates"``, ``"write"`` or ``"report"``.
        done, total: tasks of this phase (inputs while listing, whose total is not known: 0).
        counts: of the tasks that are done.
        seconds: since this phase began.
        bytes: of the shards that the tasks of this phase wrote, and of their indexes.
        found, found_inputs: the part of ``done`` that an earlier run had done, and the samples read by it; the
            rate and the time that is left are without them.
    """

    phase: str
    done: int
    total: int
    seconds: float
    counts: Counts = field(default_factory=Counts)
    bytes: int = 0
    found: int = 0
    found_inputs: int = 0

    @property
    def rate(self) -> float:
        """Inputs a second in this phase, of this run (0 for ``"duplicates"`` and ``"report"``, which see none)."""
        if self.seconds <= 0 or self.phase in ("duplicates", "report"):
            return 0.0
        read = self.done if self.phase == "listing" else self.counts.read - self.found_inputs
        return read / self.seconds

    @property
    def remaining_s(self) -> float | None:
        """Seconds until this phase ends, if it goes on as it did; None while nothing tells."""
        done = self.done - self.found
        return (self.total - self.done) * self.seconds / done if done and self.total else None


ProgressCallback = Callable[[Progress], None]


def check_name(name: str) -> None:
    """UserError unless ``name`` can be part of a dataset's folder."""
    if not _NAME.fullmatch(name):
        raise UserError(f"dataset name {name!r}: use letters, digits, '.', '_' and '-'")


def check_source(name: str, config: PrepareConfig, storage: Storage) -> None:
    """Open the source as far as its first input: without Ray, and without listing the corpus.

    Raises:
        UserError: the name is no name, the source is missing, empty or not as configured.
    """
    from sharding.sources import open_source

    check_name(name)
    next(open_source(config, storage).inputs(hashlib.sha256()), None)


def dataset_path(name: str, config: PrepareConfig, source_digest: str) -> str:
    """``datasets/NAME-DIGEST``: another configuration or another listing of the source is another dataset."""
    digest = canonical_digest({"configuration": config.digest, "source": source_digest})
    return f"datasets/{name}-{digest[:12]}"


def prepare(
    name: str,
    config: PrepareConfig,
    storage: Storage,
    *,
    in_flight: int,
    progress: ProgressCallback | None = None,
    on_start: Callable[[Preparation], None] | None = None,
    scorers: Scorers | None = None,
) -> PreparedDataset:
    """Make the dataset, or go on making it, or return it when it is there and its source lists the same.

    Ray must be initialised. ``storage`` is the root of the job's storage; its S3 options serve the source.

    Args:
        in_flight: Ray tasks (one CPU each) at a time.
        progress: called in this thread after each task.
        on_start: called once before the first task; not for a dataset that is there already.
        scorers: what a filter of kind ``score`` may name.

    Raises:
        UserError: the source is missing, empty or not as configured; nothing is left of it.
        BadDataLimit: more than ``config.bad_limit`` of the inputs are broken. The tasks that met them are
            done again by the next run.
        StorageFault: the storage failed for longer than retries last.
        TaskFailed: a task failed otherwise; the message names it.
    """
    from sharding.filters.resolve import resolved
    from sharding.plan import make_plan, survey
    from sharding.report_page import report_page
    from sharding.sources import open_source
    from sharding.stages import WORK, Work
    from sharding.summary import load_summary

    check_name(name)
    tell = progress or (lambda _: None)
    config = resolved(config, storage, scorers or {})
    source = open_source(config, storage)
    started = time.monotonic()
    found = survey(source, lambda count: tell(Progress("listing", count, 0, time.monotonic() - started)))
    path = dataset_path(name, config, found.digest)
    dataset = storage.at(path)
    if dataset.exists(MANIFEST_PATH):
        manifest = load_manifest(dataset)
        dataset.delete(WORK, recursive=True)  # a run that was killed while tidying up
        return PreparedDataset(path, manifest)
    dataset.check(write=True)
    score = config.score_filter
    scorer = scorers[score.scorer] if score is not None and scorers is not None else None
    plan = make_plan(source, found, config, dataset)
    work = Work(dataset, config, plan, scorer)
    identity, origin = config.identity(), plan.source.model_dump(mode="json")
    if on_start is not None:
        on_start(Preparation(name, dataset, identity, config.digest, origin, work.plan.tasks))
    try:
        shards, counts = _run_stages(work, in_flight, tell)
        if not shards:
            raise UserError(
                f"nothing is left of {found.inputs} inputs of {found.url}: {_by_cause(counts.dropped)}"
            )
        manifest = Manifest(
            name=name,
            modality=config.modality,
            configuration=identity,
            configuration_digest=config.digest,
            source=origin,
            shards=shards,
            counts=counts,
        )
        page = report_page(manifest, load_summary(work))
        if dataset.exists(MANIFEST_PATH):  # of a quicker driver, which removed what the report is made of
            raise FileNotFoundError(f"{dataset.url_of(WORK)} was removed")
        # Before the manifest: where that is, the report is too.
        dataset.write_bytes(REPORT_PATH, page.encode("utf-8", "replace"))
        dataset.write_json(MANIFEST_PATH, manifest.model_dump(mode="json"))
    except (TaskFailed, StorageFault, FileNotFoundError):
        # Another driver that prepares the same dataset was quicker and removed what is only needed on the way.
        if not dataset.exists(MANIFEST_PATH):
            raise
        manifest = load_manifest(dataset)
    dataset.delete(WORK, recursive=True)
    return PreparedDataset(path, manifest)


def _run_stages(work: Work, in_flight: int, tell: ProgressCallback) -> tuple[list[ShardRecord], Counts]:
    from sharding import stages
    from sharding.exchange import steps as exchange_steps
    from sharding.summary import groups, summarise

    pool = _Tasks(work, in_flight)
    limit = _BadLimit(work)
    tally = _Tally("encode", work.plan.tasks, tell)

    def encoded(record: TaskRecord) -> None:
        tally.add(record)
        limit.add(record)

    try:
        for record in stages.recorded_tasks(work, committed=not work.exchanges):
            tally.find(record)
            limit.add(record)
        tally.begin()
        pool.run(stages.encode, tally.missing(), encoded)
    except BadDataLimit:
        limit.forget()
        raise
    if work.exchanges:
        exchange = work.exchange(tally.counts.kept)
        steps = exchange_steps(exchange)
        duplicates = _Tally("duplicates", sum(count for _, count in steps), tell, tally.counts)
        pool = _Tasks(work, in_flight, exchange)
        for step, count in steps:
            pool.run(step, range(count), lambda _: duplicates.step())
        tally = _Tally("write", work.plan.tasks, tell)
        for record in stages.recorded_tasks(work, committed=True):
            tally.find(record)
        tally.begin()
        pool = _Tasks(work, in_flight, (work, exchange))
        pool.run(stages.commit, tally.missing(), tally.add)
    if tally.shards:
        pool = _Tasks(work, in_flight)
        report = _Tally("report", groups(work.plan.tasks), tell, tally.counts)
        pool.run(summarise, range(groups(work.plan.tasks)), lambda _: report.step())
    return [tally.shards[task] for task in sorted(tally.shards)], tally.counts


class _Tally:
    """Adds up the records of one phase and reports progress. Grows with the shards, not with the samples."""

    def __init__(self, phase: str, total: int, tell: ProgressCallback, counts: Counts | None = None) -> None:
        self.counts = counts or Counts()
        self.shards: dict[int, ShardRecord] = {}
        self._phase, self._total, self._tell = phase, total, tell
        self._done, self._bytes = bytearray(total), 0  # a byte a task
        self._steps = self._found = self._found_inputs = 0
        self._started = time.monotonic()

    def find(self, record: TaskRecord) -> None:
        """Add what an earlier run did."""
        self._take(record)

    def begin(self) -> None:
        """Time counts from here: what is done was found."""
        self._found, self._found_inputs = self._steps, self.counts.read
        self._started = time.monotonic()
        if self._found:
            self._report()

    def add(self, record: TaskRecord) -> None:
        self._take(record)
        if record.shard is not None:
            self._bytes += record.shard.bytes + record.shard.index_bytes
        self._report()

    def step(self) -> None:
        self._steps += 1
        self._report()

    def missing(self) -> Iterator[int]:
        """The tasks that are not done, in order."""
        return (task for task in range(self._total) if not self._done[task])

    def _take(self, record: TaskRecord) -> None:
        self.counts = self.counts.plus(record.counts)
        if record.shard is not None:
            self.shards[record.task] = record.shard
        self._done[record.task] = 1
        self._steps += 1

    def _report(self) -> None:
        seconds = time.monotonic() - self._started
        self._tell(
            Progress(
                self._phase,
                self._steps,
                self._total,
                seconds,
                self.counts,
                self._bytes,
                self._found,
                self._found_inputs,
            )
        )


class _BadLimit:
    """Aborts as soon as the share of broken inputs can no longer end within the limit."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._bad = 0
        self._causes: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._tasks: list[int] = []

    def add(self, record: TaskRecord) -> None:
        from sharding.filters.config import chosen

        if not record.bad:
            return
        self._bad += record.bad
        self._tasks.append(record.task)
        for cause, number in record.counts.dropped.items():
            if not chosen(cause):
                self._causes[cause] += number
                self._examples.setdefault(cause, record.examples[cause][0])
        # Of all inputs, not of those seen so far: a run must not abort or pass by the order of its tasks.
        inputs, limit = self._work.plan.source.inputs, self._work.config.bad_limit
        if self._bad > limit * inputs:
            examples = "; ".join(f"{cause}: {text}" for cause, text in sorted(self._examples.items()))
            raise BadDataLimit(
                f"{self._bad} of {inputs} inputs of {self._work.plan.source.url} are bad, which is more than "
                f"bad_limit {limit:g} ({_by_cause(self._causes)}); for example {examples}"
            )

    def forget(self) -> None:
        """Let the next run read the broken inputs again: they may have been mended."""
        from sharding.stages import forget

        for task in self._tasks:
            forget(self._work, task)


class _Tasks:
    """Runs task functions in Ray, a bounded number at a time. They get ``given``, by default the work itself."""

    def __init__(self, work: Work, in_flight: int, given: Any = None) -> None:
        import ray

        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {in_flight}")
        self._in_flight = in_flight
        self._retries = work.config.task_retries
        self._where = work.dataset.url
        self._given = ray.put(work if given is None else given)
        self._running: dict[Any, int] = {}

    def run(
        self, function: Callable[[Any, int], Any], numbers: Iterable[int], done: Callable[[Any], None]
    ) -> None:
        """Call ``function(given, number)`` for all numbers; ``done`` gets each result as it comes."""
        import ray

        remote = ray.remote(num_cpus=1, max_retries=self._retries, retry_exceptions=[StorageFault])(function)
        try:
            for number in numbers:
                if len(self._running) >= self._in_flight:
                    self._collect(function.__name__, done)
                self._running[remote.remote(self._given, number)] = number
            while self._running:
                self._collect(function.__name__, done)
        finally:
            self.stop()

    def _collect(self, what: str, done: Callable[[Any], None]) -> None:
        import ray

        finished, _ = ray.wait(list(self._running), num_returns=1)
        number = self._running.pop(finished[0])
        place = f"task {number:06d} ({what}) of {self._where}"
        try:
            result = ray.get(finished[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StorageRefused):
                raise TaskFailed(f"{place}: {error.cause}") from None
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            if isinstance(error.cause, StorageFault):
                raise StorageFault(f"{place}: {error.cause}") from None
            if isinstance(error.cause, OSError) and error.cause.strerror:
                file = "" if error.cause.filename is None else f"{error.cause.filename}: "
                raise TaskFailed(f"{place}: {file}{error.cause.strerror}") from error
            raise TaskFailed(f"{place} failed: {error.cause!r}") from error
        except ray.exceptions.WorkerCrashedError as error:
            raise TaskFailed(f"{place}: its process died in each of {self._retries + 1} tries") from error
        except ray.exceptions.RayError as error:
            raise TaskFailed(f"{place}: Ray gave it up: {' '.join(str(error).split())}") from error
        done(result)

    def stop(self) -> None:
        """Cancel what still runs and wait until it is gone, so that nothing is written any more."""
        import ray

        for reference in self._running:
            ray.cancel(reference, force=True)
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running), timeout=30)
        self._running.clear()


def _by_cause(dropped: dict[str, int]) -> str:
    ranked = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{cause} {number}" for cause, number in ranked)
