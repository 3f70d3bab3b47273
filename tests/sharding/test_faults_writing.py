"""Writing through a proxy that spoils requests, and onto full disks: whole and right, or an error and no trace."""

import contextlib
import errno
import hashlib
import os
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from sharding.cache import ShardCache
from sharding.errors import StorageFault
from sharding.media import Encoded, MediaInfo
from sharding.prepare import PrepareConfig, prepare
from sharding.reader import ShardReader
from sharding.storage import Storage, StorageConfig, open_storage
from sharding.writer import ShardWriter, publish
from tests.fixtures.faulty_s3 import Fault
from tests.sharding.datasets import media_of, write_dataset

FOR_EVER = 10**9
KINDS = ["busy", "slow-down", "internal", "page", "reset", "reset-upload", "flip-upload", "lost"]


@pytest.fixture
def behind(s3_server, faulty_s3):
    """An empty storage, and the same as seen through the proxy."""
    storage = s3_server.storage("data")
    patient = {"endpoint_url": faulty_s3.url, "attempts": 4, "read_timeout_s": 5, "connect_timeout_s": 2}
    return storage, Storage(s3_server.config(storage.url, **patient))


def write_shard(path, size=400):
    with ShardWriter(path) as writer:
        for row in range(3):
            media = Encoded(media_of(0, row, size), "jpg", MediaInfo(64, 48, 1, 0.0))
            writer.add(f"{row:05d}", media, ["a caption"], "0" * 64, f"source/{row}")
    return writer


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_published_whole_whatever_befalls_any_one_request(behind, faulty_s3, tmp_path, kind):
    true, storage = behind
    writer = write_shard(tmp_path / "shard.tar")
    faulty_s3.reset()
    undisturbed = publish(writer, storage, "000000")
    requests = len(faulty_s3.requests)
    assert requests >= 4
    for number in range(requests):
        true.delete("", recursive=True)
        faulty_s3.reset(fault := Fault(kind, at=900, after=number))
        assert publish(writer, storage, "000000") == undisturbed
        assert fault.met > number
        tar = true.read_bytes("000000.tar")
        assert hashlib.sha256(tar).hexdigest() == undisturbed.sha256
        index = true.read_bytes("000000.parquet")
        assert hashlib.sha256(index).hexdigest() == undisturbed.index_sha256


@pytest.mark.server
@pytest.mark.parametrize("kind", ["busy", "reset-upload", "flip-upload"])
def test_a_store_that_takes_nothing_is_a_storage_fault_and_has_nothing(behind, faulty_s3, tmp_path, kind):
    true, storage = behind
    writer = write_shard(tmp_path / "shard.tar")
    for path in (r"000000\.tar", r"000000\.parquet"):
        true.delete("", recursive=True)
        faulty_s3.reset(Fault(kind, "PUT", path, at=900, times=FOR_EVER))
        with pytest.raises(StorageFault, match=path):
            publish(writer, storage, "000000")
        assert not [file for file in true.list() if file.path == path.replace("\\", "")]


@pytest.mark.server
def test_a_shard_changed_in_the_store_is_not_published(behind, faulty_s3, tmp_path):
    _, storage = behind
    writer = write_shard(tmp_path / "shard.tar")
    faulty_s3.reset(Fault("short", "GET", r"000000\.parquet", at=50, times=FOR_EVER))
    with pytest.raises(StorageFault, match="000000"):
        publish(writer, storage, "000000")


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that goes up in three parts, of the least size that S3 allows."""
    monkeypatch.setattr("sharding.storage_s3._PART", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(11 << 20))
    return path


def open_uploads(s3_server, storage):
    bucket, _, prefix = storage.url.removeprefix("s3://").partition("/")
    uploads = s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return [upload for upload in uploads if upload["Key"].startswith(prefix)]


@pytest.mark.server
@pytest.mark.parametrize("kind", ["busy", "reset-upload", "flip-upload", "lost"])
def test_an_upload_in_parts_outlasts_a_fault_of_any_request(behind, faulty_s3, s3_server, large, kind):
    true, storage = behind
    sha256 = hashlib.sha256(large.read_bytes()).hexdigest()
    # Begin; the first and the last part; complete.
    for fault in (
        Fault(kind, "POST", "uploads"),
        Fault(kind, "PUT", "partNumber=1", at=10),
        Fault(kind, "PUT", "partNumber=3", at=10),
        Fault(kind, "POST", "uploadId", at=10),
    ):
        faulty_s3.reset(fault)
        assert storage.upload(large, "file").sha256 == sha256
        assert fault.met
        assert hashlib.sha256(true.read_bytes("file")).hexdigest() == sha256
        true.delete("file")


@pytest.mark.server
def test_an_upload_whose_part_or_end_fails_leaves_neither_file_nor_parts(behind, faulty_s3, s3_server, large):
    true, storage = behind
    for fault in (
        Fault("internal", "PUT", "partNumber=2", times=FOR_EVER),
        Fault("reset", "POST", "uploadId", times=FOR_EVER),
    ):
        faulty_s3.reset(fault)
        with pytest.raises(StorageFault, match="file"):
            storage.upload(large, "file")
        assert open_uploads(s3_server, true) == []
        assert list(true.list()) == []


@pytest.mark.server
def test_parts_are_given_up_although_the_store_is_busy_when_they_are(behind, faulty_s3, s3_server, large):
    true, storage = behind
    faulty_s3.reset(
        Fault("internal", "PUT", "partNumber=2", times=FOR_EVER), Fault("busy", "DELETE", "uploadId")
    )
    with pytest.raises(StorageFault):
        storage.upload(large, "file")
    assert open_uploads(s3_server, true) == []


@pytest.mark.server
@pytest.mark.slow
def test_a_dataset_prepared_through_faults_has_the_same_bytes(ray_session, behind, faulty_s3, folder_corpus):
    true, storage = behind
    source = {"kind": "folder", "path": str(folder_corpus)}
    config = PrepareConfig.model_validate({"modality": "image", "source": source, "samples_per_shard": 6})
    undisturbed = prepare("pairs", config, true, in_flight=2)
    written = files(true.at(undisturbed.path))
    for kind in ("lost", "reset-upload"):
        faulty_s3.reset(
            Fault(kind, "PUT", r"/commits/"),
            Fault(kind, "PUT", r"manifest\.json"),
            Fault(kind, "PUT", r"\.tar"),
            Fault(kind, "PUT", r"\.parquet", at=100),
        )
        prepared = prepare("pairs", config, storage.at(kind), in_flight=2)
        assert all(fault.met for fault in faulty_s3.faults)
        assert files(true.at(kind).at(prepared.path)) == written


def files(dataset):
    return {file.path: hashlib.sha256(dataset.read_bytes(file.path)).hexdigest() for file in dataset.list()}


@contextlib.contextmanager
def quota(folder, size):
    """Files of this process may not grow beyond ``size`` bytes: the kernel refuses the write, or a part of it."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of ``size`` bytes mounted on ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size // 4096 * 4096},mode=700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=[quota, small_disk])
