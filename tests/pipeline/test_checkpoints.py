"""A checkpoint exists when its commit record does, and only what was committed is ever loaded."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.workers import WorkerContext
from pipeline.config import parse_job
from pipeline.training.checkpoints import (
    FORMAT,
    VERSION,
    Checkpoint,
    delete_checkpoint,
    fetch_model,
    list_checkpoints,
    remains,
)
from pipeline.training.checkpoints.resuming import _refuse_mismatch
from pipeline.training.consumption import refuse_other_shards
from pipeline.training.loop import TrainingPlan, _identity
from pipeline.training.pretraining import Pretraining, PretrainingSubject
from sharding.errors import BadData, UserError
from sharding.manifest import Manifest
from sharding.reader import ShardReader
from sharding.storage import Storage, open_storage
from tests.fixtures.jobs import tiny_job
from tests.pipeline.test_data_order import manifest_of


def commit(run: Storage, step: int, **changes: Any) -> Checkpoint:
    """A checkpoint with one weights file, written as the training writes it."""
    path = f"checkpoints/step-{step:08d}"
    data = b"weights of step %d" % step
    run.write_bytes(f"{path}/model/model.safetensors", data)
    files = {"model/model.safetensors": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "stage": 0,
        "files": files,
        "stage_end": False,
    } | changes
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    run.write_json(f"{path}/commit.json", {"record": record, "digest": digest})
    return Checkpoint(step, 0, path, digest, record)


def test_committed_checkpoints_are_listed_by_step_and_half_written_ones_are_not(storage: Storage) -> None:
    for step in (300, 20, 100):
        commit(storage, step)
    storage.write_bytes("checkpoints/step-00000400/model/model.safetensors", b"no commit record yet")
    assert [checkpoint.step for checkpoint in list_checkpoints(storage)] == [20, 100, 300]


def test_who_lists_again_and_again_reads_each_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = open_storage(tmp_path), list[str]()
    plain = Storage.read_bytes
    monkeypatch.setattr(Storage, "read_bytes", lambda self, path: (read.append(path), plain(self, path))[1])
    known: dict[str, Checkpoint] = {}
    first, second = commit(run, 10), commit(run, 20)
    assert list_checkpoints(run, known) == list_checkpoints(run, known) == [first, second]
    third = commit(run, 30)
    delete_checkpoint(run, first)
    assert list_checkpoints(run, known) == [second, third]
    assert sorted(read) == [f"{one.path}/commit.json" for one in (first, second, third)]
    assert list(known) == [second.path, third.path], "what is deleted is let go"


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"record": {"step": 7}, "digest": "0"}'])
def test_a_damaged_commit_record_is_passed_over_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    run = open_storage(tmp_path)
    commit(run, 10)
    commit(run, 20)
    run.write_bytes("checkpoints/step-00000020/commit.json", damage)
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [10]
    assert "step-00000020" in caplog.text
    assert "passed over" in caplog.text


def test_a_commit_record_changed_by_one_character_is_not_believed(tmp_path: Path) -> None:
    run = open_storage(tmp_path)
    commit(run, 10)
    text = run.read_bytes("checkpoints/step-00000010/commit.json")
    run.write_bytes("checkpoints/step-00000010/commit.json", text.replace(b'"step": 10', b'"step": 11'))
    assert list_checkpoints(run) == []


def test_weights_are_verified_before_they_are_used(storage: Storage, tmp_path: Path) -> None:
    checkpoint = commit(storage, 10)
    folder = fetch_model(storage, checkpoint, tmp_path / "good")
    assert (folder / "model.safetensors").read_bytes() == b"weights of step 10"
    storage.write_bytes(f"{checkpoint.path}/model/model.safetensors", b"weights of step 1O")
    with pytest.raises(BadData, match="sha256"):
        fetch_model(storage, checkpoint, tmp_path / "flipped")
    storage.delete(f"{checkpoint.path}/model/model.safetensors")
    with pytest.raises(BadData, match="missing-file"):
        fetch_model(storage, checkpoint, tmp_path / "missing")
    assert list((tmp_path / "flipped").rglob("*.safetensors")) == []


def test_a_deleted_checkpoint_is_gone_and_never_half_there(storage: Storage) -> None:
    checkpoint = commit(storage, 10)
    delete_checkpoint(storage, checkpoint)
    assert list_checkpoints(storage) == []
    assert list(storage.list("checkpoints")) == []


def test_a_run_goes_on_after_a_retraction_but_not_on_other_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, job = open_storage(tmp_path), parse_job(tiny_job("/data/raw", tmp_path / "storage"), "job.yaml")
    context = WorkerContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, device=torch.device("cpu")
    )
    manifest = manifest_of("emoji", [3, 1])
    retracted = manifest.model_copy(update={"dropped_keys": ["000000-000001"]})
    other = manifest_of("emoji", [4])

    plan = TrainingPlan(
        subject=PretrainingSubject(job, {}),
        course=job.train,
        seed=job.seed,
        run=run,
        checkpoint_every=4,
        tracking=job.tracking,
        tracking_key="tiny",
        tracking_run=None,
        scratch=tmp_path / "scratch",
    )

    def learner(of: Manifest) -> Pretraining:
        return Pretraining(job, run, {"emoji": ShardReader(run, of)}, context, plan.scratch)

    identity = _identity(plan, learner(manifest))
    begun = {"shards": {"emoji": manifest.shards_digest}, **identity}
    checkpoint = commit(run, 4, world_size=1, **learner(manifest).details(), **begun)
    _refuse_mismatch(checkpoint, _identity(plan, learner(retracted)), run)
    refuse_other_shards(checkpoint.record, {"emoji": retracted.shards_digest}, job.train, "here")
    with caplog.at_level(logging.INFO):
        learner(retracted).begins(checkpoint.record)
    assert "1 of 4 samples are retracted" in caplog.text
    assert "other samples are retracted than at step 4" in caplog.text
    with pytest.raises(UserError, match="here was trained on other shards of 'emoji'"):
        refuse_other_shards(checkpoint.record, {"emoji": other.shards_digest}, job.train, "here")


def test_what_killed_writes_left_is_told_from_a_write_under_way(storage: Storage) -> None:
    commit(storage, 10)
    commit(storage, 20)
    for folder in ("step-00000015-0a", "step-00000020-0b", "step-00000030-0c"):
        storage.write_bytes(f"checkpoints/{folder}/state/worker-00000.safetensors", b"part")
    assert remains(storage, list_checkpoints(storage)) == [
        "checkpoints/step-00000015-0a",
        "checkpoints/step-00000020-0b",
    ]


def test_a_step_committed_twice_is_listed_once_and_always_the_same(storage: Storage) -> None:
    first = commit(storage, 10)
    record = first.record | {"attempt": 2}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    storage.write_json(f"{first.path}-ff/commit.json", {"record": record, "digest": digest})
    assert list_checkpoints(storage) == [first]
    assert remains(storage, [first]) == [f"{first.path}-ff"]
