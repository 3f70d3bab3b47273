"""The promises of sharding/prefetch.py."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cluster.workers import is_noise
from sharding.cache import ShardCache
from sharding.prefetch import Prefetcher
from sharding.reader import ShardReader
from sharding.storage import open_storage
from tests.sharding.datasets import media_of, write_dataset

SHARDS = 12


@pytest.fixture
def dataset(tmp_path):
    """A folder that stands for remote storage, with 12 shards of 2 samples; and their manifest."""
    storage = open_storage(tmp_path / "remote")
    return storage, write_dataset(storage, (2,) * SHARDS)


def size(manifest, *shards):
    return sum(manifest.shards[shard].bytes + manifest.shards[shard].index_bytes for shard in shards)


def leased(cache, manifest):
    """Numbers of the shards that are in the cache whole, tar and index."""
    names = {path.name for path in cache.folder.glob("verified-*/*")}
    return {
        number for number, shard in enumerate(manifest.shards) if {shard.sha256, shard.index_sha256} <= names
    }


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(cache, dataset, plan, **changes):
    storage, manifest = dataset
    options = {"byte_limit": cache.byte_limit, "behind": 0, **changes}
    return Prefetcher(cache, {"a": (storage, manifest)}, (frozenset(needs) for needs in plan), **options)


def test_the_shards_of_the_plan_are_fetched_in_its_order_up_to_the_limit(dataset, tmp_path):
    _, manifest = dataset
    order = [7, 3, 11, 0, 5, 2, 9]
    cache = ShardCache(tmp_path / "cache", size(manifest, 7, 3, 11))
    prefetcher = start(cache, dataset, [{("a", shard)} for shard in order for _ in range(3)])
    try:
        until(lambda: leased(cache, manifest) == {7, 3, 11})
        for _ in range(3):  # the batches of shard 7 are handed out: it may be in use
            prefetcher.advance()
        time.sleep(0.2)
        assert leased(cache, manifest) == {7, 3, 11}
        prefetcher.advance()
        until(lambda: leased(cache, manifest) == {3, 11, 0})
        for _ in range(9):
            prefetcher.advance()
        until(lambda: leased(cache, manifest) == {5, 2, 9})
    finally:
        prefetcher.close()


def test_a_shard_stays_until_the_batches_under_way_are_past_it(dataset, tmp_path):
    _, manifest = dataset
    cache = ShardCache(tmp_path / "cache", size(manifest, 0, 1))
    prefetcher = start(cache, dataset, [{("a", shard)} for shard in range(SHARDS)], behind=2)
    try:
        until(lambda: leased(cache, manifest) == {0, 1})
        for _ in range(3):  # of three batches handed out two may still be read
            prefetcher.advance()
        time.sleep(0.3)
        assert leased(cache, manifest) == {0, 1}
        prefetcher.advance()
        until(lambda: leased(cache, manifest) == {1, 2})
    finally:
        prefetcher.close()


def test_readers_take_from_the_cache_what_is_there_and_the_rest_by_range(dataset, tmp_path, monkeypatch):
    storage, manifest = dataset
    monkeypatch.setattr(
        "sharding.storage_file.FileBackend.local_path", lambda self, path: None
    )  # as if remote
    cache = ShardCache(tmp_path / "cache", 10**9)
    reader = ShardReader(storage, manifest, cache, fetches=False)
    assert reader.read(0, 1).media == media_of(0, 1)
    assert leased(cache, manifest) == set()  # a reader does not fetch
    prefetcher = start(cache, dataset, [{("a", 0), ("a", 1)}])
    try:
        until(lambda: leased(cache, manifest) == {0, 1})
    finally:
        prefetcher.close()
    for name in ("000000", "000001"):
        storage.delete(f"{name}.tar")
        storage.delete(f"{name}.parquet")
    fresh = ShardReader(storage, manifest, cache, fetches=False)
    places = [(1, 1), (2, 0), (0, 0), (0, 1), (2, 1)]
    got = dict(fresh.read_many(places))
    assert [got[i].media for i in range(5)] == [media_of(*place) for place in places]


def test_a_shard_that_is_damaged_or_missing_stops_nothing(dataset, tmp_path):
    storage, manifest = dataset
    storage.write_bytes("000001.tar", bytes(manifest.shards[1].bytes))
    storage.delete("000002.tar")
    storage.delete("000003.parquet")
    cache = ShardCache(tmp_path / "cache", 10**9)
    prefetcher = start(cache, dataset, [{("a", shard)} for shard in range(6)])
    try:
        until(lambda: leased(cache, manifest) == {0, 4, 5})
        prefetcher.advance()
    finally:
        prefetcher.close()


def test_the_process_ends_when_it_is_closed(dataset, tmp_path):
    prefetcher = start(ShardCache(tmp_path / "a", 10**9), dataset, [{("a", 0)}])
    child = psutil.Process(prefetcher._process.pid)
    prefetcher.close()
    assert not child.is_running()


def test_the_process_ends_with_a_training_that_is_killed(dataset, tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from sharding.cache import ShardCache\n"
        "from sharding.manifest import load_manifest; from sharding.prefetch import Prefetcher\n"
        "from sharding.storage import open_storage\n"
        "if __name__ == '__main__':\n"
        "    storage, cache = open_storage(sys.argv[1]), ShardCache(Path(sys.argv[2]), 10**9)\n"
        "    datasets = {'a': (storage, load_manifest(storage))}\n"
        "    plan = iter([frozenset({('a', 0)})])\n"
        "    prefetcher = Prefetcher(cache, datasets, plan, byte_limit=10**9, behind=0)\n"
        "    print(prefetcher._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)"
    )
    run = [sys.executable, "-c", program, str(tmp_path / "remote"), str(tmp_path / "cache")]
    child = int(subprocess.run(run, timeout=60, check=False, stdout=subprocess.PIPE).stdout)
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def test_a_prefetcher_that_was_killed_counts_as_a_death_that_the_workers_are_started_again_after(
    dataset, tmp_path
):
    prefetcher = start(ShardCache(tmp_path / "a", 10**9), dataset, [{("a", 0)}] * 5)
    os.kill(prefetcher._process.pid, signal.SIGKILL)
    prefetcher._process.join()
    with pytest.raises(RuntimeError, match=r"prefetching process was killed \(exit code -9\)") as caught:
        prefetcher.advance()
    assert is_noise(caught.value)
    prefetcher.close()


def test_a_prefetcher_that_failed_by_itself_is_a_bug(dataset, tmp_path):
    prefetcher = start(ShardCache(tmp_path / "a", 10**9), dataset, [{("no such dataset", 0)}] * 5)
    with pytest.raises(RuntimeError, match=r"prefetching process failed \(exit code 1\)") as caught:
        until(lambda: prefetcher.advance() is not None)
    assert not is_noise(caught.value)
    prefetcher.close()
