"""Manifests, indexes and checkpoint records with damaged bytes: read, or refused by name; never half believed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline.runs import load_run_job, read_record
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.checkpoints.record import COMMIT, commit
from sharding.config import PrepareConfig
from sharding.errors import BadData, UserError
from sharding.index import load_index, read_index
from sharding.manifest import MANIFEST_PATH, load_manifest
from sharding.plan import make_plan, survey
from sharding.sources import open_source
from sharding.stages import Work, encode, recorded_tasks
from sharding.storage import Storage, open_storage
from tests.fixtures.fuzz import Fuzz, read_or_refuse
from tests.fuzz.mutations import mutated_bytes, mutated_json
from tests.sharding.real_media import picture, write_image_dataset


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty folder."""
    return open_storage(tmp_path)


def test_a_damaged_manifest_is_read_or_refused_by_name(fuzz: Fuzz, storage: Storage):
    write_image_dataset(storage, 2)
    whole = storage.read_json(MANIFEST_PATH)

    def check(data: bytes) -> None:
        storage.write_bytes(MANIFEST_PATH, data)
        manifest = read_or_refuse(lambda: load_manifest(storage), UserError, storage.url)
        if manifest is None:
            return
        assert len(manifest.digest) == 64
        for shard in manifest.shards:  # no name leads out of the dataset
            assert storage.url_of(shard.tar).startswith(f"{storage.url}/")
            assert storage.url_of(shard.index).startswith(f"{storage.url}/")

    fuzz("manifests", mutated_json([whole]), check, 120)


def test_a_damaged_index_is_refused_by_its_digest_and_by_its_content(fuzz: Fuzz, storage: Storage):
    (record,) = write_image_dataset(storage, 2).shards
    whole = storage.read_bytes(record.index)

    def check(data: bytes) -> None:
        storage.write_bytes(record.index, data)
        if read_or_refuse(lambda: load_index(storage, record), BadData, storage.url) is not None:
            assert data == whole
        read_or_refuse(lambda: read_index(data), ValueError, "the index")

    fuzz("indexes", mutated_bytes([whole]), check, 120)


def test_a_damaged_checkpoint_record_is_passed_over_and_the_one_before_is_listed(
    fuzz: Fuzz, storage: Storage, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL, "pipeline.training.checkpoints.record")
    files = {"model/model.safetensors": {"size": 3, "sha256": "0" * 64}}
    record = {"format": "glscl-checkpoint", "version": 2, "step": 1, "stage": 0, "files": files}
    commit(storage, "checkpoints/step-00000001-a", record)
    newest = commit(storage, "checkpoints/step-00000002-b", {**record, "step": 2})
    whole = storage.read_json(f"{newest.path}/{COMMIT}")

    def check(data: bytes) -> None:
        storage.write_bytes(f"{newest.path}/{COMMIT}", data)
        found = list_checkpoints(storage)
        assert found[0].step == 1
        for checkpoint in found[1:]:
            assert checkpoint.record == whole["record"]

    fuzz("checkpoint_records", mutated_json([whole]), check, 150)


def test_damaged_records_of_a_preparation_are_refused_by_name(fuzz: Fuzz, tmp_path: Path):
    (tmp_path / "raw").mkdir()
    for number in range(2):
        (tmp_path / "raw" / f"{number}.jpg").write_bytes(picture(number))
        (tmp_path / "raw" / f"{number}.txt").write_text("a caption")
    source = {"kind": "folder", "path": str(tmp_path / "raw")}
    config = PrepareConfig.model_validate({"source": source, "modality": "image", "filters": []})
    dataset = open_storage(tmp_path / "dataset")

    def run() -> int:
        listing = open_source(config, dataset)
        work = Work(dataset, config, make_plan(listing, survey(listing, lambda _: None), config, dataset))
        return (
            sum(record.counts.kept for record in recorded_tasks(work, committed=True))
            or encode(work, 0).counts.kept
        )

    assert run() == 2
    whole = {path: dataset.read_bytes(path) for path in ("plan.json", "commits/000000.json")}

    def check(data: bytes) -> None:
        for path in whole:
            dataset.write_bytes(path, data)
            read_or_refuse(run, UserError, f"{dataset.url}/{path}")
            dataset.write_bytes(path, whole[path])

    fuzz("preparation_records", mutated_json([json.loads(data) for data in whole.values()]), check, 60)


def test_a_damaged_record_of_a_run_is_refused_by_name(fuzz: Fuzz, storage: Storage):
    whole = {"job": {"name": "a", "storage": {"url": storage.url}}, "datasets": {"pictures": "x"}, "key": "k"}

    run = storage.at("runs/a")

    def check(data: bytes) -> None:
        run.write_bytes("run.json", data)
        for read in (lambda: read_record(run), lambda: load_run_job(run.url)):
            read_or_refuse(read, UserError, run.url)

    fuzz("run_records", mutated_json([json.loads(json.dumps(whole))]), check, 100)
