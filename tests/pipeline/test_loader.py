"""Loader processes: the batches they make, and how they begin."""

import subprocess
import sys
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


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_loader_processes_give_the_batches_of_none_crops_and_flips_included(
    raw_corpus: Path, tmp_path: Path
) -> None:
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


FORKED = """
import multiprocessing, sys
from pipeline.training.loading import import_ahead

if __name__ == "__main__":
    import_ahead(*sys.argv[2:])
    told = "import sys; open(%r, 'w').write(str('pipeline.training.batches' in sys.modules))" % sys.argv[1]
    process = multiprocessing.get_context("forkserver").Process(target=exec, args=(told,))
    process.start()
    process.join()
"""


@pytest.mark.parametrize("ahead", [True, False])
def test_loader_processes_are_forked_from_one_that_has_imported_what_they_need(
    ahead: bool, tmp_path: Path
) -> None:
    modules = ["pipeline.training.batches"] if ahead else []
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "told"), *modules], timeout=600, check=True)
    assert (tmp_path / "told").read_text() == str(ahead)
