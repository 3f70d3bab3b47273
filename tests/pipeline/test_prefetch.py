"""The promises of pipeline/training/prefetch.py, and of reading a batch at once."""

import multiprocessing
import os
import time

import pytest
import torch

from pipeline.training.batches import Slot, StageDataset, StageSampler
from pipeline.training.config import TrainBlock
from pipeline.training.prefetch import PrefetchedSampler, bytes_needed, in_flight, open_cache
from sharding.errors import UserError
from sharding.order import batch_slots, epoch_order, shards_in_span, steps_per_epoch
from sharding.reader import ShardReader
from sharding.storage import open_storage
from tests.sharding.datasets import write_dataset


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder that is taken for remote storage, with 10 shards of 8 samples; and its manifest."""
    storage = open_storage(tmp_path / "remote")
    manifest = write_dataset(storage, (8,) * 10, size=200_000)
    monkeypatch.setattr("sharding.storage_file.FileBackend.local_path", lambda self, path: None)
    return storage, manifest


def block(cache_mb=0, steps=20, **changes):
    return TrainBlock.model_validate(
        {
            "global_batch": 4, "lanes": 2, "shuffle_window": 4, "loader_processes": 0, "cache_mb": cache_mb,
            "stages": [{"name": "one", "steps": steps, "mixture": {"a": 1}}], **changes,
        }
    )  # fmt: skip


def sampler(train, readers, **changes):
    options = {"seed": 1, "start_step": 0, "worker": 0, "workers": 1, **changes}
    manifests = {name: reader.manifest for name, reader in readers.items()}
    return StageSampler(train.stages[0], train, manifests, **options)


def test_a_cache_that_is_too_small_for_the_job_is_refused_with_the_number_that_is_needed(remote, tmp_path):
    _, manifest = remote
    train = block(cache_mb=1, workers=2)
    with pytest.raises(
        UserError, match=r"train\.cache_mb: got 1; .* take up to (\d+): set at least"
    ) as caught:
        open_cache(tmp_path / "cache", train, {"a": manifest}, workers_on_node=2)
    needed = -(-bytes_needed(train, {"a": manifest}, 2) // 2**20)
    assert f"up to {needed}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert open_cache(tmp_path / "cache", block(cache_mb=needed, workers=2), {"a": manifest}, 2).byte_limit
    assert not (tmp_path / "none").exists()
    assert open_cache(tmp_path / "none", block(cache_mb=needed), {}, 2) is None  # all data are here
    assert open_cache(tmp_path / "none", block(cache_mb=0), {"a": manifest}, 2) is None


def test_a_disk_without_room_for_the_cache_is_refused_naming_the_field(remote, tmp_path):
    with pytest.raises(
        UserError, match=r"train\.cache_mb: shard cache .*: may take \d+ MiB, but its disk has"
    ):
        open_cache(tmp_path / "cache", block(cache_mb=10**9), {"a": remote[1]}, 1)


def test_more_lanes_workers_and_loader_processes_need_more_but_never_more_than_all_data(remote):
    _, manifest = remote
    everything = sum(shard.bytes + shard.index_bytes for shard in manifest.shards)
    one = bytes_needed(block(), {"a": manifest}, 1)
    assert 2 * manifest.shards[0].bytes < one < everything
    assert one < bytes_needed(block(lanes=4), {"a": manifest}, 1) <= everything
    assert one < bytes_needed(block(loader_processes=4), {"a": manifest}, 1) <= everything
    assert bytes_needed(block(lanes=64, global_batch=64), {"a": manifest}, 1) == everything


@pytest.mark.parametrize("counts", [(8,) * 6, (5, 1, 9, 2, 0, 7, 3, 3), (1,) * 12, (30,)])
@pytest.mark.parametrize("span", [1, 2, 3, 7, 20])
def test_no_span_of_a_lane_lies_in_more_shards_than_is_said(counts, span):
    most = shards_in_span(counts, span)
    seen = 0
    for seed in range(40):
        order = epoch_order("digest", seed, 0, counts, lanes=1, window=1)
        steps = steps_per_epoch(order.samples, 1, 1)
        shards = [int(batch_slots(order, step, 1)[0, 0]) for step in range(steps)]
        seen = max([seen, *(len(set(shards[i : i + span])) for i in range(len(shards)))])
    assert seen <= most
    assert most - seen <= 1  # near enough to be of use


@pytest.mark.parametrize("seed", [1, 2, 3])  # other cuts of the ring of shards
def test_the_batches_are_those_of_the_sampler_and_their_shards_come_within_the_limit(remote, tmp_path, seed):
    storage, manifest = remote
    train = block(cache_mb=-(-bytes_needed(block(), {"a": manifest}, 1) // 2**20))
    cache = open_cache(tmp_path / "cache", train, {"a": manifest}, 1)
    readers = {"a": ShardReader(storage, manifest, cache, fetches=False)}
    plain = list(sampler(train, readers, seed=seed))
    prefetched = PrefetchedSampler(
        sampler(train, readers, seed=seed), readers, byte_limit=cache.byte_limit, behind=in_flight(train)
    )
    assert len(prefetched) == len(plain)
    assert list(prefetched) == plain
    assert all(process.name != "prefetch" for process in multiprocessing.active_children())
    for slots in prefetched:
        for shard in {slot.shard for slot in slots if slot.row >= 0}:
            os.close(until_leased(cache, manifest.shards[shard]))
    assert sum(path.stat().st_size for path in cache.folder.glob("verified-*/*")) <= cache.byte_limit


def until_leased(cache, record):
    deadline = time.monotonic() + 30
    while (number := cache.lease(record.sha256, record.bytes)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return number


def test_a_batch_is_read_at_once_and_is_what_its_samples_are_one_by_one(remote, monkeypatch):
    storage, manifest = remote
    train = block()
    readers = {"a": ShardReader(storage, manifest)}
    monkeypatch.setattr(
        "pipeline.training.batches.decode_image", lambda media, detail: torch.zeros(8, 8, 3).byte().numpy()
    )
    dataset = StageDataset(readers, train.stages[0], image_size=8, seed=3)
    slots = [slot for batch in sampler(train, readers) for slot in batch] + [Slot("a", -1, -1, 0)]
    assert len({slot.shard for slot in slots}) == 11
    together = dataset.__getitems__(slots)
    assert [sample.key for sample in together] == [dataset[slot].key for slot in slots]
    assert [sample.caption for sample in together] == [dataset[slot].caption for slot in slots]
    storage.delete("000003.tar")
    bad = dataset.__getitems__(slots)
    for slot, sample in zip(slots, bad, strict=True):
        assert sample.cause == ("missing-shard" if slot.shard == 3 else None)
