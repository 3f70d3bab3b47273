"""The kinds of tasks that make a dataset. Each is a function of what is stored; none knows Ray.

::

    plan/000007.parquet --encode--> work/staged/000007.{tar,parquet,json}
    all staged indexes  --the steps of sharding/exchange.py--> rows to drop
    staged + dropped    --commit--> 000007.{tar,parquet}, commits/000007.json

Duplicates are found over the whole corpus, and the first in input order stays, however many workers there are and
in whatever order they finish: staged shards already lack what every other filter drops, and the exchange looks at
all of them only when all are there. Media are read and encoded once only.
A dataset without filters over the whole corpus, or one of a single task with exact ones, needs no exchange:
``encode`` then commits by itself.

Every task is idempotent: its record is written last, and with the record there it does nothing.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sharding.candidate import Candidate, Examiner
from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.exchange import Exchange, dropped_rows
from sharding.filters.config import chosen, corpus_cause
from sharding.index import IndexRow, read_index
from sharding.manifest import Counts, ShardRecord
from sharding.plan import Plan, read_inputs
from sharding.scoring import ScorerFactory, Scoring
from sharding.sources.fetch import Fetcher, public_address
from sharding.storage import Storage
from sharding.writer import ShardWriter, copy_without, publish

WORK = "work"
_STAGED = f"{WORK}/staged"
_EXCHANGE = f"{WORK}/exchange"
_COMMITS = "commits"
_EXAMPLES = 3


@dataclass(frozen=True)
class Work:
    """All that a task needs to know about its dataset; small, picklable. ``scorer`` is that of the score filter."""

    dataset: Storage
    config: PrepareConfig
    plan: Plan
    scorer: ScorerFactory | None = None

    @property
    def drops_copies(self) -> bool:
        """Whether a task may drop equal files by itself: no filter over the whole corpus comes before."""
        filters = self.config.corpus_filters
        return bool(filters) and corpus_cause(filters[0]) == "duplicate"

    @property
    def exchanges(self) -> bool:
        """Whether samples must be compared with those of other tasks, or by more than their bytes."""
        alone = self.plan.tasks == 1 and len(self.config.corpus_filters) == 1 and self.drops_copies
        return bool(self.config.corpus_filters) and not alone

    def exchange(self, samples: int) -> Exchange:
        """The comparison of the ``samples`` that are staged when every task is encoded."""
        return Exchange(
            dataset=self.dataset,
            folder=f"{_EXCHANGE}/{samples}",
            filters=tuple(self.config.corpus_filters),
            tasks=self.plan.tasks,
            samples=samples,
            index_path=_staged_index,
        )


class TaskRecord(BaseModel):
    """What became of one task's inputs. ``examples``: a few dropped inputs of each cause, in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: int
    shard: ShardRecord | None
    counts: Counts
    examples: dict[str, list[str]]

    @property
    def bad(self) -> int:
        """Inputs dropped because they are broken, rather than by choice."""
        return sum(number for cause, number in self.counts.dropped.items() if not chosen(cause))


def shard_name(task: int) -> str:
    return f"{task:06d}"


def _staged_index(task: int) -> str:
    return f"{_STAGED}/{shard_name(task)}.parquet"


def _record_path(task: int, committed: bool) -> str:
    return f"{_COMMITS if committed else _STAGED}/{shard_name(task)}.json"


def _recorded(dataset: Storage, path: str) -> TaskRecord | None:
    try:
        return TaskRecord.model_validate(dataset.read_json(path))
    except FileNotFoundError:
        return None


def encode(work: Work, task: int) -> TaskRecord:
    """Read, filter and encode the inputs of one task into a shard (staged, where an exchange is to come)."""
    committed = not work.exchanges
    path = _record_path(task, committed)
    record = _recorded(work.dataset, path)
    if record is not None:
        return record
    with tempfile.TemporaryDirectory(prefix="glscl-prepare-") as folder:
        with ShardWriter(Path(folder) / "shard.tar") as writer:
            counts, examples = _write_candidates(work, task, writer)
        shard = None
        if writer.rows:
            name = shard_name(task)
            shard = publish(writer, work.dataset, name if committed else f"{_STAGED}/{name}")
    record = TaskRecord(task=task, shard=shard, counts=counts, examples=examples)
    work.dataset.write_json(path, record.model_dump(mode="json"))
    return record


