"""From a raw corpus to a dataset of shards: the driver of the tasks in ``stages``.

::

    survey -> plan -> encode (a task a shard) -> duplicates -> write -> manifest

The driver lists the source, starts Ray tasks (at most ``in_flight`` at a time) and adds up their records;
media are only opened in tasks. Killed at any moment and run again, it goes on from what is recorded and ends
with the same bytes.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sharding.config import (
    FetchConfig,
    FolderSource,
    ImageConfig,
    PrepareConfig,
    SourceConfig,
    TableSource,
    VideoConfig,
)
from sharding.errors import BadDataLimit, StorageFault, UserError
from sharding.manifest import MANIFEST_PATH, Counts, Manifest, ShardRecord, canonical_digest, load_manifest
from sharding.storage import Storage

if TYPE_CHECKING:
    from sharding.scoring import Scorers
    from sharding.stages import TaskRecord, Work

__all__ = [
    "FetchConfig",
    "FolderSource",
    "ImageConfig",
    "PrepareConfig",
    "PreparedDataset",
    "Progress",
    "SourceConfig",
    "TableSource",
    "TaskFailed",
    "VideoConfig",
    "dataset_path",
    "prepare",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class TaskFailed(RuntimeError):
    """A task that failed by a bug, or whose process crashed more often than it may. Names the task."""


@dataclass(frozen=True)
class PreparedDataset:
    """``path`` is relative to the storage that ``prepare`` was given."""

    path: str
    manifest: Manifest


@dataclass(frozen=True)
class Progress:
    """Where the preparation stands, after each task.

    Args:
        phase: ``"listing"``, ``"encode"``, ``"duplicates"`` or ``"write"``.
        done, total: tasks of this phase (inputs while listing, whose total is not known: 0).
        counts: of the tasks that are done.
        seconds: since this phase began.
    """

    phase: str
    done: int
    total: int
    seconds: float
    counts: Counts = field(default_factory=Counts)

    @property
    def rate(self) -> float:
        """Inputs a second in this phase (0 for ``"duplicates"``, which sees none)."""
        read = self.done if self.phase == "listing" else self.counts.read
        return read / self.seconds if self.seconds > 0 else 0.0


ProgressCallback = Callable[[Progress], None]


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
    scorers: Scorers | None = None,
) -> PreparedDataset:
    """Make the dataset, or go on making it, or return it when it is there and its source lists the same.

    Ray must be initialised. ``storage`` is the root of the job's storage; its S3 options serve the source.

    Args:
        in_flight: Ray tasks (one CPU each) at a time.
        progress: called in this thread after each task.
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
    from sharding.sources import open_source
    from sharding.stages import WORK, Work

    if not _NAME.fullmatch(name):
        raise UserError(f"dataset name {name!r}: use letters, digits, '.', '_' and '-'")
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
    work = Work(dataset, config, make_plan(source, found, config, dataset), scorer)
    shards, counts = _run_stages(work, in_flight, tell)
    if not shards:
        raise UserError(
            f"nothing is left of {found.inputs} inputs of {found.url}: {_by_cause(counts.dropped)}"
        )
    manifest = Manifest(
        name=name,
        modality=config.modality,
        configuration=config.identity(),
        configuration_digest=config.digest,
        source=found.model_dump(mode="json"),
        shards=shards,
        counts=counts,
    )
    dataset.write_json(MANIFEST_PATH, manifest.model_dump(mode="json"))
    dataset.delete(WORK, recursive=True)
    return PreparedDataset(path, manifest)


def _run_stages(work: Work, in_flight: int, tell: ProgressCallback) -> tuple[list[ShardRecord], Counts]:
    from sharding import stages
    from sharding.exchange import steps as exchange_steps

    pool = _Tasks(work, in_flight)
    limit = _BadLimit(work)
    tally = _Tally("encode", work.plan.tasks, tell)

    def encoded(record: TaskRecord) -> None:
        tally.add(record)
        limit.add(record)

    try:
        pool.run(stages.encode, range(work.plan.tasks), encoded)
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
        pool = _Tasks(work, in_flight, (work, exchange))
        pool.run(stages.commit, range(work.plan.tasks), tally.add)
    return [tally.shards[task] for task in sorted(tally.shards)], tally.counts


class _Tally:
    """Adds up the records of one phase and reports progress. Grows with the shards, not with the samples."""

    def __init__(self, phase: str, total: int, tell: ProgressCallback, counts: Counts | None = None) -> None:
        self.counts = counts or Counts()
        self.shards: dict[int, ShardRecord] = {}
        self._phase, self._total, self._tell = phase, total, tell
        self._done, self._started = 0, time.monotonic()

    def add(self, record: TaskRecord) -> None:
        self.counts = self.counts.plus(record.counts)
        if record.shard is not None:
            self.shards[record.task] = record.shard
        self.step()

    def step(self) -> None:
        self._done += 1
        seconds = time.monotonic() - self._started
        self._tell(Progress(self._phase, self._done, self._total, seconds, self.counts))


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
            if isinstance(error.cause, UserError | StorageFault):
                raise type(error.cause)(str(error.cause)) from None
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
