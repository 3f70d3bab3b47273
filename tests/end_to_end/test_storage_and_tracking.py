"""The job on a real S3 server, tracked by a real MLflow server that dies and comes back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.runs import read_record
from sharding.storage import Storage
from tests.end_to_end.command import Command, committed, series
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.s3 import S3Server
from tests.pipeline.mlflow_server import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_the_job_runs_on_s3_while_the_mlflow_server_dies_and_comes_back(
    s3_server: S3Server, raw_corpus: Path, tmp_path: Path
) -> None:
    server = MlflowServer(tmp_path)
    server.start()
    try:
        tree = tiny_job(raw_corpus, s3_server.fresh("jobs"), name="on-s3", tracking=tmp_path)
        del tree["datasets"]["clips"], tree["train"]["stages"][1]
        tree["train"]["stages"][0] |= {"steps": 20, "checkpoint_every": 5}
        tree["train"] |= {"workers": 1, "cache_mb": 64, "loader_processes": 1}
        tree["tracking"]["uri"] = server.uri
        job = write_job(tmp_path / "job.yaml", tree)
        run = Storage(s3_server.config(tree["storage"]["url"])).at("runs/on-s3")
        command = Command("run", str(job), log=tmp_path / "log", environment=s3_server.environment)
        command.wait_until(lambda: len(committed(run)) >= 1)
        server.kill()
        command.wait_until(lambda: len(committed(run)) >= 3)  # the training does not wait for the server
        server.start()
        output = command.succeed()
        assert s3_server.secret_key not in output

        record = read_record(run)
        assert record is not None
        steps = [step for step, _ in series(server.uri, record["tracking_run"], "loss/total")]
        assert steps == list(range(1, 21)), "every step once, those of the outage included"
        assert [c.step for c in committed(run)] == [5, 10, 15, 20]

        client = MlflowClient(tracking_uri=server.uri)
        deadline = time.monotonic() + 30
        while (
            client.get_run(record["tracking_run"]).info.status != "FINISHED" and time.monotonic() < deadline
        ):
            time.sleep(0.5)
        parent = client.get_run(record["tracking_run"])
        assert parent.info.status == "FINISHED"
        assert not any(
            s3_server.secret_key in value for value in {**parent.data.params, **parent.data.tags}.values()
        )
        models = client.search_logged_models([parent.info.experiment_id])
        assert sorted(int(model.tags["step"]) for model in models) == [5, 10, 15, 20]
        ranked = client.search_logged_models(
            [parent.info.experiment_id],
            order_by=[{"field_name": "metrics.held-out/t2i_R10", "ascending": False}],
        )
        values = [next(m.value for m in model.metrics if m.key == "held-out/t2i_R10") for model in ranked]
        assert values == sorted(values, reverse=True)
        assert len(values) == 4
    finally:
        server.kill()
