"""A dataset read through a proxy that spoils requests: every sample once and right, or said which and why."""

import itertools
import re
import time

import pytest

from sharding.cache import ShardCache
from sharding.errors import BadData, StorageFault, UserError
from sharding.order import batch_slots, epoch_order, steps_per_epoch
from sharding.reader import ShardReader
from sharding.storage import Storage
from tests.fixtures.faulty_s3 import Fault
from tests.sharding.datasets import CAPTIONS, media_of, write_dataset

pytestmark = pytest.mark.server

SHARDS = (3, 2)
SIZE = 300
ALL = {(shard, row) for shard, rows in enumerate(SHARDS) for row in range(rows)}
FOR_EVER = 10**9
#: Outlasted: the retried request has the bytes.
TRANSIENT = ["busy", "slow-down", "internal", "page", "reset", "lost"]
AT = [0, 600, 1100, 1700, 2500]  # tar headers, JSON, text and media; ends of members


@pytest.fixture(scope="module")
def written(s3_server):
    """The dataset's folder and its manifest. Nothing here changes it."""
    storage = s3_server.storage("data")
    return storage, write_dataset(storage, SHARDS, SIZE)


@pytest.fixture
def source(written, s3_server, faulty_s3):
    """The dataset's folder as seen through the proxy, and its manifest."""
    storage, manifest = written
    patient = {"endpoint_url": faulty_s3.url, "attempts": 6, "read_timeout_s": 0.6, "connect_timeout_s": 2}
    return Storage(s3_server.config(storage.url, **patient)), manifest


@pytest.fixture(params=["range", "cache"])
def deliver(request, source, tmp_path):
    """A function that reads an epoch anew: (places of the samples that came right, cause by place of the others)."""
    numbers = itertools.count()

    def read_epoch():
        cache = ShardCache(tmp_path / f"cache-{next(numbers)}", 10**6) if request.param == "cache" else None
        return epoch(ShardReader(*source, cache))

    return read_epoch


def epoch(reader):
    order = epoch_order(reader.manifest.digest, 7, 0, reader.shard_samples, lanes=1, window=4)
    good, bad = set(), {}
    for step in range(steps_per_epoch(order.samples, 1, 3)):
        places = [(int(shard), int(row)) for shard, row in batch_slots(order, step, 3) if row >= 0]
        for number, sample in reader.read_many(places):
            place = places[number]
            assert place not in good | bad.keys()  # no repeat
            if isinstance(sample, BadData):
                bad[place] = sample.cause
            else:
                assert sample.media == media_of(*place, SIZE)
                assert sample.captions == CAPTIONS[: 1 + place[1] % 2]
                good.add(place)
    assert good | bad.keys() == ALL  # no loss that is not said
    return good, bad


def requests_of(deliver, proxy):
    """How many GETs an undisturbed epoch makes; they are spoilt one after the other."""
    proxy.reset()
    assert deliver() == (ALL, {})
    gets = [request for request in proxy.requests if request[0] == "GET"]
    assert len(gets) >= 4
    return len(gets)


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_transient_fault_of_any_request_costs_nothing(deliver, faulty_s3, kind):
    for number in range(requests_of(deliver, faulty_s3)):
        faulty_s3.reset(fault := Fault(kind, "GET", after=number))
        assert deliver() == (ALL, {})
        assert fault.met > number


def test_a_byte_changed_on_the_way_is_seen_by_the_checksum_that_comes_with_a_whole_file(source, faulty_s3):
    storage, _ = source
    tar = storage.read_bytes("000000.tar")
    faulty_s3.reset(Fault("flip", "GET", "tar", at=9))
    assert storage.read_bytes("000000.tar") == tar
    faulty_s3.reset(Fault("flip", "GET", "tar", at=9, times=FOR_EVER))
    with pytest.raises(BadData, match=r"checksum-mismatch: s3://.*000000\.tar"):
        storage.read_bytes("000000.tar")


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_a_body_cut_or_changed_on_the_way_at_any_byte_costs_nothing(deliver, faulty_s3, kind):
    for number, at in itertools.product(range(requests_of(deliver, faulty_s3)), AT):
        faulty_s3.reset(fault := Fault(kind, "GET", at=at, after=number))
        assert deliver() == (ALL, {}), (number, at)
        assert fault.met > number


@pytest.mark.parametrize("kind", ["stall", "stall-body"])
def test_silence_ends_and_costs_nothing(deliver, faulty_s3, kind):
    for path in ("parquet", "tar"):
        faulty_s3.reset(fault := Fault(kind, "GET", path, at=100))
        assert deliver() == (ALL, {})
        assert fault.met


