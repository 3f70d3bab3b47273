"""Batches are the same bytes whether two loader processes made them or none, crops and flips included."""

from pathlib import Path

import pytest
import torch

from pipeline.config import parse_job
from pipeline.training.batches import Batch, stage_loader
from pipeline.training.config import AugmentationBlock
from pipeline.training.engine import model_config
from sharding.prepare import prepare
from sharding.reader import ShardReader
from sharding.storage import open_storage
from tests.fixtures.jobs import tiny_job

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


def test_two_loader_processes_give_the_batches_of_none(raw_corpus: Path, tmp_path: Path) -> None:
    plain = tiny_job(raw_corpus, tmp_path / "storage")
    plain["datasets"]["emoji"]["image"] = {"resize": 100, "format": "jpg"}
    job = parse_job(plain, "test")
    storage = open_storage(job.storage)
    readers = {}
    for name in ("emoji", "clips"):
        prepared = prepare(name, job.datasets[name], storage, in_flight=2)
        readers[name] = ShardReader(storage.at(prepared.path), prepared.manifest)
    augmentation = AugmentationBlock(crop=0.3, flip=0.5, rand_augment=True)
    stage = job.train.stages[1].model_copy(update={"augmentation": augmentation})

    def batches(processes: int) -> list[Batch]:
        train = job.train.model_copy(update={"loader_processes": processes})
        return list(
            stage_loader(stage, train, readers, model_config(job.model), tokenizer="builtin", seed=job.seed)
        )

    alone = batches(0)
    assert len({batch.pixel_values.shape for batch in alone}) == 2  # images and clips
    assert all(batch.valid.any() for batch in alone)
    for batch, other in zip(alone, batches(2), strict=True):
        assert batch.keys == other.keys
        assert torch.equal(batch.pixel_values, other.pixel_values)
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.valid, other.valid)
        for name, tensor in vars(batch.masks).items():
            assert torch.equal(tensor, getattr(other.masks, name)), name
