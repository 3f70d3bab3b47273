"""The promises of sharding/cache.py."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sharding.cache import ShardCache
from sharding.errors import BadData, UserError
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
    return sorted(path.read_bytes()[0] for path in cache.folder.glob("verified-*/*"))


def digest(number):
    return hashlib.sha256(content(number)).hexdigest()


def lease(cache, storage, number):
    return cache.open(storage, f"{number}.tar", size=SIZE, sha256=digest(number))


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


def test_what_is_leased_is_passed_over_by_eviction_and_the_limit_holds(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    descriptor = lease(cache, storage, 1)
    for number in (0, 2, 3, 4, 5):
        time.sleep(0.02)
        assert fetch(cache, storage, number) == content(number)
        assert 1 in cached(cache)
        assert len(cached(cache)) <= 3
    assert os.pread(descriptor, SIZE, 0) == content(1)
    os.close(descriptor)
    for number in (0, 2, 3):
        fetch(cache, storage, number)
    assert cached(cache) == [0, 2, 3]


def test_a_cache_whose_shards_are_all_leased_takes_no_more_and_evicts_nothing_in_vain(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    held = [lease(cache, storage, 1), lease(cache, storage, 2)]
    fetch(cache, storage, 3)
    small = open_storage(tmp_path / "other")
    small.write_bytes("big", bytes(2 * SIZE))
    big = hashlib.sha256(bytes(2 * SIZE)).hexdigest()
    assert cache.open(small, "big", size=2 * SIZE, sha256=big) is None
    assert cached(cache) == [1, 2, 3]
    held.append(lease(cache, storage, 3))
    assert lease(cache, storage, 4) is None
    assert cached(cache) == [1, 2, 3]
    assert os.listdir(cache.folder / "incoming") == []
    os.close(held.pop())
    held.append(lease(cache, storage, 4))
    assert cached(cache) == [1, 2, 4]
    for descriptor in held:
        os.close(descriptor)


def test_a_lease_ends_with_its_process(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", SIZE)
    program = (
        "import sys, time; from pathlib import Path; from sharding.cache import ShardCache\n"
        "from sharding.storage import open_storage\n"
        "ShardCache(Path(sys.argv[1]), 1000).open(\n"
        "    open_storage(sys.argv[2]), '1.tar', size=1000, sha256=sys.argv[3])\n"
        "print('leased', flush=True); time.sleep(600)"
    )
    arguments = [str(cache.folder), str(tmp_path / "remote"), digest(1)]
    holder = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"leased\n"
        assert fetch(cache, storage, 2) is None
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert fetch(cache, storage, 2) == content(2)
    assert cached(cache) == [2]


def test_two_shards_whose_digests_begin_alike_do_not_wait_for_each_other(storage, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    first = digest(1)
    alike = next(data for i in range(10**6) if hashlib.sha256(data := b"%d" % i).hexdigest()[:2] == first[:2])
    storage.write_bytes("alike", alike)
    download, met = Storage.download, threading.Barrier(2, timeout=20)

    def both_at_once(self, path, destination, **checks):
        met.wait()
        download(self, path, destination, **checks)

    monkeypatch.setattr(Storage, "download", both_at_once)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(fetch, cache, storage, 1)
        sha256 = hashlib.sha256(alike).hexdigest()
        other = pool.submit(cache.open, storage, "alike", size=len(alike), sha256=sha256)
        assert one.result(30) == content(1)
        os.close(other.result(30))


def test_of_many_that_want_a_shard_one_fetches_it(storage, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    download, count = Storage.download, []

    def counted(self, path, destination, **checks):
        count.append(path)
        time.sleep(0.1)
        download(self, path, destination, **checks)

    monkeypatch.setattr(Storage, "download", counted)
    with ThreadPoolExecutor(8) as pool:
        assert all(data == content(1) for data in pool.map(lambda _: fetch(cache, storage, 1), range(8)))
    assert count == ["1.tar"]


def test_what_lay_here_before_the_machine_was_started_is_hashed_again_before_its_first_use(
    storage, tmp_path, monkeypatch, caplog
):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    for number in (1, 2, 3):
        fetch(cache, storage, number)
    # A power cut: the size is right, the bytes never reached the disk.
    [copy] = cache.folder.glob(f"verified-*/{digest(2)}")
    copy.write_bytes(bytes(SIZE))
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr("sharding.cache._BOOT_ID", boot)
    assert cache.lease(digest(1), SIZE) is None  # not unseen
    downloads = []
    download = Storage.download
    monkeypatch.setattr(
        Storage,
        "download",
        lambda self, path, *rest, **checks: (downloads.append(path), download(self, path, *rest, **checks)),
    )
    assert fetch(cache, storage, 1) == content(1)
    assert downloads == []
    assert fetch(cache, storage, 2) == content(2)
    assert downloads == ["2.tar"]
    assert "damaged since the machine was last started" in caplog.text
    digested = []
    monkeypatch.setattr("sharding.cache.hashlib.file_digest", lambda *given: digested.append(given))
    assert fetch(cache, storage, 1) == content(1)  # once a boot
    assert digested == []


def test_files_of_an_earlier_boot_count_against_the_limit_and_are_evicted(storage, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2):
        fetch(cache, storage, number)
        time.sleep(0.02)
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr("sharding.cache._BOOT_ID", boot)
    fetch(cache, storage, 3)
    fetch(cache, storage, 4)
    assert cached(cache) == [2, 3, 4]
    fetch(cache, storage, 5)
    cache.check()
    assert len(list(cache.folder.glob("verified-*"))) == 1


def test_a_folder_that_cannot_serve_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/cache: cannot be written: Not a directory"):
        ShardCache(tmp_path / "file" / "cache", SIZE).check()
    monkeypatch.setattr("sharding.cache.os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        ShardCache(tmp_path / "cache", SIZE).check()
    monkeypatch.undo()
    too_much = shutil.disk_usage(tmp_path).total * 2
    with pytest.raises(UserError, match=r"may take \d+ MiB, but its disk has room for \d+ MiB only"):
        ShardCache(tmp_path / "cache", too_much).check()
    ShardCache(tmp_path / "cache", SIZE).check()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_smaller_limit_and_leftovers_are_tidied_up_at_the_start(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    for number in range(5):
        fetch(cache, storage, number)
        time.sleep(0.02)
    left = cache.folder / "incoming" / ("0" * 64)
    left.mkdir()
    (left / "lock").write_bytes(b"")
    (left / ".glscl-0.part").write_bytes(bytes(10))
    ShardCache(cache.folder, 2 * SIZE).check()
    assert cached(cache) == [3, 4]
    assert os.listdir(cache.folder / "incoming") == []


def test_a_copy_cut_short_is_fetched_anew(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    fetch(cache, storage, 1)
    [copy] = cache.folder.glob("verified-*/*")
    os.truncate(copy, 10)
    assert fetch(cache, storage, 1) == content(1)


def hammer(cache, storage, seed, results):
    order = [(seed * 3 + 5 * i) % 8 for i in range(60)]
    results.put([fetch(cache, storage, number) in (content(number), None) for number in order])


def test_many_processes_and_threads_share_a_cache_that_is_too_small(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=hammer, args=(cache, storage, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda number: fetch(cache, storage, number % 8), range(100)))
    # Seven at a time are more than its room: then None.
    assert all(data in (content(number % 8), None) for number, data in enumerate(got))
    assert got.count(None) < 90
    assert all(all(results.get(timeout=60)) for _ in processes)
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


def test_downloads_that_begin_as_others_end_do_not_meet(storage, tmp_path):
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)

    def fetch_and_forget(_):
        data = fetch(cache, storage, 1)
        cache.discard(digest(1))
        return data == content(1)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch_and_forget, range(400)))
