"""The production evaluation as it is: real shards, a real checkpoint, a real actor, and MLflow at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import GLSCLConfig, GLSCLForPreTraining
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.tracking import Tracker, TrackingConfig
from pipeline.tracking.connection import connect
from pipeline.training.checkpoints import FORMAT, VERSION, list_checkpoints, record_digest
from sharding.config import PrepareConfig
from sharding.prepare import prepare
from sharding.storage import Storage, open_storage


def write_checkpoint(run: Storage, folder: Path, step: int) -> None:
    """A committed checkpoint with the weights of a small model."""
    torch.manual_seed(step)
    config = GLSCLConfig.preset(
        "tiny", image_size=32, patch_size=16, vision_layers=1, text_layers=1, fusion_layers=1
    )
    GLSCLForPreTraining(config).save_pretrained(folder / "model")
    files = {}
    for file in sorted((folder / "model").iterdir()):
        uploaded = run.upload(file, f"checkpoints/step-{step:08d}/model/{file.name}")
        files[f"model/{file.name}"] = {"size": uploaded.size, "sha256": uploaded.sha256}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "stage": 0,
        "stage_end": False,
        "files": files,
    }
    commit = {"record": record, "digest": record_digest(record)}
    run.write_json(f"checkpoints/step-{step:08d}/commit.json", commit)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_real_checkpoints_are_evaluated_and_a_flipped_byte_is_marked_failed(
    tmp_path: Path, table_corpus: Path, clip_corpus: Path
) -> None:
    storage = open_storage(tmp_path / "storage")
    sources = {"stills": (table_corpus, "image"), "clips": (clip_corpus, "video")}
    datasets = {}
    for name, (table, modality) in sources.items():
        columns = {"path_column": "path", "caption_column": "captions"}
        source = {"kind": "table", "path": str(table), **columns}
        config = PrepareConfig.model_validate(
            {"source": source, "modality": modality, "samples_per_shard": 5}
        )
        datasets[name] = storage.at(prepare(name, config, storage, in_flight=2).path)
    run = storage.at("runs/one")
    for step in (10, 20):
        write_checkpoint(run, tmp_path / f"checkpoint-{step}", step)
    weights = tmp_path / "storage/runs/one/checkpoints/step-00000020/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)

    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracker = Tracker(tracking, name="one", key="one", params={}, tags={})
    dispatcher = Dispatcher(
        run,
        EvaluateConfig(
            tasks=[
                RetrievalTask(name="images", dataset="stills", rerank=3, batch_size=4),
                RetrievalTask(name="videos", dataset="clips", frames=2, rerank=2),
            ]
        ),
        run,
        datasets,
        on_result=lambda outcome: tracker.evaluation(outcome.entry(run)),
        poll_s=0.2,
    )
    assert dispatcher.pinned() == {10, 20}
    dispatcher.start()
    assert dispatcher.wait(200)
    dispatcher.stop()
    assert tracker.finish(timeout_s=60)

    outcomes = {(o.step, o.task): o for o in dispatcher.outcomes()}
    assert len(outcomes) == 4
    images, videos = outcomes[10, "images"], outcomes[10, "videos"]
    assert images.cause is None, images.cause
    assert videos.cause is None, videos.cause
    assert images.metrics["candidates_images"] == 16
    assert videos.metrics["candidates_images"] == 6
    assert 0 <= images.metrics["t2i_rerank_R1"] <= images.metrics["t2i_R10"] <= 1
    for task in ("images", "videos"):
        assert "model.safetensors" in str(outcomes[20, task].cause)
        assert outcomes[20, task].attempt == 1  # the same bytes would fail again
    assert dispatcher.pinned() == set()
    assert dispatcher.best_step("images/t2i_R10") == 10
    handle = tracker.handle
    assert handle is not None
    children = connect(tracking).search_runs(
        [handle.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{handle.run_id}'"
    )
    assert sorted(child.info.status for child in children) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    models = connect(tracking).search_logged_models([handle.experiment_id])
    assert {model.tags["checkpoint"] for model in models} == {
        run.url_of(checkpoint.path) for checkpoint in list_checkpoints(run)
    }
