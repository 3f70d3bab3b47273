"""Promises of a preparation's MLflow run: one from the first task to the dataset, and never in the way."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline.tracking import TrackingConfig
from pipeline.tracking.preparation import PreparationTracker
from sharding.prepare import PrepareConfig, PreparedDataset, Progress, prepare
from sharding.storage import Storage, open_storage
from tests.pipeline.mlflow_server import free_port


def _corpus(folder: Path, count: int) -> PrepareConfig:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (20 if number == 1 else 40, 44, 3), np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        (folder / f"{number:03d}.png").write_bytes(sink.getvalue())
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    return PrepareConfig.model_validate(
        {
            "source": {"kind": "folder", "path": str(folder)},
            "modality": "image",
            "samples_per_shard": 4,
            "filters": [{"kind": "size", "min": 30}, {"kind": "duplicates"}],
        }
    )


def _prepare(
    config: PrepareConfig, storage: Storage, tracking: TrackingConfig, interrupt_at: int | None = None
) -> PreparedDataset:
    with PreparationTracker(tracking, in_flight=2) as tracker:

        def update(progress: Progress) -> None:
            tracker.update(progress)
            if progress.phase == "encode" and progress.done == interrupt_at:
                raise KeyboardInterrupt

        prepared = prepare("pairs", config, storage, in_flight=2, progress=update, on_start=tracker.start)
        tracker.finish(prepared, storage.at(prepared.path))
    return prepared


def _runs(tracking: TrackingConfig) -> list[Run]:
    client = MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    return list(client.search_runs([experiment.experiment_id]))


def test_an_interrupted_preparation_goes_on_in_its_run_and_a_prepared_dataset_makes_none(
    tmp_path, ray_session
):
    config, storage = _corpus(tmp_path / "corpus", 14), open_storage(tmp_path / "out")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="tests")
    with pytest.raises(KeyboardInterrupt):
        _prepare(config, storage, tracking, interrupt_at=2)
    (interrupted,) = _runs(tracking)
    assert interrupted.info.status == "KILLED"
    prepared = _prepare(config, storage, tracking)
    assert _prepare(config, storage, tracking) == prepared
    (run,) = _runs(tracking)
    assert run.info.run_id == interrupted.info.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "prepare pairs")
    params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
    assert params["configuration_digest"] == config.digest
    assert (params["in_flight"], params["source.inputs"], params["tasks"]) == ("2", "14", "4")
    assert params["source.url"].endswith("corpus")
    assert tags["dataset.digest"] == prepared.manifest.digest
    assert tags["dataset.url"] == storage.at(prepared.path).url
    assert (metrics["inputs"], metrics["kept"], metrics["dropped"]) == (14, 13, 1)
    assert (metrics["dropped/too-small"], metrics["shards"]) == (1, 4)
    assert metrics["bytes_written"] > sum(shard.bytes for shard in prepared.manifest.shards)
    client = MlflowClient(tracking_uri=tracking.uri)
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "inputs")]
    assert steps == sorted(set(steps)), "each step once, over the interruption"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.html"]
    page = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))
    assert Path(page).read_bytes() == storage.at(prepared.path).read_bytes("report.html")
    assert not storage.at(prepared.path).exists("work/tracking.json")


def test_an_mlflow_that_is_away_does_not_stop_a_preparation(tmp_path, ray_session, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.tracking.preparation._PATIENCE_S", 1.0)
    config, storage = _corpus(tmp_path / "corpus", 6), open_storage(tmp_path / "out")
    tracking = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", request_timeout_s=1)
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        prepared = _prepare(config, storage, tracking)
    assert prepared.manifest.samples == 5
    assert "was not told: preparation report" in caplog.text
