"""The promises of sharding/reader.py."""

import hashlib
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from xxhash import xxh3_64_intdigest

from sharding.cache import ShardCache
from sharding.errors import BadData
from sharding.index import IndexRow, read_index, write_index
from sharding.manifest import load_manifest
from sharding.reader import ShardReader
from sharding.storage import Storage, open_storage
from tests.sharding.datasets import CAPTIONS, media_of, write_dataset


@pytest.fixture(params=["range", "cache"])
def reader(request, storage, tmp_path):
    """A reader of two shards (5 and 3 samples), on each kind of storage, with and without a cache."""
    write_dataset(storage)
    cache = ShardCache(tmp_path / "cache", 10**9) if request.param == "cache" else None
    return ShardReader(storage, load_manifest(storage), cache)


@pytest.fixture
def folder(tmp_path):
    """A dataset in a folder, and its manifest."""
    storage = open_storage(tmp_path / "dataset")
    return storage, write_dataset(storage)


def change(storage, path, offset, data=b"\xff\x00\xff"):
    old = storage.read_bytes(path)
    storage.write_bytes(path, old[:offset] + data + old[offset + len(data) :])


def cause_of(reader, shard, row):
    with pytest.raises(BadData) as caught:
        reader.read(shard, row)
    assert "\n" not in caught.value.detail
    return caught.value.cause, caught.value.detail


def media_offset(storage, manifest, shard, row):
    return read_index(storage.read_bytes(manifest.shards[shard].index))["media_offset"][row].as_py()


def test_every_sample_is_read_as_it_was_written(reader):
    assert len(reader) == 8
    assert reader.shard_samples == [5, 3]
    for shard, row in [(s, r) for s, n in enumerate(reader.shard_samples) for r in range(n)] * 2:
        sample = reader.read(shard, row)
        assert sample.key == f"{shard:03d}-{row:05d}"
        assert sample.media == media_of(shard, row)
        assert sample.extension == ("jpg", "webp", "png", "mp4")[row % 4]
        assert sample.captions == CAPTIONS[: 1 + row % 2]
        assert (sample.width, sample.height, sample.frames, sample.duration) == (64, 48, 1 + row, 0.5 * row)


def test_a_row_that_is_not_there_is_a_bug_of_the_caller(reader):
    for shard, row in ((0, 5), (1, 3), (0, -1), (2, 0), (-1, 0)):
        with pytest.raises(IndexError):
            reader.read(shard, row)


def test_threads_may_share_a_reader(reader):
    places = [(s, r) for s, n in enumerate(reader.shard_samples) for r in range(n)] * 20
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(lambda place: reader.read(*place), places))
    assert [sample.media for sample in samples] == [media_of(*place) for place in places]


def test_a_batch_gives_each_place_once_and_what_read_gives(reader):
    reader.dataset.delete("000001.tar")
    places = [(0, 4), (0, 0), (1, 2), (0, 2), (0, 0), (1, 0), (0, 1)]
    got = list(reader.read_many(places))
    assert sorted(number for number, _ in got) == list(range(len(places)))
    for number, sample in got:
        shard, row = places[number]
        if shard == 1:
            assert sample.cause == "missing-shard"
        else:
            assert sample == reader.read(shard, row)
    with pytest.raises(IndexError):
        list(reader.read_many([(0, 0), (0, 5)]))


@pytest.mark.server
def test_neighbours_of_a_batch_are_one_request_and_a_damaged_one_costs_itself_only(s3_server, monkeypatch):
    storage = s3_server.storage("data")
    manifest = write_dataset(storage, (30,))
    change(storage, "000000.tar", media_offset(storage, manifest, 0, 7) + 5)
    reader = ShardReader(storage, manifest)
    reader.read(0, 0)
    monkeypatch.setattr("sharding.reader._MOST_MERGED", 40_000)
    read_bytes, requests = Storage.read_bytes, []

    def counted(self, path, offset=0, length=None):
        requests.append((offset, length))
        return read_bytes(self, path, offset, length)

    monkeypatch.setattr(Storage, "read_bytes", counted)
    got = dict(reader.read_many([(0, row) for row in reversed(range(20))]))
    assert [got[19 - row].media for row in range(20) if row != 7] == [
        media_of(0, row) for row in range(20) if row != 7
    ]
    assert got[12].cause == "checksum-mismatch"
    assert len(requests) < 10
    assert all(length <= 40_000 for _, length in requests)