def _write_candidates(work: Work, task: int, writer: ShardWriter) -> tuple[Counts, dict[str, list[str]]]:
    examiner = Examiner(work.config)
    base = work.dataset.resolve(work.plan.source.url)
    fetcher = Fetcher(base, work.config.fetch, int(work.config.max_source_mb * 2**20))
    dropped: Counter[str] = Counter()
    captions_dropped: Counter[str] = Counter()
    examples: defaultdict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    read = 0

    def drop(cause: str, address: str, detail: str) -> None:
        dropped[cause] += 1
        if len(examples[cause]) < _EXAMPLES:
            examples[cause].append(f"{address}: {detail}")

    def examined() -> Iterator[tuple[str, Candidate]]:
        nonlocal read
        for row, fetched in enumerate(fetcher.fetch_all(read_inputs(work.dataset, task))):
            read += 1
            try:
                candidate = examiner.examine(fetched)
            except BadData as fault:
                drop(fault.cause, public_address(fetched.input.address), fault.detail)
                continue
            yield f"{shard_name(task)}-{row:06d}", candidate

    for key, candidate, score, cause in _scored(work, examined()):
        if cause is not None:
            drop(cause, candidate.source, f"score {score}")
            continue
        if candidate.sha256 in seen:
            drop("duplicate", candidate.source, "the same bytes came before")
            continue
        if work.drops_copies:
            seen.add(candidate.sha256)
        captions_dropped.update(candidate.captions_dropped)
        writer.add(key, candidate.media, candidate.captions, candidate.sha256, candidate.source, score)
    counts = Counts(
        read=read,
        kept=len(writer.rows),
        dropped=dict(sorted(dropped.items())),
        captions_dropped=dict(sorted(captions_dropped.items())),
    )
    return counts, dict(sorted(examples.items()))


def _scored(
    work: Work, candidates: Iterator[tuple[str, Candidate]]
) -> Iterator[tuple[str, Candidate, float | None, str | None]]:
    """(key, candidate, score, cause by which the score drops it); no score where no scorer is asked."""
    block = work.config.score_filter
    if block is None:
        yield from ((key, candidate, None, None) for key, candidate in candidates)
        return
    assert work.scorer is not None
    scoring = Scoring(block, work.scorer)
    for (key, candidate), score in scoring.scored(candidates, lambda item: (item[1].media, item[1].captions)):
        yield key, candidate, score, scoring.objection(score)


def commit(found: tuple[Work, Exchange], task: int) -> TaskRecord:
    """Write the staged shard, without what the exchange found, to its final place."""
    work, exchange = found
    path = _record_path(task, committed=True)
    record = _recorded(work.dataset, path)
    if record is not None:
        return record
    staged = TaskRecord.model_validate(work.dataset.read_json(_record_path(task, committed=False)))
    causes = dropped_rows(exchange, task)
    copies = set(causes)
    shard = None
    tar = f"{_STAGED}/{shard_name(task)}.tar"
    if staged.shard is not None and staged.shard.samples > len(copies):
        try:
            shard = _without(work.dataset, task, staged.shard, tar, copies)
        except (BadData, FileNotFoundError):
            # The staged shard broke (a full disk, a lost machine): encoding again gives the same bytes.
            work.dataset.delete(_record_path(task, committed=False))
            encode(work, task)
            shard = _without(work.dataset, task, staged.shard, tar, copies)
    counts = staged.counts.plus(Counts(kept=-len(causes), dropped=dict(Counter(causes.values()))))
    record = TaskRecord(task=task, shard=shard, counts=counts, examples=staged.examples)
    work.dataset.write_json(path, record.model_dump(mode="json"))
    work.dataset.delete(tar)
    return record


def _without(dataset: Storage, task: int, staged: ShardRecord, tar: str, copies: set[int]) -> ShardRecord:
    index = read_index(dataset.read_bytes(_staged_index(task)))
    rows = [IndexRow(**row) for row in index.to_pylist()]
    with tempfile.TemporaryDirectory(prefix="glscl-prepare-") as folder:
        source = Path(folder) / "staged.tar"
        dataset.download(tar, source, size=staged.bytes, sha256=staged.sha256)
        with ShardWriter(Path(folder) / "shard.tar") as writer, source.open("rb") as file:
            copy_without(file, rows, copies, writer)
        return publish(writer, dataset, shard_name(task))


def forget(work: Work, task: int) -> None:
    """Remove the records of a task, so that the next run does it again."""
    for committed in (False, True):
        work.dataset.delete(_record_path(task, committed))
