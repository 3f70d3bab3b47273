"""The kinds of tasks that make a dataset. Each is a function of what is stored; none knows Ray.

::

    work/plan/000007.parquet --encode--> work/staged/000007.{tar,parquet,json}
    all staged indexes  --the steps of sharding/exchange.py--> rows to drop
    staged + dropped    --commit--> 000007.{tar,parquet}, commits/000007.json

Duplicates are found over the whole corpus, and the first in input order stays, however many workers there are and
in whatever order they finish: staged shards already lack what every other filter drops, and of their own samples
those that equal an earlier one in bytes and captions; the exchange looks at all of them only when all are there.
Media are read and encoded once only.
A dataset without filters over the whole corpus, or one of a single task with exact ones, needs no exchange:
``encode`` then commits by itself.

Every task is idempotent: its record is written last, and with the record there it does nothing. Before its record
it writes a few small pictures (``sharding/contact.py``) for the closing report (``sharding/summary.py``).
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from sharding.candidate import Candidate, Examiner
from sharding.config import PrepareConfig
from sharding.contact import Collector, ContactSheet
from sharding.errors import BadData, UserError
from sharding.exchange import Exchange, dropped_rows
from sharding.filters.config import OTHER_CAPTION, chosen, corpus_cause
from sharding.index import IndexRow, read_index
from sharding.manifest import Counts, ShardRecord
from sharding.plan import Plan, read_inputs
from sharding.scoring import ScorerFactory, Scoring
from sharding.sources import open_fetcher
from sharding.storage import Storage
from sharding.writer import ShardWriter, copy_without, publish, send_index

WORK = "work"
_STAGED = f"{WORK}/staged"
_CONTACT = f"{WORK}/contact"
_EXCHANGE = f"{WORK}/exchange"
_EXCHANGE_FORMAT = 2  # of the files between its steps
_COMMITS = "commits"
_EXAMPLES = 3
_READERS = 16
_READ_AHEAD = 1024


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
            folder=f"{_EXCHANGE}/{samples}-{_EXCHANGE_FORMAT}",
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


def contact_path(task: int, committed: bool) -> str:
    """Where a task's contact sheet lies: of its staged samples, or of those that are kept in the end."""
    return f"{_CONTACT}/{'committed' if committed else 'staged'}/{shard_name(task)}.json"


def _recorded(dataset: Storage, path: str) -> TaskRecord | None:
    try:
        return TaskRecord.model_validate(dataset.read_json(path))
    except FileNotFoundError:
        return None
    except UserError:
        raise  # a ValueError too: the storage refuses
    except ValueError as error:  # not JSON, or JSON of something else
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is not JSON"
        url = dataset.url_of(path)
        raise UserError(
            f"{url} is no record of a task ({problem}): remove it, and the task is done again"
        ) from None


def committed_record(work: Work, task: int) -> TaskRecord:
    """The record of a committed task. FileNotFoundError (with the url) where it is not committed."""
    path = _record_path(task, committed=True)
    record = _recorded(work.dataset, path)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", work.dataset.url_of(path))
    return record


def recorded_tasks(work: Work, committed: bool) -> Iterator[TaskRecord]:
    """The records that earlier runs left, in the order of the tasks: one listing, then a few reads at a time.

    A re-run takes them from here rather than starting a task for each, of which there may be 10^5.

    Raises:
        UserError: one is no record; names its url.
    """
    folder = _record_path(0, committed).rpartition("/")[0]
    paths = (file.path for file in work.dataset.list(folder) if file.path.endswith(".json"))
    with ThreadPoolExecutor(_READERS) as pool:
        while chunk := list(islice(paths, _READ_AHEAD)):
            yield from (record for record in pool.map(partial(_recorded, work.dataset), chunk) if record)


def encode(work: Work, task: int) -> TaskRecord:
    """Read, filter and encode the inputs of one task into a shard (staged, where an exchange is to come)."""
    committed = not work.exchanges
    path = _record_path(task, committed)
    record = _recorded(work.dataset, path)
    if record is not None:
        return record
    pictures = Collector(shard_name(task), work.config.modality, work.config.input_modality, work.plan.tasks)
    with tempfile.TemporaryDirectory(prefix="glscl-prepare-") as folder:
        with ShardWriter(Path(folder) / "shard.tar") as writer:
            counts, examples = _write_candidates(work, task, writer, pictures)
        shard = None
        if writer.rows:
            name = shard_name(task)
            shard = publish(writer, work.dataset, name if committed else f"{_STAGED}/{name}")
    pictures.sheet().save(work.dataset, contact_path(task, committed))
    record = TaskRecord(task=task, shard=shard, counts=counts, examples=examples)
    work.dataset.write_json(path, record.model_dump(mode="json"))
    return record