def test_a_store_that_refuses_connections_for_a_while_is_waited_for(source, faulty_s3, monkeypatch):
    sleep, waits = time.sleep, []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            faulty_s3.open()
        sleep(seconds)

    monkeypatch.setattr("sharding.storage_s3.time.sleep", wait)
    reader = ShardReader(*source)
    reader.read(0, 0)
    faulty_s3.close()
    assert reader.read(0, 1).media == media_of(0, 1, SIZE)
    assert len(waits) >= 3


@pytest.mark.parametrize("kind", ["missing", "short"])
def test_an_answer_that_lies_costs_at_most_the_samples_it_was_for(deliver, faulty_s3, kind):
    causes = set()
    for number in range(requests_of(deliver, faulty_s3)):
        faulty_s3.reset(Fault(kind, "GET", at=100, after=number))
        _, bad = deliver()
        assert len({shard for shard, _ in bad}) <= 1  # a shard's faults are its own
        causes |= set(bad.values())
    allowed = {"missing": {"missing-shard", "missing-index"}, "short": {"truncated-shard"}}[kind]
    assert causes <= allowed


@pytest.mark.parametrize(
    ("kind", "path", "cause"),
    [
        ("missing", "000000.tar", "missing-shard"),
        ("missing", "000000.parquet", "missing-index"),
        ("short", "000000.tar", "truncated-shard"),
        ("flip", "000000.parquet", "checksum-mismatch"),
        ("flip", "000000.tar", "checksum-mismatch"),
    ],
)
def test_a_shard_that_stays_bad_costs_its_own_samples_only(deliver, faulty_s3, kind, path, cause):
    faulty_s3.reset(Fault(kind, None if kind == "missing" else "GET", path, at=700, times=FOR_EVER))
    good, bad = deliver()
    assert {(1, row) for row in range(SHARDS[1])} <= good
    assert set(bad.values()) <= {cause}
    if kind != "flip" or "parquet" in path:  # an inverted byte may lie in a header that nobody needs
        assert len(bad) == SHARDS[0]


@pytest.mark.parametrize("kind", ["busy", "reset", "cut"])
def test_a_store_that_stays_away_is_a_storage_fault_naming_the_file_and_no_bad_data(deliver, faulty_s3, kind):
    faulty_s3.reset(Fault(kind, None, r"000001\.(tar|parquet)", times=FOR_EVER))
    with pytest.raises(StorageFault, match=r"s3://.*/data/000001\.(tar|parquet): given up after 6 tries"):
        deliver()


def test_a_refusal_is_the_users_to_mend(deliver, faulty_s3):
    faulty_s3.reset(Fault("denied", None, "000001", times=FOR_EVER))
    with pytest.raises(UserError, match=r"000001.*access denied"):
        deliver()


@pytest.mark.parametrize("kind", ["cut", "flip", "short", "busy", "missing"])
def test_nothing_half_or_wrong_stays_in_the_cache(source, faulty_s3, tmp_path, kind):
    storage, manifest = source
    cache = ShardCache(tmp_path / "cache", 10**6)
    faulty_s3.reset(Fault(kind, "GET", "000000.tar", at=1100, times=FOR_EVER))
    shard = manifest.shards[0]
    with pytest.raises((BadData, StorageFault, FileNotFoundError)):
        cache.open(storage, shard.tar, size=shard.bytes, sha256=shard.sha256)
    assert [path for path in cache.folder.rglob("*") if path.is_file() and path.name != "evict"] == []
    faulty_s3.reset()
    assert epoch(ShardReader(storage, manifest, cache)) == (ALL, {})


def test_the_proxy_does_what_it_is_told(source, faulty_s3):
    """Else the sweep above would prove nothing."""
    storage, _ = source
    tar = storage.read_bytes("000000.tar")
    # A range, since the checksum that comes with a whole object gives an inverted byte away.
    faulty_s3.reset(Fault("flip", "GET", "tar", at=9), Fault("short", "GET", "tar", at=7, after=1))
    assert storage.read_bytes("000000.tar", 0, 20) == tar[:9] + bytes([tar[9] ^ 0xFF]) + tar[10:20]
    assert storage.read_bytes("000000.tar", 0, 20) == tar[:7]
    assert storage.read_bytes("000000.tar") == tar
    faulty_s3.reset(Fault("cut", "GET", "tar", at=9))
    assert storage.read_bytes("000000.tar") == tar
    assert [part for _, _, part in faulty_s3.requests] == [None, "bytes=9-"]
    assert all(re.search(r"data/000000\.tar", path) for _, path, _ in faulty_s3.requests)
