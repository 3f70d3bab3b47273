"""What a fine-tuning has come to is taken as it is, verified, and nothing of it is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.fine_tuning.launch import FORMAT, RECORD, fine_tuned
from pipeline.tracking import open_run
from pipeline.training.checkpoints import FOLDER
from sharding.errors import BadData
from sharding.storage import Storage
from tests.pipeline.fine_tuning.material import Run, commit, make_run, vqa_task


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


@pytest.fixture(autouse=True)
def _trains_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.workers.run_workers", lambda *_, **__: pytest.fail("it is there already"))


def kept(run: Run, **changes: Any) -> Storage:
    """A fine-tuned model of two files and its record, and the remains of its training."""
    assignment = run.assignment(vqa_task(run.storage))
    place = run.run.at(f"fine-tuning/vqa-v{assignment.version}/{run.checkpoint.digest[:16]}")
    files = {}
    for name in ("model/config.json", "model/model.safetensors"):
        source = run.run.local_path(f"{run.checkpoint.path}/{name}")
        assert source is not None
        uploaded = place.upload(source, name)
        files[name] = {"size": uploaded.size, "sha256": uploaded.sha256}
    record = {"format": FORMAT, "files": files, "task": "vqa", "checkpoint": assignment.checkpoint_record}
    record |= {"task_version": assignment.version, "data": assignment.data_digest, "seed": 3}
    place.write_json(RECORD, {**record, "steps": 20, "recipe": {}, "finished": 1.0, **changes})
    place.write_bytes(f"{FOLDER}/step-00000020/commit.json", b"{}")
    place.write_bytes("captions-0123.parquet", b"of a kind's own")
    return place


def test_one_that_was_killed_after_its_last_step_is_kept_and_ended_in_mlflow(
    run: Run, tmp_path: Path
) -> None:
    assignment, setup = run.assignment(vqa_task(run.storage)), run.setup()
    place = run.run.at(f"fine-tuning/vqa-v{assignment.version}/{run.checkpoint.digest[:16]}")
    last = commit(place, tmp_path / "trained", step=20)
    parent = open_run(setup.tracking, name="one", key="one", params={}, tags={})
    run.run.write_json("run.json", {"tracking_run": parent.run_id})
    kept_back = [20, 1_700_000_000_000, {"loss/vqa": 0.25}]  # a metric that the server did not get
    place.write_bytes("tracking/1.jsonl", json.dumps(kept_back).encode() + b"\n")
    found = fine_tuned(assignment, setup, tmp_path / "here")
    assert found.record["files"].keys() == {"model/config.json", "model/model.safetensors"}
    assert found.record["files"]["model/model.safetensors"] == last.files["model/model.safetensors"]
    assert found.record["steps"] == 20
    client = MlflowClient(tracking_uri=setup.tracking.uri)
    [child] = [one for one in client.search_runs([parent.experiment_id]) if one.info.run_id != parent.run_id]
    assert child.data.tags["mlflow.parentRunId"] == parent.run_id
    assert child.info.status == "FINISHED"
    assert child.data.metrics["loss/vqa"] == 0.25


def test_it_is_fetched_and_what_the_training_left_is_deleted(run: Run, tmp_path: Path) -> None:
    place = kept(run)
    found = fine_tuned(run.assignment(vqa_task(run.storage)), run.setup(), tmp_path / "here")
    assert {path.name for path in found.model.iterdir()} == {"config.json", "model.safetensors"}
    assert found.url == place.url_of("model")
    assert found.record["steps"] == 20
    names = {file.path for file in place.list()}
    assert names == {"model/config.json", "model/model.safetensors", RECORD}


def test_a_flipped_byte_is_noticed_and_the_way_out_named(run: Run, tmp_path: Path) -> None:
    place = kept(run)
    data = bytearray(place.read_bytes("model/model.safetensors"))
    data[len(data) // 2] ^= 1
    place.write_bytes("model/model.safetensors", bytes(data))
    with pytest.raises(BadData, match=r"sha256.*; delete .*fine-tuned\.json to fine-tune again"):
        fine_tuned(run.assignment(vqa_task(run.storage)), run.setup(), tmp_path / "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "another"},
        {"files": None},
        {"files": {"model/../../escaped": {"size": 1, "sha256": "0"}}},
        {"files": {"/escaped": {"size": 1, "sha256": "0"}}},
        {"files": {"": {}}},
    ],
)
def test_a_record_that_is_none_is_refused_and_nothing_is_written(
    run: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    kept(run, **changes)
    with pytest.raises(BadData, match="is no record of a fine-tuning"):
        fine_tuned(run.assignment(vqa_task(run.storage)), run.setup(), tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "escaped").exists()
