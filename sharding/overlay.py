"""Dropping samples of a finished dataset: an overlay over its manifest; tars are never rewritten.

The overlay's files are a log, ``overlay/000001.json``, ``overlay/000002.json``, ..., of which the newest holds
everything that is dropped. A change is one file created under the next number, which exactly one writer can do:
of two at once, the other starts over from what the first left, so no retraction is lost, and a writer killed
at any moment leaves the dataset as it was. Nothing is overwritten, so the history is there, and undoing a change
is one more change.

Few dropped keys stand in the overlay's file itself, for people to read. More than ``INLINE_KEYS`` are in a
Parquet file named by its sha256, one row (shard, row, key) each: 8 bytes of memory a dropped sample in a reader.

The digest of the dataset changes with every change, but not the order of its samples: a dropped one keeps its slot,
which stays empty. A training under way leaves out what was dropped from its next start on (a process that runs now
has its manifest loaded).
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.errors import UserError
from sharding.index import load_index
from sharding.manifest import (
    DroppedRows,
    Manifest,
    OverlayRevision,
    Retraction,
    ShardRecord,
    load_manifest,
    overlay_path,
)
from sharding.storage import Storage

INLINE_KEYS = 1000
_READS_AT_ONCE = 8
_NAMED = 5  # keys shown in an error

#: Samples by their place: in the order of shard and row.
ROWS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),  # number in the manifest
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
    ]
)

#: Which rows of a shard a retraction means: from its index, a mask (bool [rows]) that may hold nulls.
Choice = Callable[[pa.Table], pa.Array | pa.ChunkedArray]


class Dropped:
    """What the overlay of a manifest drops. Loaded once; small unless much is dropped (8 bytes a sample).

    Raises:
        UserError: the overlay's file of rows is missing or damaged. Never passed over: what was taken down must
            not come back.
    """

    def __init__(self, dataset: Storage, manifest: Manifest) -> None:
        self._keys = frozenset(manifest.dropped_keys)
        self._places = np.empty(0, np.int64)
        if manifest.dropped_rows is not None:
            table = load_rows(dataset, manifest.dropped_rows)
            self._places = _places(table)

    def __len__(self) -> int:
        return len(self._keys) + len(self._places)

    def holds(self, shard: int, row: int, key: str) -> bool:
        """Whether this sample is dropped."""
        if key in self._keys:
            return True
        if not len(self._places):
            return False
        place = shard << 32 | row
        at = int(np.searchsorted(self._places, place))
        return at < len(self._places) and int(self._places[at]) == place

    def among(self, rows: pa.Table) -> np.ndarray:
        """Which of the samples in rows (shard, row, key) are dropped: bool [rows]."""
        dropped: np.ndarray = np.isin(_places(rows), self._places)
        return dropped | self._by_key(rows["key"])

    def mask(self, shard: int, keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Which samples of a shard are dropped: bool [rows], of its keys in the order of the index."""
        dropped = self._by_key(keys)
        begin, end = np.searchsorted(self._places, (shard << 32, (shard + 1) << 32))
        dropped[self._places[begin:end] & 0xFFFFFFFF] = True
        return dropped

    def _by_key(self, keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
        if not self._keys:
            return np.zeros(len(keys), dtype=bool)
        found = pc.is_in(keys, value_set=pa.array(sorted(self._keys), pa.string()))
        return np.array(found.to_numpy(zero_copy_only=False))


def load_rows(dataset: Storage, rows: DroppedRows) -> pa.Table:
    """The overlay's file of rows: columns shard, row, key, in the order of the first two."""
    url = dataset.url_of(rows.path)
    try:
        data = dataset.read_bytes(rows.path)
    except FileNotFoundError:
        raise UserError(f"{url} is missing: it says which samples were retracted") from None
    if hashlib.sha256(data).hexdigest() != rows.sha256:
        raise UserError(f"{url} was changed or damaged: it says which samples were retracted")
    return pq.read_table(pa.BufferReader(data)).cast(ROWS_SCHEMA)


def write_rows(dataset: Storage, table: pa.Table) -> DroppedRows:
    """Store rows (shard, row, key) under the sha256 of their file."""
    table = table.cast(ROWS_SCHEMA).sort_by([("shard", "ascending"), ("row", "ascending")])
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", version="2.6")
    data = sink.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"overlay/{sha256}.parquet"
    dataset.write_bytes(path, data)
    return DroppedRows(path=path, bytes=len(data), sha256=sha256, samples=len(table))


@dataclass(frozen=True)
class Retracted:
    """What a retraction did, or would do.

    Args:
        before, after: the manifest before and after it; the same where nothing is dropped.
        rows: what it drops that was not dropped before: columns shard, row, key.
        already: samples it names that were dropped already.
        unknown: keys it names that are not in the dataset.
    """

    before: Manifest
    after: Manifest
    rows: pa.Table
    already: int
    unknown: list[str]


def retract_keys(
    dataset: Storage, keys: Iterable[str], *, reason: str, dry_run: bool = False, ignore_unknown: bool = False
) -> Retracted:
    """Drop samples by key. Memory: that of the keys.

    Raises:
        UserError: a key is not in the dataset (unless ``ignore_unknown``), or there is no key.
    """
    wanted = pa.array(sorted(set(keys)), pa.string())
    if not len(wanted):
        raise UserError("no key to retract")

    def choice(index: pa.Table) -> pa.ChunkedArray:
        return pc.is_in(index["key"], value_set=wanted)

    def check(found: pa.Table, manifest: Manifest) -> list[str]:
        unknown: list[str] = wanted.filter(pc.invert(pc.is_in(wanted, value_set=found["key"]))).to_pylist()
        if unknown and not ignore_unknown:
            shown = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "")
            raise UserError(
                f"{dataset.url} has no sample with the key {shown} ({len(unknown)} of {len(wanted)})"
            )
        return unknown

    rule = f"{len(wanted)} keys" if len(wanted) > 1 else f"key {wanted[0].as_py()}"
    return _retract(dataset, choice, rule, reason, dry_run, check, _likely_first(wanted), len(wanted))


