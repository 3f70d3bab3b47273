"""The filters over the whole corpus: duplicates and near duplicates, found by bounded tasks.

::

    staged indexes --partition (a group of tasks)--> keys/FILTER/GROUP      cut by bucket: each index is read once
    keys           --compare   (a bucket of keys)--> others/FILTER/BUCKET   cut by group: who came later, with other
                                                     captions than all that are equal and came before
                                                     copies/FILTER/BUCKET   cut by group: all others who came later
                                                     spread/FILTER/BAND/BUCKET  near: first ones, cut by key
    spread         --search    (a band's bucket)---> near/SEARCH            cut by group: who is near an earlier one
    others, copies, near --gather (a group of tasks)--> dropped/GROUP       cut by task: rows and their cause

A key is 16 bytes of a digest and 8 of the captions' (of the first one, and how many there are), or the perceptual hash;
it travels with its *place* (task and row, in input order). Captions decide only under which cause a copy counts.
The rule is one for all: a sample is dropped if any earlier one equals it or lies within the distance, whether that
one is dropped or not. So it does not matter which task finds what first, and the result is the same for any number
of workers. Equal perceptual hashes are collapsed in ``compare`` before the search (``sharding/filters/near.py``).

Bounds, whatever the corpus: a group and a bucket hold about ``ROWS`` keys (32 bytes each, several times that while
they are sorted), and every file between two steps is one object, of which a task reads a part by two range reads.
Of 10^9 samples in 10^5 tasks, with ``duplicates`` and ``near_duplicates: 4`` (500 groups, 500 buckets, 2,500 bands'
buckets)::

    step        tasks     reads                             bytes read      objects written
    partition     500     10^5 indexes                      the indexes     1,000
    compare     1,000     500 x 2 each: 10^6                32 + 16 GB      4,000
    search      2,500     500 x 2 each: 2.5 x 10^6          80 GB           2,500
    gather        500     (1,500 + 2,500) x 2 each: 4 M     8 bytes a find  500
    commit       10^5     2 each                            8 bytes a drop  (the shards)

Memory of one task is that of its keys (``python -m benchmarks.duplicates``: about 250 bytes a key in ``partition``, 90
in the other steps, hence half a GiB at most). What can exceed ``ROWS``
are different perceptual hashes that agree on a whole block of 11 or more bits, since a band keeps them together.

Each step's object is its own record: with it there, a task does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sharding.filters.config import (
    OTHER_CAPTION,
    CorpusFilter,
    DuplicatesFilter,
    NearDuplicatesFilter,
    corpus_cause,
)
from sharding.filters.duplicates import digest_words, later_copies, mixed
from sharding.filters.near import Blocks, cut, search_band
from sharding.index import read_index
from sharding.storage import Storage

# Keys that one task compares at once.
ROWS = 2_000_000

# Reads that a task has under way: latency counts, not bandwidth.
_READERS = 8

_ROW_BITS = np.uint64(32)


@dataclass(frozen=True)
class Exchange:
    """The comparison of all staged samples of a dataset; small, picklable.

    Args:
        folder: where the steps' files lie.
        filters: the filters over the whole corpus, in order.
        tasks: of the dataset's plan.
        samples: how many are staged; with ``rows`` it decides how the work is cut, so it must be the same at each
            run.
        index_path: where a task's staged index lies, relative to ``dataset``.
        rows: keys that one task compares at once.
    """

    dataset: Storage
    folder: str
    filters: tuple[CorpusFilter, ...]
    tasks: int
    samples: int
    index_path: Callable[[int], str]
    rows: int = ROWS

    @property
    def group(self) -> int:
        """Tasks in a group."""
        return max(1, self.rows * self.tasks // max(1, self.samples))

    @property
    def groups(self) -> int:
        return -(-self.tasks // self.group)

    @property
    def buckets(self) -> int:
        """Of a filter's keys."""
        return max(1, -(-self.samples // self.rows))

    @property
    def searches(self) -> list[tuple[int, int, int]]:
        """(filter, band, bucket) of each search."""
        return [
            (number, band, bucket)
            for number, block in enumerate(self.filters)
            if _distance(block)
            for band in range(_distance(block) + 1)
            for bucket in range(self.buckets)
        ]

    def blocks(self, number: int) -> Blocks:
        """How the hashes of a filter are cut."""
        return cut(_distance(self.filters[number]), self.samples)

    def path(self, step: str, *numbers: int) -> str:
        return "/".join([self.folder, step, *(f"{number:06d}" for number in numbers)])


def steps(exchange: Exchange) -> list[tuple[Callable[[Exchange, int], None], int]]:
    """The functions to call for each number below their count, one after another; each call is a task."""
    return [
        (partition, exchange.groups),
        (compare, len(exchange.filters) * exchange.buckets),
        (search, len(exchange.searches)),
        (gather, exchange.groups),
    ]


def partition(exchange: Exchange, group: int) -> None:
    """Read the staged indexes of a group of tasks, and write their keys cut by bucket."""
    last = exchange.path("keys", len(exchange.filters) - 1, group)
    if exchange.dataset.exists(last):
        return
    first = group * exchange.group
    tasks = range(first, min(first + exchange.group, exchange.tasks))
    tables = _in_parallel(lambda task: _staged_keys(exchange, task), tasks)
    keys: list[list[np.ndarray]] = [[] for _ in exchange.filters]
    for of_task in tables:
        for found, words in zip(keys, of_task, strict=True):
            found.append(words)
    for number, found in enumerate(keys):
        rows = np.concatenate(found)
        parts = _cut(rows, mixed(rows[:, 0]), exchange.buckets)
        _write_parts(exchange.dataset, exchange.path("keys", number, group), parts)


def _staged_keys(exchange: Exchange, task: int) -> list[np.ndarray]:
    """For each filter uint64 [N, W + 1]: the key's words and the place."""
    try:
        index = read_index(exchange.dataset.read_bytes(exchange.index_path(task)))
    except FileNotFoundError:  # every input of the task was dropped
        return [np.empty((0, _width(block)), np.uint64) for block in exchange.filters]
    places = (np.uint64(task) << _ROW_BITS) + np.arange(index.num_rows, dtype=np.uint64)
    return [np.column_stack([_keys(index, block), places]) for block in exchange.filters]


def _keys(index: pa.Table, block: CorpusFilter) -> np.ndarray:
    if isinstance(block, NearDuplicatesFilter):
        return index.column("phash").to_numpy()[:, None]
    # KEY.txt holds the first caption.
    captions = index.column("text_xxh3").to_numpy() ^ mixed(
        index.column("captions").to_numpy().astype(np.uint64)
    )
    if block.by == "pixels":
        return np.column_stack([digest_words(index.column("pixels").to_pylist()), captions])
    words = digest_words(index.column("sha256").to_pylist())
    # Several samples of one input (TASK-ROW-PART) are no copies of each other.
    parts = [key.split("-")[2:] for key in index.column("key").to_pylist()]
    words[:, 1] ^= mixed(np.array([int(part[0]) + 1 if part else 0 for part in parts], dtype=np.uint64))
    return np.column_stack([words, captions])


def _width(block: CorpusFilter) -> int:
    return 4 if isinstance(block, DuplicatesFilter) else 2


def _distance(block: CorpusFilter) -> int:
    return block.distance if isinstance(block, NearDuplicatesFilter) else 0


def compare(exchange: Exchange, task: int) -> None:
    """Find the later ones of equal keys of one bucket, apart those with captions that none before had; of perceptual
    hashes hand the first ones on.
    """
    number, bucket = divmod(task, exchange.buckets)
    path = exchange.path("copies", number, bucket)
    if exchange.dataset.exists(path):
        return
    rows = _gathered(
        exchange, [(exchange.path("keys", number, group), bucket) for group in range(exchange.groups)]
    )
    rows = rows.reshape(-1, _width(exchange.filters[number]))  # in input order: groups are
    if isinstance(exchange.filters[number], DuplicatesFilter):
        copies = later_copies(rows[:, :2])
        others = copies & ~later_copies(rows[:, :3])
        _write_places(exchange, exchange.path("others", number, bucket), rows[others, -1])
        copies &= ~others
    else:
        copies = later_copies(rows[:, :-1])
    if _distance(exchange.filters[number]):
        blocks, firsts = exchange.blocks(number), rows[~copies]
        for band in range(blocks.bands):
            parts = _cut(firsts, blocks.band_keys(firsts[:, 0], band), exchange.buckets)
            _write_parts(exchange.dataset, exchange.path("spread", number, band, bucket), parts)
    _write_places(exchange, path, rows[copies, -1])


def search(exchange: Exchange, task: int) -> None:
    """Find the hashes of one band's bucket that are near an earlier one."""
    number, band, bucket = exchange.searches[task]
    path = exchange.path("near", task)
    if exchange.dataset.exists(path):
        return
    sources = [(exchange.path("spread", number, band, source), bucket) for source in range(exchange.buckets)]
    rows = _gathered(exchange, sources).reshape(-1, 2)
    rows = rows[np.argsort(rows[:, 1])]
    near = search_band(np.ascontiguousarray(rows[:, 0]), exchange.blocks(number), band)
    _write_places(exchange, path, rows[near, 1])


def gather(exchange: Exchange, group: int) -> None:
    """Bring together what was found of a group of tasks; a row counts for the first filter that found it."""
    path = exchange.path("dropped", group)
    if exchange.dataset.exists(path):
        return
    dropped: list[np.ndarray] = []  # by the place of its cause in ``_causes``
    for number, block in enumerate(exchange.filters):
        found = [exchange.path("copies", number, bucket) for bucket in range(exchange.buckets)]
        found += [
            exchange.path("near", task) for task, one in enumerate(exchange.searches) if one[0] == number
        ]
        others = [exchange.path("others", number, bucket) for bucket in range(exchange.buckets)]
        for sources in (found, others if isinstance(block, DuplicatesFilter) else []):
            dropped.append(np.unique(_gathered(exchange, [(source, group) for source in sources])))
    places = np.concatenate(dropped)
    causes = np.repeat(np.arange(len(dropped), dtype=np.uint64), [len(rows) for rows in dropped])
    places, first = np.unique(places, return_index=True)
    rows = np.column_stack([places, causes[first]])
    start = group * exchange.group
    _write_parts(exchange.dataset, path, _cut(rows, (places >> _ROW_BITS) - np.uint64(start), exchange.group))


def dropped_rows(exchange: Exchange, task: int) -> dict[int, str]:
    """After all steps: the rows of a task's staged index that are dropped, and their cause."""
    group, part = divmod(task, exchange.group)
    rows = _read_part(exchange.dataset, exchange.path("dropped", group), part).reshape(-1, 2)
    causes = _causes(exchange)
    mask = (np.uint64(1) << _ROW_BITS) - np.uint64(1)
    return {int(place & mask): causes[int(number)] for place, number in rows}


def _causes(exchange: Exchange) -> list[str]:
    """Two of each filter: of what it finds, and of what it finds with other captions."""
    return [cause for block in exchange.filters for cause in (corpus_cause(block), OTHER_CAPTION)]


def _in_parallel(read: Callable, items: Iterable) -> Iterator:
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(read, items)


def _gathered(exchange: Exchange, sources: Sequence[tuple[str, int]]) -> np.ndarray:
    """The words of all parts (path, part) in order, uint64 [N]."""
    parts = _in_parallel(lambda source: _read_part(exchange.dataset, *source), sources)
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _cut(rows: np.ndarray, keys: np.ndarray, parts: int) -> list[np.ndarray]:
    """The rows by ``keys`` modulo ``parts``; their order stays."""
    part = (keys % np.uint64(parts)).astype(np.int64)
    order = np.argsort(part, kind="stable")
    return np.split(rows[order], np.cumsum(np.bincount(part, minlength=parts))[:-1])


def _write_places(exchange: Exchange, path: str, places: np.ndarray) -> None:
    """Places, cut by the group of their task."""
    groups = (places >> _ROW_BITS) // np.uint64(exchange.group)
    _write_parts(exchange.dataset, path, _cut(places, groups, exchange.groups))


# A file of parts: uint64 little-endian words, first the words of the file at which each part starts and the last one
# ends, then the parts.


def _write_parts(storage: Storage, path: str, parts: Sequence[np.ndarray]) -> None:
    ends = len(parts) + 1 + np.cumsum([0, *(part.size for part in parts)])
    words = np.concatenate([ends.astype("<u8"), *(part.ravel() for part in parts)])
    storage.write_bytes(path, words.astype("<u8", copy=False).tobytes())


def _read_part(storage: Storage, path: str, part: int) -> np.ndarray:
    start, end = np.frombuffer(storage.read_bytes(path, 8 * part, 16), "<u8").tolist()
    if start == end:
        return np.empty(0, np.uint64)
    data = storage.read_bytes(path, 8 * start, 8 * (end - start))
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)
