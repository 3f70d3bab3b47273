"""The three kinds of tasks that make a dataset. Each is a function of what is stored; none knows Ray.

::

    work/plan/000007.parquet --encode--> work/staged/000007.{tar,parquet,json}
    all staged indexes  --find_duplicates--> work/duplicates/00000.parquet   (one a bucket of digests)
    staged + duplicates --commit--> 000007.{tar,parquet}, commits/000007.json

Exact duplicates are found over the whole corpus, and the first in input order stays, however many workers
there are and in whatever order they finish: staged shards already lack what every other filter drops, and the
exchange looks at all of them only when all are there. It is bounded because a bucket holds a fixed share of
the digests (16 bytes each), read from the staged indexes; media are read and encoded once only.
A dataset of one task, or one that keeps duplicates, needs no exchange: ``encode`` then commits by itself.

Every task is idempotent: its record is written last, and with the record there it does nothing. Before its record
it writes a few small pictures (``sharding/contact.py``) for the closing report (``sharding/summary.py``).
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from sharding.candidate import Examiner
from sharding.config import PrepareConfig
from sharding.contact import Collector, ContactSheet
from sharding.errors import BadData, UserError
from sharding.filters import CHOSEN
from sharding.filters.duplicates import digest_words, later_copies
from sharding.index import IndexRow, read_index
from sharding.manifest import Counts, ShardRecord
from sharding.plan import Plan, read_inputs
from sharding.sources import open_fetcher
from sharding.sources.base import Input
from sharding.sources.fetch import public_address
from sharding.storage import Storage
from sharding.writer import ShardWriter, copy_without, publish

WORK = "work"
_STAGED = f"{WORK}/staged"
_DUPLICATES = f"{WORK}/duplicates"
_CONTACT = f"{WORK}/contact"
_COMMITS = "commits"
_EXAMPLES = 3
_READERS = 16
_READ_AHEAD = 1024

_COPY_SCHEMA = pa.schema([pa.field("task", pa.int32()), pa.field("row", pa.int32())])


@dataclass(frozen=True)
class Work:
    """All that a task needs to know about its dataset; small, picklable."""

    dataset: Storage
    config: PrepareConfig
    plan: Plan

    @property
    def exchanges(self) -> bool:
        """Whether duplicates may lie in different tasks."""
        return self.config.filters.duplicates == "drop" and self.plan.tasks > 1


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
        return sum(number for cause, number in self.counts.dropped.items() if cause not in CHOSEN)


def shard_name(task: int) -> str:
    return f"{task:06d}"


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
    except ValidationError as error:
        url, problem = dataset.url_of(path), error.errors()[0]["msg"]
        raise UserError(
            f"{url} is no record of a task ({problem}): remove it, and the task is done again"
        ) from None


def committed_record(work: Work, task: int) -> TaskRecord:
    """The record of a committed task. FileNotFoundError (with the url) where it is not committed."""
    return TaskRecord.model_validate(work.dataset.read_json(_record_path(task, committed=True)))


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
    seen: set[str] = set()
    inputs = 0

    def note(fault: BadData, row: int, source: Input) -> None:
        address = public_address(source.address)
        pictures.drop(row, address, fault)
        if len(examples[fault.cause]) < _EXAMPLES:
            examples[fault.cause].append(f"{address}: {fault.detail}")

    fetched = pictures.watch(fetcher.fetch_all(read_inputs(work.dataset, task)))
    for row, (source, examined) in enumerate(examiner.examine_all(fetched)):
        inputs += 1
        if isinstance(examined, BadData):
            dropped[examined.cause] += 1
            note(examined, row, source)
            continue
        dropped.update(examined.dropped)
        for fault in examined.faults:
            note(fault, row, source)
        for candidate in examined.candidates:
            if candidate.sha256 in seen:
                dropped["duplicate"] += 1
                note(BadData("duplicate", "the same bytes came before"), row, source)
                continue
            if work.config.filters.duplicates == "drop":
                seen.add(candidate.sha256)
            captions_dropped.update(candidate.captions_dropped)
            key = f"{shard_name(task)}-{row:06d}"
            key = key if candidate.part is None else f"{key}-{candidate.part:04d}"
            pictures.keep(row, key, candidate.media, candidate.captions, candidate.source)
            writer.add(key, candidate.media, candidate.captions, candidate.sha256, candidate.source)
    counts = Counts(
        inputs=inputs,
        read=len(writer.rows) + dropped.total(),
        kept=len(writer.rows),
        dropped=dict(sorted(dropped.items())),
        captions_dropped=dict(sorted(captions_dropped.items())),
    )
    return counts, dict(sorted(examples.items()))


def find_duplicates(work: Work, bucket: int) -> int:
    """Record the staged rows whose digest, one of this bucket, came before. Returns their number."""
    path = f"{_DUPLICATES}/{bucket:05d}.parquet"
    if work.dataset.exists(path):
        return len(_read_copies(work.dataset, path))
    words, places = [np.empty((0, 2), np.uint64)], [np.empty((0, 2), np.int32)]
    for task in range(work.plan.tasks):
        digests = _staged_digests(work.dataset, task)
        mine = np.flatnonzero(digests[:, 0] % np.uint64(work.plan.buckets) == bucket)
        words.append(digests[mine])
        places.append(np.stack([np.full(len(mine), task), mine], axis=1).astype(np.int32))
    copies = np.concatenate(places)[later_copies(np.concatenate(words))]
    table = pa.table({"task": copies[:, 0], "row": copies[:, 1]}, schema=_COPY_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    work.dataset.write_bytes(path, sink.getvalue().to_pybytes())
    return len(copies)


def _staged_digests(dataset: Storage, task: int) -> np.ndarray:
    try:
        data = dataset.read_bytes(f"{_STAGED}/{shard_name(task)}.parquet")
    except FileNotFoundError:  # every input of the task was dropped
        return np.empty((0, 2), np.uint64)
    return digest_words(read_index(data).column("sha256").to_pylist())


def _read_copies(dataset: Storage, path: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(dataset.read_bytes(path)))


def commit(work: Work, task: int) -> TaskRecord:
    """Write the staged shard without its duplicates to its final place."""
    path = _record_path(task, committed=True)
    record = _recorded(work.dataset, path)
    if record is not None:
        return record
    staged = TaskRecord.model_validate(work.dataset.read_json(_record_path(task, committed=False)))
    copies = set(_copies_of(work, task))
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
    found = {"duplicate": len(copies)} if copies else {}
    counts = staged.counts.plus(Counts(kept=-len(copies), dropped=found))
    sheet = ContactSheet.load(work.dataset, contact_path(task, committed=False))
    if copies:
        keys = _staged_index(work.dataset, task).column("key").to_pylist()
        sheet = sheet.without({keys[row]: "duplicate" for row in copies})
    sheet.save(work.dataset, contact_path(task, committed=True))
    record = TaskRecord(task=task, shard=shard, counts=counts, examples=staged.examples)
    work.dataset.write_json(path, record.model_dump(mode="json"))
    work.dataset.delete(tar)
    return record


def _copies_of(work: Work, task: int) -> Iterator[int]:
    for bucket in range(work.plan.buckets):
        copies = _read_copies(work.dataset, f"{_DUPLICATES}/{bucket:05d}.parquet")
        rows = copies.column("row").to_numpy()
        yield from rows[copies.column("task").to_numpy() == task].tolist()


def _staged_index(dataset: Storage, task: int) -> pa.Table:
    return read_index(dataset.read_bytes(f"{_STAGED}/{shard_name(task)}.parquet"))


def _without(dataset: Storage, task: int, staged: ShardRecord, tar: str, copies: set[int]) -> ShardRecord:
    rows = [IndexRow(**row) for row in _staged_index(dataset, task).to_pylist()]
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