def retract_where(
    dataset: Storage, choice: Choice, *, rule: str, reason: str, dry_run: bool = False
) -> Retracted:
    """Drop the samples that ``choice`` (``sharding.rules.parse_rule``) picks from the indexes; ``rule`` in words.

    Reads every index, ``8`` at a time. Memory: that of the samples it picks.
    """
    return _retract(dataset, choice, rule, reason, dry_run, lambda found, manifest: [], None, None)


def undo(dataset: Storage, *, reason: str, dry_run: bool = False) -> Retracted:
    """Undo the newest change of the overlay that is not undone yet: what it dropped is there again.

    The dataset then has the digest it had before that change.

    Raises:
        UserError: nothing is left to undo.
    """
    while True:
        before = load_manifest(dataset)
        revision = _undoable(before.retractions)
        if revision is None:
            raise UserError(f"{dataset.url}: there is no retraction to undo")
        former = load_manifest(dataset, revision - 1)
        back = before.retractions[revision - 1]
        entry = Retraction(samples=former.dropped - before.dropped, reason=reason, rule=f"undo {revision}")
        after = former.model_copy(update={"retractions": [*before.retractions, entry]})
        result = Retracted(before, after, ROWS_SCHEMA.empty_table(), back.samples, [])
        if dry_run or _commit(dataset, after):
            return result


def _undoable(history: list[Retraction]) -> int | None:
    """Number of the newest retraction that no later entry has undone."""
    skip: set[int] = set()
    for number in range(len(history), 0, -1):
        words = history[number - 1].rule.split()
        if words[:1] == ["undo"]:
            skip.add(int(words[1]))
        elif number not in skip:
            return number
    return None


def _retract(
    dataset: Storage,
    choice: Choice,
    rule: str,
    reason: str,
    dry_run: bool,
    check: Callable[[pa.Table, Manifest], list[str]],
    likely: Callable[[ShardRecord], bool] | None,
    enough: int | None,
) -> Retracted:
    while True:
        before = load_manifest(dataset)
        found = _find(dataset, before, choice, likely, enough)
        unknown = check(found, before)
        rows = found.filter(pa.array(~Dropped(dataset, before).among(found)))
        already = len(found) - len(rows)
        if not len(rows):
            return Retracted(before, before, rows, already, unknown)
        entry = Retraction(samples=len(rows), reason=reason, rule=rule)
        if dry_run:
            return Retracted(before, before, rows, already, unknown)
        after = with_dropped(dataset, before, rows, entry)
        if _commit(dataset, after):
            return Retracted(before, after, rows, already, unknown)


