"""A job may name shards that are there: of another job, of a merge, or of another program."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import load_job, parse_job
from pipeline.job import _prepare_all
from pipeline.training.batches import stage_loader
from pipeline.training.engine import model_config
from sharding.errors import UserError
from sharding.manifest import load_manifest
from sharding.prepared import PreparedConfig
from sharding.reader import ShardReader
from sharding.storage import open_storage
from tests.fixtures.jobs import prepared_job, write_job


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return prepared_job(tmp_path)


def test_prepared_shards_are_a_dataset_of_the_job(tree, tmp_path):
    job = parse_job(tree, "job")
    block = job.datasets["emoji"]
    assert isinstance(block, PreparedConfig)
    assert (block.prepared, block.caption_field) == (f"file://{tmp_path}/laion", "caption")
    assert parse_job(json.loads(job.model_dump_json()), "again").datasets == job.datasets


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("datasets.emoji.modalty=image", "datasets.emoji.modalty: unknown key; did you mean 'modality'?"),
        ("datasets.emoji.modality=sound", "datasets.emoji.modality: got 'sound'; must be 'image' or 'video'"),
        ("datasets.emoji.prepared=gs://x/y", "datasets.emoji.prepared: cannot open gs:// storage"),
        ("datasets.emoji.source={}", "datasets.emoji.source: unknown key"),
        ("datasets.other={modality: image}", "datasets.other.source: is required"),
        ("datasets.other={prepared: x}", "datasets.other.modality: is required"),
    ],
)
def test_a_fault_in_a_dataset_names_its_field(tree, tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        load_job(write_job(tmp_path / "job.yaml", tree), [override])
    assert message in str(caught.value)


def test_another_programs_shards_are_indexed_on_first_use_and_read_by_the_loader(tree, tmp_path):
    job = parse_job(tree, "job")
    storage, console = open_storage(job.storage), Console(file=io.StringIO(), width=160)
    prepared = _prepare_all(job, storage, console)
    assert prepared["emoji"].manifest == load_manifest(open_storage(tmp_path / "laion"))
    assert _prepare_all(job, storage, console)["emoji"] == prepared["emoji"]
    readers = {
        name: ShardReader(storage.resolve(dataset.path), dataset.manifest)
        for name, dataset in prepared.items()
    }
    loader = stage_loader(
        job.train.stages[0],
        job.train,
        readers,
        model_config(job.model),
        tokenizer="builtin",
        seed=job.seed,
        start_step=0,
        worker=0,
        workers=1,
    )
    batch = next(iter(loader))
    assert bool(batch.valid.all())
    assert all(key.isdigit() and len(key) == 9 for key in batch.keys)


def test_the_wrong_modality_is_refused(tree):
    tree["datasets"]["held-out"]["modality"] = "video"
    job = parse_job(tree, "job")
    with pytest.raises(
        UserError, match=r"datasets\.held-out\.modality: got video, but .* is of modality image"
    ):
        _prepare_all(job, open_storage(job.storage), Console(file=io.StringIO()))