@pytest.mark.server
def test_leases_of_a_batch_end_with_it(s3_server, tmp_path):
    storage = s3_server.storage("data")
    manifest = write_dataset(storage, (5, 3, 4))
    cache = ShardCache(tmp_path / "cache", manifest.shards[0].bytes)
    reader = ShardReader(storage, manifest, cache)
    for shard, rows in enumerate((5, 3, 4)):
        batch = dict(reader.read_many([(shard, row) for row in range(rows)]))
        assert [batch[row].media for row in range(rows)] == [media_of(shard, row) for row in range(rows)]
        [held] = cache.folder.glob("verified-*/*")  # there was room
        assert held.name == manifest.shards[shard].sha256


def read_in_worker(reader, queue):
    queue.put([reader.read(1, row).media for row in range(3)])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loader_processes_read_with_a_reader_that_was_used_before(reader, method):
    reader.read(0, 0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=read_in_worker, args=(reader, queue))
    process.start()
    assert queue.get(timeout=60) == [media_of(1, row) for row in range(3)]
    process.join(60)
    assert process.exitcode == 0


def test_a_flipped_byte_costs_one_sample_and_is_named(reader):
    storage, manifest = reader.dataset, reader.manifest
    change(storage, "000000.tar", media_offset(storage, manifest, 0, 2) + 100)
    cause, detail = cause_of(reader, 0, 2)
    assert cause == "checksum-mismatch"
    assert storage.url_of("000000.tar") in detail
    assert "key 000-00002" in detail
    assert reader.read(0, 1).media == media_of(0, 1)
    assert reader.read(0, 3).media == media_of(0, 3)


def test_a_truncated_shard_costs_the_samples_that_were_cut_off(reader):
    storage, manifest = reader.dataset, reader.manifest
    whole = storage.read_bytes("000000.tar")
    storage.write_bytes("000000.tar", whole[: media_offset(storage, manifest, 0, 3) + 10])
    for row in (3, 4):
        cause, detail = cause_of(reader, 0, row)
        assert cause == "truncated-shard"
        assert storage.url_of("000000.tar") in detail
        assert f"key 000-0000{row}" in detail
    assert reader.read(0, 2).media == media_of(0, 2)
    assert reader.read(1, 2).media == media_of(1, 2)


def test_a_missing_shard_costs_its_own_samples_only(reader):
    reader.dataset.delete("000000.tar")
    cause, detail = cause_of(reader, 0, 2)
    assert cause == "missing-shard"
    assert reader.dataset.url_of("000000.tar") in detail
    assert reader.read(1, 0).media == media_of(1, 0)


def test_an_index_that_is_not_the_manifests_is_not_used(folder):
    storage, manifest = folder
    other = read_index(storage.read_bytes("000000.parquet")).slice(0, 4)
    storage.write_bytes("000000.parquet", write_index(other))
    cause, detail = cause_of(ShardReader(storage, manifest), 0, 0)
    assert cause == "index-mismatch"
    assert storage.url_of("000000.parquet") in detail
    assert "changed or damaged" in detail
    assert ShardReader(storage, manifest).read(1, 0).media == media_of(1, 0)


def test_an_index_with_another_number_of_rows_or_no_index_at_all_is_said(folder):
    storage, manifest = folder
    for data, message in (
        (write_index(read_index(storage.read_bytes("000000.parquet")).slice(0, 4)), "has 4 rows"),
        (b"no parquet", "not Parquet"),
    ):
        storage.write_bytes("000000.parquet", data)
        record = manifest.shards[0].model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
        changed = manifest.model_copy(update={"shards": [record, *manifest.shards[1:]]})
        cause, detail = cause_of(ShardReader(storage, changed), 0, 0)
        assert cause == "index-mismatch"
        assert message in detail
    storage.delete("000000.parquet")
    assert cause_of(ShardReader(storage, manifest), 0, 0)[0] == "missing-index"


def test_a_shard_found_bad_is_not_asked_for_again_at_each_sample(folder, monkeypatch):
    storage, manifest = folder
    storage.write_bytes("000000.parquet", b"damaged")
    reader = ShardReader(storage, manifest)
    assert cause_of(reader, 0, 0)[0] == "index-mismatch"
    storage.delete("000000.parquet")
    assert cause_of(reader, 0, 1)[0] == "index-mismatch"  # from memory
    monkeypatch.setattr("sharding.reader.time.monotonic", lambda: 1e12)
    assert cause_of(reader, 0, 1)[0] == "missing-index"