def full_disk(request):
    return request.param


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_full_disk_is_said_with_the_path_and_leaves_nothing_half_written(tmp_path, full_disk):
    source = tmp_path / "source"
    source.write_bytes(bytes(200_000))
    with full_disk(tmp_path / "disk", 100_000) as folder:
        storage = Storage(StorageConfig(url=str(folder), attempts=1))  # else each write waits some seconds
        storage.write_bytes("before", b"kept")
        for write in (
            lambda: storage.write_bytes("new", bytes(200_000)),
            lambda: storage.write_bytes("before", bytes(200_000)),
            lambda: storage.upload(source, "new"),
            lambda: storage.create_exclusive("new", bytes(200_000)),
            lambda: open_storage(tmp_path).download("source", folder / "new"),
        ):
            with pytest.raises(OSError, match=r"cannot write .*disk/(new|before)") as caught:
                write()
            assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
            assert leftovers(folder) == [folder / "before"]
        assert storage.read_bytes("before") == b"kept"
        storage.write_bytes("new", bytes(50_000))  # the space is free again


@pytest.mark.parametrize("size", [400, 20_000])  # refused when the file is closed; when a sample is added
def test_a_shard_that_the_disk_cannot_take_is_not_closed_as_if_it_were_whole(tmp_path, full_disk, size):
    with full_disk(tmp_path / "disk", 8192) as folder:
        folder.mkdir(exist_ok=True)
        with pytest.raises(OSError, match=r"cannot write .*disk/shard\.tar") as caught:
            write_shard(folder / "shard.tar", size)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)


@pytest.mark.server
def test_a_cache_whose_disk_is_full_keeps_nothing_and_the_samples_are_read_by_range(
    s3_server, tmp_path, full_disk, caplog
):
    storage = s3_server.storage("data")
    manifest = write_dataset(storage, (5, 3), 40_000)
    with full_disk(tmp_path / "disk", 150_000) as folder:
        cache = ShardCache(folder / "cache", 10**9)
        reader = ShardReader(storage, manifest, cache)
        shard = manifest.shards[0]
        with pytest.raises(OSError, match=r"cannot write .*disk/cache/incoming"):
            cache.open(storage, shard.tar, size=shard.bytes, sha256=shard.sha256)
        assert leftovers(folder) == []
        places = [(shard, row) for shard, rows in enumerate((5, 3)) for row in range(rows)]
        samples = dict(reader.read_many(places))
        assert [samples[i].media for i in range(8)] == [media_of(*place, 40_000) for place in places]
        assert "read one by one" in caplog.text
        assert str(folder) in caplog.text
        # The second fits by itself (not while a part of the first lay there, as it may when both are fetched at
        # once): what the first had taken is free again.
        fits = manifest.shards[1]
        descriptor = cache.open(storage, fits.tar, size=fits.bytes, sha256=fits.sha256)
        assert descriptor is not None
        os.close(descriptor)
        assert {path.name for path in leftovers(folder)} == {fits.sha256}


@pytest.mark.server
def test_two_writers_of_one_record_through_faults_agree_who_was_first(behind, faulty_s3):
    """The lost answer of a commit: whoever asks again must neither lose its own nor take another's."""
    _, storage = behind
    for kind in ("lost", "reset-upload", "busy"):
        path = f"claim-{kind}"
        faulty_s3.reset(Fault(kind, "PUT", path, times=2))
        names = (b"one", b"two")
        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(storage.create_exclusive, (path, path), names))
        assert sorted(won) == [False, True]
        assert names[won.index(True)] == storage.read_bytes(path)
