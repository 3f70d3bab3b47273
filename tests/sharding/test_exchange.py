"""Promises of the exchange: what a look at the whole corpus at once would drop, in bounded tasks, after any kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from sharding.exchange import Exchange, dropped_rows, steps
from sharding.filters.config import FilterConfig
from sharding.index import IndexRow, write_index
from sharding.storage import Storage, open_storage

TASKS = 13
FILTERS = [
    {"kind": "duplicates"},
    {"kind": "near_duplicates", "distance": 3},
    {"kind": "duplicates", "by": "pixels"},
]


def index_path(task: int) -> str:
    return f"staged/{task:06d}.parquet"


def _row(task: int, row: int, sha256: int, phash: int, pixels: int, part: int | None) -> IndexRow:
    key = f"{task:06d}-{row:06d}" + ("" if part is None else f"-{part:04d}")
    return IndexRow(
        key, "jpg", 0, 1, 0, 1, 0, 1, 0, 0, 0, 8, 8, 1, 0.0, 1, 1, f"{sha256:032x}" + "0" * 32, "x",
        phash=phash, pixels=f"{pixels:032x}",
    )  # fmt: skip


def _corpus(seed: int = 0) -> list[list[IndexRow]]:
    """Tasks of uneven sizes, one of them empty, with copies, near ones and blank ones in and across tasks."""
    draw, captions = random.Random(seed), random.Random(seed + 1)
    tasks: list[list[IndexRow]] = []
    hashes = [0]
    for task in range(TASKS):
        rows: list[IndexRow] = []
        for row in range(0 if task == 4 else draw.randrange(5, 40)):
            phash = draw.choice(hashes) if draw.random() < 0.5 else draw.getrandbits(64)
            for _ in range(draw.randrange(4)):
                phash ^= 1 << draw.randrange(64)
            hashes.append(phash)
            part = draw.choice([None, 0, 1])
            made = _row(task, row, draw.randrange(150), phash, draw.getrandbits(8), part)
            rows.append(replace(made, text_xxh3=captions.getrandbits(1), captions=captions.choice([1, 2])))
        tasks.append(rows)
    return tasks


def _stage(storage: Storage, tasks: list[list[IndexRow]]) -> int:
    for number, rows in enumerate(tasks):
        if rows:
            storage.write_bytes(index_path(number), write_index(rows))
    return sum(map(len, tasks))


def _exchange(storage: Storage, samples: int, filters=FILTERS, rows: int = 10**6) -> Exchange:
    blocks = TypeAdapter(list[FilterConfig]).validate_python(filters)
    return Exchange(storage, "work/exchange", tuple(blocks), TASKS, samples, index_path, rows)


def _run(exchange: Exchange, order=lambda numbers: numbers) -> list[dict[int, str]]:
    for step, count in steps(exchange):
        for number in order(list(range(count))):
            step(exchange, number)
    return [dropped_rows(exchange, task) for task in range(exchange.tasks)]


def _expected(tasks: list[list[IndexRow]], filters=FILTERS) -> list[dict[int, str]]:
    """By a plain look at every pair."""
    seen: list[IndexRow] = []
    found: list[dict[int, str]] = []
    for rows in tasks:
        dropped: dict[int, str] = {}
        for number, row in enumerate(rows):
            for block in filters:
                cause = _cause(row, seen, block)
                if cause is not None:
                    dropped.setdefault(number, cause)
            seen.append(row)
        found.append(dropped)
    return found


def _cause(row: IndexRow, earlier: list[IndexRow], block: dict) -> str | None:
    if block["kind"] == "near_duplicates":
        near = any((row.phash ^ one.phash).bit_count() <= block["distance"] for one in earlier)
        return "near-duplicate" if near else None
    if block.get("by") == "pixels":
        equal = [one for one in earlier if row.pixels == one.pixels]
    else:
        equal = [one for one in earlier if (row.sha256, row.key[14:]) == (one.sha256, one.key[14:])]
    if not equal:
        return None
    if all((row.text_xxh3, row.captions) != (one.text_xxh3, one.captions) for one in equal):
        return "duplicate-other-caption"
    return "duplicate-pixels" if block.get("by") == "pixels" else "duplicate"


@pytest.mark.parametrize("filters", [FILTERS, FILTERS[::-1], FILTERS[1:2], [FILTERS[0]]])
def test_the_exchange_drops_what_a_look_at_every_pair_drops(tmp_path, filters):
    tasks = _corpus()
    expected = _expected(tasks, filters)
    causes = {cause for dropped in expected for cause in dropped.values()}
    exact = any(block["kind"] == "duplicates" for block in filters)
    assert len(causes) == len(filters) + exact
    assert ("duplicate-other-caption" in causes) is exact
    assert _run(_exchange(open_storage(tmp_path), _stage(open_storage(tmp_path), tasks), filters)) == expected


@pytest.mark.parametrize("rows", [20, 60, 10**6])
def test_neither_the_cut_into_tasks_nor_their_order_matters(tmp_path, rows):
    tasks = _corpus(seed=rows)
    storage = open_storage(tmp_path)
    exchange = _exchange(storage, _stage(storage, tasks), rows=rows)
    if rows == 20:
        assert exchange.groups > 3
        assert exchange.buckets > 3
    shuffled = random.Random(rows)
    assert _run(exchange, lambda numbers: shuffled.sample(numbers, len(numbers))) == _expected(tasks)


def test_each_staged_index_is_read_once_and_a_second_run_reads_none(tmp_path, monkeypatch):
    tasks = _corpus()
    storage = open_storage(tmp_path)
    exchange = _exchange(storage, _stage(storage, tasks), rows=40)
    reads: list[str] = []
    written: list[str] = []
    real_read, real_write = Storage.read_bytes, Storage.write_bytes
    monkeypatch.setattr(Storage, "read_bytes", lambda s, p, *a: (reads.append(p), real_read(s, p, *a))[1])
    monkeypatch.setattr(Storage, "write_bytes", lambda s, p, d: (written.append(p), real_write(s, p, d))[1])
    first = _run(exchange)
    indexes = [path for path in reads if path.startswith("staged/")]
    assert sorted(indexes) == [index_path(task) for task in range(TASKS)]
    reads.clear()
    written.clear()
    assert _run(exchange) == first
    assert not [path for path in reads if "/dropped/" not in path]
    assert not written


def test_a_write_that_fails_anywhere_leaves_nothing_that_a_later_run_takes_for_whole(tmp_path, monkeypatch):
    tasks = _corpus()
    expected = _expected(tasks)
    real = Storage.write_bytes
    failed = 0
    for moment in range(0, 60, 7):
        storage = open_storage(tmp_path / f"{moment}")
        exchange = _exchange(storage, _stage(storage, tasks), rows=60)
        left = moment

        def write(self, path, data):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            real(self, path, data)

        monkeypatch.setattr(Storage, "write_bytes", write)
        try:
            _run(exchange)
        except OSError:
            failed += 1
        monkeypatch.setattr(Storage, "write_bytes", real)
        assert _run(exchange) == expected
    assert failed >= 5


WORKER = """
    import sys
    from sharding.storage import open_storage
    from tests.sharding.test_exchange import _exchange, _run
    _run(_exchange(open_storage(sys.argv[1]), int(sys.argv[2]), rows=20))
"""


def test_a_process_killed_at_any_moment_is_gone_on_from(tmp_path):
    tasks = _corpus()
    storage = open_storage(tmp_path)
    samples = _stage(storage, tasks)
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path), str(samples)]
    done: list[int] = []
    for target in (3, 20, 45):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("work/exchange/**/0*"))) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done.append(len(list(storage.list("work"))))
    exchange = _exchange(storage, samples, rows=20)
    assert done[0] < sum(count for _, count in steps(exchange))
    assert _run(exchange) == _expected(tasks)
