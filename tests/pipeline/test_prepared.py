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
from tests.end_to_end.command import Command
from tests.fixtures.jobs import tiny_job, write_job
from tests.sharding.foreign_tars import write_img2dataset
from tests.sharding.real_media import write_image_dataset


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A job on img2dataset's shards and on some of ours, neither of them in its storage."""
    write_img2dataset(tmp_path / "laion", shards=2, samples=20)
    write_image_dataset(open_storage(tmp_path / "elsewhere" / "ours-1"), 12, name="ours", first_seed=500)
    tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
    tree["datasets"] = {
        "emoji": {"prepared": str(tmp_path / "laion"), "modality": "image"},
        "held-out": {"prepared": f"file://{tmp_path}/elsewhere/ours-1", "modality": "image"},
    }
    tree["train"]["stages"] = tree["train"]["stages"][:1]
    return tree


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


@pytest.mark.slow
def test_a_job_on_prepared_shards_trains_and_evaluates(tree, tmp_path):
    tree["train"] |= {"workers": 1}
    tree["train"]["stages"][0] |= {"steps": 2, "checkpoint_every": 2}
    job = write_job(tmp_path / "job.yaml", tree)
    Command("run", str(job), log=tmp_path / "log").succeed()
    record = json.loads((tmp_path / "storage" / "runs" / "tiny" / "run.json").read_text())
    assert record["datasets"]["emoji"] == f"file://{tmp_path}/laion"
    assert (tmp_path / "storage" / "runs" / "tiny" / "reports" / "evaluation.html").exists()
    run, model = tmp_path / "storage" / "runs" / "tiny", tmp_path / "model"
    Command("export", str(run), str(model), log=tmp_path / "log2").succeed()
    card = (model / "README.md").read_text()
    assert "`held-out`" in card
    assert "not recorded" not in card  # the manifests are found though they are not in the job's storage