@pytest.mark.parametrize(
    "text", [b"{", b'{"captions":[]}', b'{"captions":[1]}', b'{"captions":"no"}', b"[]", b"\xff"]
)
def test_captions_that_are_none_are_said(folder, text):
    storage, manifest = folder
    rows = read_index(storage.read_bytes("000000.parquet")).to_pylist()
    data = text.ljust(rows[0]["json_size"])
    change(storage, "000000.tar", rows[0]["json_offset"], data)
    cause, detail = cause_of(ShardReader(storage, manifest), 0, 0)
    assert cause == "checksum-mismatch"
    # Now as if it had been written so.
    rows[0]["json_xxh3"] = xxh3_64_intdigest(data)
    index = write_index([IndexRow(**row) for row in rows])
    storage.write_bytes("000000.parquet", index)
    record = manifest.shards[0].model_copy(update={"index_sha256": hashlib.sha256(index).hexdigest()})
    changed = manifest.model_copy(update={"shards": [record, *manifest.shards[1:]]})
    cause, detail = cause_of(ShardReader(storage, changed), 0, 0)
    assert cause == "bad-json"
    assert "key 000-00000" in detail


def test_a_sample_dropped_by_the_overlay_keeps_its_row_but_is_not_shown(folder):
    storage, manifest = folder
    reader = ShardReader(storage, manifest.model_copy(update={"dropped_keys": ["000-00001"]}))
    assert len(reader) == 8
    assert cause_of(reader, 0, 1)[0] == "dropped"
    assert pickle.loads(pickle.dumps(reader)).read(0, 2).media == media_of(0, 2)  # noqa: S301
    assert cause_of(pickle.loads(pickle.dumps(reader)), 0, 1)[0] == "dropped"  # noqa: S301


def test_memory_for_indices_and_open_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("sharding.reader._INDEX_BYTES", 3000)
    monkeypatch.setattr("sharding.reader._OPEN_SHARDS", 3)
    storage = open_storage(tmp_path / "dataset")
    manifest = write_dataset(storage, (2,) * 30, size=10)
    reader = ShardReader(storage, manifest)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for shard in range(30):
            assert reader.read(shard, 1).media == media_of(shard, 1, 10)
        assert sum(index.size for index in reader._indices.values()) <= 3000
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.server
def test_a_cached_copy_that_this_disk_damaged_is_fetched_anew(s3_server, tmp_path):
    storage = s3_server.storage("data")
    manifest = write_dataset(storage)
    reader = ShardReader(storage, manifest, ShardCache(tmp_path / "cache", 10**9))
    reader.read(0, 0)
    [copy] = (tmp_path / "cache").glob("verified-*/*")
    damaged = bytearray(copy.read_bytes())
    damaged[media_offset(storage, manifest, 0, 0) + 5] ^= 0xFF
    with copy.open("r+b") as file:
        file.write(damaged)
    assert reader.read(0, 0).media == media_of(0, 0)
    assert [path.read_bytes() for path in (tmp_path / "cache").glob("verified-*/*")] == [
        storage.read_bytes("000000.tar")
    ]


@pytest.mark.server
def test_a_cached_shard_is_read_without_the_storage(s3_server, tmp_path):
    storage = s3_server.storage("data")
    reader = ShardReader(storage, write_dataset(storage), ShardCache(tmp_path / "cache", 10**9))
    reader.read(0, 0)
    storage.delete("", recursive=True)
    assert [reader.read(0, row).media for row in range(5)] == [media_of(0, row) for row in range(5)]
    assert cause_of(reader, 1, 0)[0] == "missing-index"


@pytest.mark.server
def test_a_shard_damaged_in_the_storage_is_not_cached_and_its_whole_samples_are_read(
    s3_server, tmp_path, caplog
):
    storage = s3_server.storage("data")
    manifest = write_dataset(storage)
    change(storage, "000000.tar", media_offset(storage, manifest, 0, 2) + 100)
    reader = ShardReader(storage, manifest, ShardCache(tmp_path / "cache", 10**9))
    for row in (0, 1, 3, 4):
        assert reader.read(0, row).media == media_of(0, row)
    assert cause_of(reader, 0, 2)[0] == "checksum-mismatch"
    assert list((tmp_path / "cache").glob("verified-*/*")) == []
    assert caplog.text.count("shard not cached") == 1
