"""The promises of sharding/cache.py."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sharding.cache import ShardCache
from sharding.errors import BadData
from sharding.storage import Storage, open_storage

SIZE = 1000


@pytest.fixture
def storage(tmp_path):
    """A folder that stands for remote storage, with 8 shards of 1,000 bytes."""
    storage = open_storage(tmp_path / "remote")
    for number in range(8):
        storage.write_bytes(f"{number}.tar", content(number))
    return storage


def content(number):
    return bytes([number]) * SIZE


def fetch(cache, storage, number, expected=None):
    """The bytes of a shard by way of the cache."""
    sha256 = expected or hashlib.sha256(content(number)).hexdigest()
    descriptor = cache.open(storage, f"{number}.tar", size=SIZE, sha256=sha256)
    if descriptor is None:
        return None
    try:
        return os.pread(descriptor, 10 * SIZE, 0)
    finally:
        os.close(descriptor)


def cached(cache):
    """Numbers of the shards in the cache."""
    return sorted(path.read_bytes()[0] for path in cache.folder.glob("*.tar"))


def test_a_shard_is_fetched_once(storage, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    assert fetch(cache, storage, 1) == content(1)
    monkeypatch.setattr(Storage, "download", None)
    assert fetch(cache, storage, 1) == content(1)
    assert fetch(ShardCache(tmp_path / "cache", 5 * SIZE), storage, 1) == content(1)


def test_shards_of_one_name_in_two_datasets_do_not_mix(storage, tmp_path):
    other = open_storage(tmp_path / "other")
    other.write_bytes("1.tar", content(9))
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    assert fetch(cache, storage, 1) == content(1)
    assert fetch(cache, other, 1, hashlib.sha256(content(9)).hexdigest()) == content(9)


def test_a_shard_that_fails_its_check_is_not_kept(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    with pytest.raises(BadData, match="sha256-mismatch"):
        fetch(cache, storage, 1, "0" * 64)
    with pytest.raises(FileNotFoundError, match=r"77\.tar"):
        fetch(cache, storage, 77, "1" * 64)
    assert cached(cache) == []
    assert os.listdir(cache.folder / "incoming") == []
    assert fetch(cache, storage, 1) == content(1)


def test_the_least_recently_used_go_first_and_the_limit_holds(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2):
        fetch(cache, storage, number)
        time.sleep(0.02)
    fetch(cache, storage, 0)
    fetch(cache, storage, 3)
    assert cached(cache) == [0, 2, 3]
    fetch(cache, storage, 4)
    assert cached(cache) == [0, 3, 4]


def test_a_shard_larger_than_the_cache_is_left_to_range_reads(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", SIZE - 1)
    assert fetch(cache, storage, 1) is None
    with pytest.raises(ValueError, match="positive"):
        ShardCache(tmp_path, 0)


def test_an_evicted_shard_stays_readable_for_who_has_it_open(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", SIZE)
    sha256 = hashlib.sha256(content(1)).hexdigest()
    descriptor = cache.open(storage, "1.tar", size=SIZE, sha256=sha256)
    fetch(cache, storage, 2)
    assert cached(cache) == [2]
    assert os.pread(descriptor, SIZE, 0) == content(1)
    os.close(descriptor)


def test_a_copy_cut_short_is_fetched_anew(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    fetch(cache, storage, 1)
    [copy] = cache.folder.glob("*.tar")
    os.truncate(copy, 10)
    assert fetch(cache, storage, 1) == content(1)


def hammer(cache, storage, seed, results):
    order = [(seed * 3 + 5 * i) % 8 for i in range(60)]
    results.put(all(fetch(cache, storage, number) == content(number) for number in order))


def test_many_processes_and_threads_share_a_cache_that_is_too_small(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=hammer, args=(cache, storage, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(4) as pool:
        assert all(
            pool.map(lambda number: fetch(cache, storage, number % 8) == content(number % 8), range(100))
        )
    assert all(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(cached(cache)) <= 3


def test_a_reader_killed_during_its_download_blocks_nobody_and_leaves_nothing(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    program = (
        "import os, sys, hashlib; from pathlib import Path\n"
        "from sharding.cache import ShardCache; from sharding.storage import Storage, open_storage\n"
        "def die(self, path, target, **checks):\n"
        "    target.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "Storage.download = die\n"
        "ShardCache(Path(sys.argv[1]), 3000).open(open_storage('x'), '1.tar', size=1000, sha256=sys.argv[2])"
    )
    run = [sys.executable, "-c", program, str(cache.folder), hashlib.sha256(content(1)).hexdigest()]
    assert subprocess.run(run, timeout=60, check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(cache.folder / "incoming")) == 1
    assert fetch(cache, storage, 1) == content(1)
    assert os.listdir(cache.folder / "incoming") == []
    for number in range(8):
        fetch(cache, storage, number)
    assert len(cached(cache)) == 3


def test_a_download_under_way_counts_against_the_limit(storage, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2):
        fetch(cache, storage, number)
    download = Storage.download
    counts = []

    def slow(self, path, destination, **checks):
        counts.append(len(cached(cache)))
        if len(counts) == 1:
            fetch(cache, storage, 4)  # a second one, while the first is under way
        download(self, path, destination, **checks)

    monkeypatch.setattr(Storage, "download", slow)
    assert fetch(cache, storage, 3) == content(3)
    assert counts == [2, 1]
    assert len(cached(cache)) == 3