def with_dropped(dataset: Storage, manifest: Manifest, rows: pa.Table, entry: Retraction) -> Manifest:
    """The manifest with ``rows`` (shard, row, key) dropped too; writes their file where they are many."""
    history = {"retractions": [*manifest.retractions, entry]}
    if manifest.dropped_rows is None and manifest.dropped + len(rows) <= INLINE_KEYS:
        keys = sorted({*manifest.dropped_keys, *rows["key"].to_pylist()})
        return manifest.model_copy(update={**history, "dropped_keys": keys})
    if manifest.dropped_rows is not None:
        former = load_rows(dataset, manifest.dropped_rows)
    else:
        wanted = pa.array(manifest.dropped_keys, pa.string())
        former = _find(
            dataset, manifest, lambda index: pc.is_in(index["key"], value_set=wanted), None, len(wanted)
        )
    file = write_rows(dataset, pa.concat_tables([former, rows]))
    return manifest.model_copy(update={**history, "dropped_keys": [], "dropped_rows": file})


def _commit(dataset: Storage, manifest: Manifest) -> bool:
    """Create the overlay's next file; False when another writer was first."""
    base = load_manifest(dataset, 0)
    overlay = OverlayRevision(
        base=base.digest,
        dropped_keys=manifest.dropped_keys,
        dropped_rows=manifest.dropped_rows,
        history=manifest.retractions,
    )
    return dataset.create_exclusive(
        overlay_path(manifest.revision), overlay.model_dump_json(indent=2).encode()
    )


def _find(
    dataset: Storage,
    manifest: Manifest,
    choice: Choice,
    likely: Callable[[ShardRecord], bool] | None,
    enough: int | None,
) -> pa.Table:
    """The chosen samples as rows (shard, row, key); stops at ``enough``, having looked at likely shards first."""
    numbers = list(range(len(manifest.shards)))
    if likely is not None:
        numbers.sort(key=lambda number: not likely(manifest.shards[number]))
    parts, found = [ROWS_SCHEMA.empty_table()], 0
    if enough == 0:
        return parts[0]
    for number, index in _indexes(dataset, manifest, numbers):
        picked = np.flatnonzero(pc.fill_null(choice(index), False).to_numpy(zero_copy_only=False))
        if len(picked):
            shard = pa.array(np.full(len(picked), number, np.int32))
            columns = [shard, pa.array(picked.astype(np.int32)), index["key"].take(pa.array(picked))]
            parts.append(pa.table(columns, schema=ROWS_SCHEMA))
            found += len(picked)
        if found == enough:
            break
    return pa.concat_tables(parts).sort_by([("shard", "ascending"), ("row", "ascending")])


def _indexes(dataset: Storage, manifest: Manifest, numbers: list[int]) -> Iterator[tuple[int, pa.Table]]:
    """The indexes of these shards in this order, read a few ahead."""
    with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="index") as pool:
        for at in range(0, len(numbers), _READS_AT_ONCE):
            part = numbers[at : at + _READS_AT_ONCE]
            load = functools.partial(load_index, dataset)
            yield from zip(part, pool.map(load, [manifest.shards[number] for number in part]), strict=True)


def _likely_first(keys: pa.Array) -> Callable[[ShardRecord], bool]:
    """Shards whose name a key begins with, as the keys of a prepared dataset do: usually no other need be read."""
    stems = {key.partition("-")[0] for key in keys.to_pylist()}
    return lambda record: record.name in stems


def _places(table: pa.Table) -> np.ndarray:
    """int64 [N]: shard and row of each dropped sample in one number, ascending."""
    shards, rows = (table[name].to_numpy().astype(np.int64) for name in ("shard", "row"))
    return shards << 32 | rows