def _write_candidates(
    work: Work, task: int, writer: ShardWriter, pictures: Collector
) -> tuple[Counts, dict[str, list[str]]]:
    examiner = Examiner(work.config)
    fetcher = open_fetcher(work.config, work.dataset, work.plan.source.url)
    dropped: Counter[str] = Counter()
    captions_dropped: Counter[str] = Counter()
    examples: defaultdict[str, list[str]] = defaultdict(list)
    seen: defaultdict[str, set[tuple[str, int]]] = defaultdict(
        set
    )  # captions by digest, as the exchange tells them
    inputs = 0

    def count(address: str, fault: BadData) -> None:
        dropped[fault.cause] += 1
        if len(examples[fault.cause]) < _EXAMPLES:
            examples[fault.cause].append(f"{address}: {fault.detail}")

    def candidates() -> Iterator[tuple[int, Candidate]]:
        nonlocal inputs
        fetched = pictures.watch(fetcher.fetch_all(read_inputs(work.dataset, task)))
        for row, (source, examined) in enumerate(examiner.examine_all(fetched)):
            inputs += 1
            for fault in [examined] if isinstance(examined, BadData) else examined.faults:
                count(source.address, fault)
                pictures.drop(row, source.address, fault)
            if not isinstance(examined, BadData):
                yield from ((row, candidate) for candidate in examined.candidates)

    for row, candidate, score, fault in _scored(work, candidates()):
        if fault is None and work.drops_copies:
            captions = candidate.captions[0], len(candidate.captions)
            if candidate.sha256 in seen:
                same = captions in seen[candidate.sha256]
                what = "the same bytes came before" + ("" if same else ", with other captions")
                # An exchange must see every caption of the media, or what a later task's copy counts as would depend
                # on how the corpus is cut into tasks; copies in every respect tell it nothing.
                if same or not work.exchanges:
                    fault = BadData("duplicate" if same else OTHER_CAPTION, what)
            seen[candidate.sha256].add(captions)
        if fault is not None:
            count(candidate.source, fault)
            pictures.reject(row, candidate.media, candidate.captions, candidate.source, fault)
            continue
        captions_dropped.update(candidate.captions_dropped)
        key = f"{shard_name(task)}-{row:06d}"
        key = key if candidate.part is None else f"{key}-{candidate.part:04d}"
        pictures.keep(row, key, candidate.media, candidate.captions, candidate.source)
        writer.add(key, candidate.media, candidate.captions, candidate.sha256, candidate.source, score)
    counts = Counts(
        inputs=inputs,
        read=len(writer.rows) + dropped.total(),
        kept=len(writer.rows),
        dropped=dict(sorted(dropped.items())),
        captions_dropped=dict(sorted(captions_dropped.items())),
    )
    return counts, dict(sorted(examples.items()))


def _scored(
    work: Work, candidates: Iterator[tuple[int, Candidate]]
) -> Iterator[tuple[int, Candidate, float | None, BadData | None]]:
    """(row, candidate, score, why the score drops it); no score where no scorer is asked."""
    block = work.config.score_filter
    if block is None:
        yield from ((row, candidate, None, None) for row, candidate in candidates)
        return
    assert work.scorer is not None
    scoring = Scoring(block, work.scorer)
    for (row, candidate), score in scoring.scored(candidates, lambda item: (item[1].media, item[1].captions)):
        cause = scoring.objection(score)
        yield row, candidate, score, None if cause is None else BadData(cause, f"score {score}")


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
    sheet = ContactSheet.load(work.dataset, contact_path(task, committed=False))
    if causes:
        keys = _read_staged_index(work.dataset, task).column("key").to_pylist()
        sheet = sheet.without({keys[row]: cause for row, cause in causes.items()})
    sheet.save(work.dataset, contact_path(task, committed=True))
    record = TaskRecord(task=task, shard=shard, counts=counts, examples=staged.examples)
    work.dataset.write_json(path, record.model_dump(mode="json"))
    work.dataset.delete(tar)
    return record


def _read_staged_index(dataset: Storage, task: int) -> pa.Table:
    return read_index(dataset.read_bytes(_staged_index(task)))


def _without(dataset: Storage, task: int, staged: ShardRecord, tar: str, copies: set[int]) -> ShardRecord:
    """Publish the staged shard without some rows; as it is where there are none to leave out."""
    index = dataset.read_bytes(_staged_index(task))
    if hashlib.sha256(index).hexdigest() != staged.index_sha256:
        raise BadData("index-mismatch", f"{dataset.url_of(_staged_index(task))} was changed or damaged")
    name = shard_name(task)
    if not copies:
        dataset.copy(tar, f"{name}.tar", size=staged.bytes, sha256=staged.sha256)
        send_index(index, dataset, name)
        return staged
    with tempfile.TemporaryDirectory(prefix="glscl-prepare-") as folder:
        source = Path(folder) / "staged.tar"
        dataset.download(tar, source, size=staged.bytes, sha256=staged.sha256)
        rows = [IndexRow(**row) for row in read_index(index).to_pylist()]
        with ShardWriter(Path(folder) / "shard.tar") as writer, source.open("rb") as file:
            copy_without(file, rows, copies, writer)
        return publish(writer, dataset, name)


def forget(work: Work, task: int) -> None:
    """Remove the records of a task, so that the next run does it again."""
    for committed in (False, True):
        work.dataset.delete(_record_path(task, committed))
