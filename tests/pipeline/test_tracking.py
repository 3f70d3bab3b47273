"""What is logged arrives once, whatever happens to the server or to the process that logs."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, SecretStr, ValidationError

from pipeline.tracking import (
    CheckpointEntry,
    EvaluationEntry,
    MetricLogger,
    RunHandle,
    Tracker,
    TrackingConfig,
    environment_tags,
    flatten_params,
    open_run,
)
from pipeline.tracking.connection import connect
from pipeline.tracking.links import run_page
from pipeline.tracking.results import RunResults
from pipeline.tracking.runs import find_run
from sharding.errors import UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.mlflow_server import MlflowServer, free_port


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with nothing in it: making one takes it longer than most tests do."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(TrackingConfig(uri=f"sqlite:///{path}")).search_experiments()
    return path


@pytest.fixture
def embedded(empty_store: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", flush_s=0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    instance = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    instance.start()
    yield instance
    instance.kill()


@pytest.fixture
def spool(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "undelivered")


def history(config: TrackingConfig, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in connect(config).get_metric_history(run_id, key))


def new_run(config: TrackingConfig, key: str = "run-1", **arguments: Any) -> str:
    return open_run(config, name="a run", key=key, params={}, tags={}, **arguments).run_id


CHECKPOINTS = [
    CheckpointEntry(step, 0, f"file:///runs/checkpoints/step-{step:08d}", f"{step:02d}" * 32)
    for step in (10, 20, 30)
]


def evaluation(
    checkpoint: CheckpointEntry, value: float, error: str | None = None, **options: Any
) -> EvaluationEntry:
    metrics = {} if error else {"t2i_R10": value, "i2t_R10": value / 2}
    return EvaluationEntry(
        checkpoint, "emoji", "1.abcd", "held-out", "ef" * 32, metrics, 1000.0, 1001.5, error=error, **options
    )


def aliases(config: TrackingConfig, key: str) -> dict[str, int]:
    """The step that each alias of a run is on."""
    client = connect(config)
    found = client.get_registered_model(key).aliases
    return {alias: int(client.get_model_version_by_alias(key, alias).tags["step"]) for alias in found}


def test_metrics_of_every_step_arrive_once(embedded: TrackingConfig) -> None:
    run_id = new_run(embedded)
    logger = MetricLogger(embedded, "run-1", run_id=run_id)
    for step in range(1, 1201):
        logger.log(step, {"loss": 1 / step, "R@1": 0.5})
    assert logger.close(30) == 0
    assert history(embedded, run_id, "loss") == [(step, 1 / step) for step in range(1, 1201)]
    assert len(history(embedded, run_id, "R_1")) == 1200
    memory = history(embedded, run_id, "system/worker_memory_gib")
    assert memory
    assert 0.01 < memory[0][1] < 64


def test_log_does_not_wait_for_the_server(embedded: TrackingConfig) -> None:
    with socket.socket() as silent:  # accepts and never answers: every request hangs until its time-out
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _log_against_a_silent_server(embedded.model_copy(update={"uri": uri, "request_timeout_s": 1}))


def _log_against_a_silent_server(config: TrackingConfig) -> None:
    logger = MetricLogger(config, "run-1")
    for step in range(5000):  # returns with nothing delivered: each request would wait for its time-out
        logger.log(step, {"loss": 1.0})
    assert 5000 <= logger.close(0.5) < 5200  # a few measurements of memory among them


def test_a_restart_from_an_older_checkpoint_leaves_no_duplicate_steps(embedded: TrackingConfig) -> None:
    run_id = new_run(embedded)
    first = MetricLogger(embedded, "run-1", run_id=run_id)
    for step in range(1, 131):
        first.log(step, {"loss": float(step)})
    first.log(100, {"checkpoint_s": 2.0})
    assert first.close(30) == 0
    assert new_run(embedded, existing_run_id=run_id) == run_id
    second = MetricLogger(embedded, "run-1", run_id=run_id)
    for step in range(101, 151):
        second.log(step, {"loss": -float(step)})
    second.log(150, {"checkpoint_s": 2.5})
    assert second.close(30) == 0
    expected = [(step, float(step)) for step in range(1, 131)] + [
        (step, -float(step)) for step in range(131, 151)
    ]
    assert history(embedded, run_id, "loss") == expected
    assert history(embedded, run_id, "checkpoint_s") == [(100, 2.0), (150, 2.5)]


def test_the_run_is_found_again_even_if_its_id_was_never_noted(embedded: TrackingConfig) -> None:
    assert new_run(embedded, key="a") == new_run(embedded, key="a")
    assert new_run(embedded, key="a") != new_run(embedded, key="b")
    assert new_run(embedded, key="a", existing_run_id="0" * 32) == new_run(embedded, key="a")


@pytest.mark.parametrize("resumed", [True, False])
def test_what_was_undelivered_at_the_end_is_kept_and_sent_by_the_next_life(
    embedded: TrackingConfig, spool: Storage, caplog: pytest.LogCaptureFixture, resumed: bool
) -> None:
    run_id = new_run(embedded)
    away = embedded.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}"})
    first = MetricLogger(away, "run-1", run_id=run_id, spool=spool)
    for step in range(1, 51):
        first.log(step, {"loss": float(step)})
    time.sleep(0.5)
    assert first.flush(5.0) is False  # before a checkpoint: the steps must outlive a kill
    kept = list(spool.list())
    assert kept
    first.log(51, {"loss": 51.0})
    with caplog.at_level(logging.WARNING):
        assert 51 <= first.close(1.0) < 60
    assert "metric values; they are kept in" in caplog.text
    assert spool.url in caplog.text

    if resumed:
        second = MetricLogger(embedded, "run-1", run_id=run_id, spool=spool)
        for step in range(50, 52):
            second.log(step, {"loss": float(step)})
        assert second.close(30) == 0
    else:  # the training was complete
        tracker = Tracker(embedded, name="a run", key="run-1", params={}, tags={})
        tracker.leftovers(spool)
        assert tracker.finish(timeout_s=60)
    assert history(embedded, run_id, "loss") == [(step, float(step)) for step in range(1, 52)]
    assert list(spool.list()) == []


def test_memory_is_bounded_while_the_server_is_away(embedded: TrackingConfig, spool: Storage) -> None:
    config = embedded.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}", "buffered": 1000})
    logger = MetricLogger(config, "run-1", run_id="0" * 32, spool=spool)
    for step in range(3000):
        logger.log(step, {"loss": 1.0, "rate": 2.0})
        assert logger._points <= 1000
        if step % 200 == 0:
            time.sleep(0.1)
    assert 6000 <= logger.close(1.0) < 6200  # those of the system among them
    without = MetricLogger(config, "run-1", run_id="0" * 32)
    for step in range(3000):
        without.log(step, {"loss": 1.0})
    assert 3000 <= without.close(0.5) < 3200


def test_an_unreachable_server_is_one_warning_and_no_error(
    embedded: TrackingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = embedded.model_copy(update={"uri": f"http://user:hidden@127.0.0.1:{free_port()}"})
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(config, name="a", key="k", params={}, tags={}, wait_s=20)
        tracker.checkpoint(CHECKPOINTS[0])
        assert tracker.run_id is None
        assert tracker.finish(timeout_s=2.0) is False
    lines = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
    assert len(lines) == 1
    assert "Connection refused" in lines[0]
    assert "the run goes on" in lines[0]
    assert "checkpoint of step 10" in caplog.text
    assert "hidden" not in caplog.text


def test_checkpoints_and_evaluations_are_shown_once_and_ranked(embedded: TrackingConfig) -> None:
    for _ in range(2):  # the second time is the start after the driver died before it could tell
        tracker = Tracker(embedded, name="a", key="k", params={"seed": "1"}, tags={"x": "y"})
        for checkpoint, value in zip(CHECKPOINTS, (0.1, 0.9, 0.4), strict=True):
            tracker.checkpoint(checkpoint)
            tracker.evaluation(evaluation(checkpoint, value))
        tracker.evaluation(
            EvaluationEntry(CHECKPOINTS[0], "video", "1.x", "clips", "ab" * 32, {}, 1.0, 2.0, error="broke")
        )
        tracker.best(CHECKPOINTS[0], "emoji/t2i_R10", chosen=True)
        tracker.best(CHECKPOINTS[1], "emoji/t2i_R10", chosen=True)
        tracker.report("<html>report</html>", "report")
        assert tracker.finish(timeout_s=60)
    assert tracker.handle is not None
    client, handle = connect(embedded), tracker.handle
    ranked = client.search_logged_models(
        [handle.experiment_id],
        filter_string=f"source_run_id = '{handle.run_id}'",
        order_by=[{"field_name": "metrics.emoji/t2i_R10", "ascending": False, "dataset_name": "held-out"}],
    )
    assert [model.tags["step"] for model in ranked] == ["20", "30", "10"]
    assert ranked[0].tags["checkpoint"] == CHECKPOINTS[1].url
    children = client.search_runs(
        [handle.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{handle.run_id}'"
    )
    assert sorted((c.info.run_name, c.info.status) for c in children) == [
        ("emoji at step 10", "FINISHED"),
        ("emoji at step 20", "FINISHED"),
        ("emoji at step 30", "FINISHED"),
        ("video at step 10", "FAILED"),
    ]
    link = f"(#/experiments/{handle.experiment_id}/runs/{handle.run_id}/artifacts/evaluation/report.html)"
    assert all(link in child.data.tags["mlflow.note.content"] for child in children)
    curve = history(embedded, handle.run_id, "emoji/t2i_R10")
    assert curve == [(10, 0.1), (20, 0.9), (30, 0.4)]
    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["best_checkpoint"] == CHECKPOINTS[1].url
    assert {f.path for f in client.list_artifacts(handle.run_id, "evaluation")} == {
        "evaluation/report.html",
        "evaluation/report.txt",
    }


def check_aliases(config: TrackingConfig, key: str) -> None:
    """Each metric has its own; they move, in a second life of the driver too, and come back."""
    for life in range(2):
        tracker = Tracker(config, name="a", key=key, params={}, tags={})
        tracker.best(CHECKPOINTS[0], "emoji/t2i_R10", chosen=True)
        tracker.best(CHECKPOINTS[0], "emoji/t2i_R@1")
        tracker.best(CHECKPOINTS[1], "emoji/t2i_R10", chosen=True)
        if life == 1:
            tracker.best(CHECKPOINTS[2], "emoji/t2i_R@1")
        assert tracker.finish(timeout_s=60)
        first = {0: 10, 1: 30}[life]
        assert aliases(config, key) == {"best": 20, "best-emoji-t2i_R10": 20, "best-emoji-t2i_R_1": first}
    client = connect(config)
    versions = client.search_model_versions(f"name = '{key}'")
    assert sorted(int(v.tags["step"]) for v in versions) == [10, 20, 30]  # one a checkpoint, over both lives
    assert tracker.handle is not None
    models = client.search_logged_models([tracker.handle.experiment_id])
    by_step = {
        model.tags["step"]: model.model_id for model in models if model.source_run_id == tracker.run_id
    }
    assert {v.tags["step"]: v.tags["logged_model"] for v in versions} == by_step


def test_the_alias_of_the_best_by_each_metric_moves(embedded: TrackingConfig) -> None:
    check_aliases(embedded, "run-1")


@pytest.mark.server
@pytest.mark.slow
def test_the_alias_of_the_best_by_each_metric_moves_on_a_server(server: MlflowServer) -> None:
    check_aliases(TrackingConfig(uri=server.uri), "aliases")


def test_an_alias_is_never_away_while_it_moves(
    embedded: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is sent to move it, after each single write it is on one of the two."""
    tracker = Tracker(embedded, name="a", key="run-1", params={}, tags={})
    tracker.best(CHECKPOINTS[0], "emoji/R1")
    assert tracker.finish(timeout_s=60)
    seen: list[dict[str, int]] = []
    store = type(connect(embedded)._get_registry_client().store)
    for name in ("set_registered_model_alias", "delete_registered_model_alias", "create_model_version"):
        real = getattr(store, name)

        def watched(self: Any, *arguments: Any, real: Any = real, **options: Any) -> Any:
            answer = real(self, *arguments, **options)
            seen.append(aliases(embedded, "run-1"))
            return answer

        monkeypatch.setattr(store, name, watched)
    again = Tracker(embedded, name="a", key="run-1", params={}, tags={})
    again.best(CHECKPOINTS[1], "emoji/R1")
    assert again.finish(timeout_s=60)
    assert seen == [{"best-emoji-R1": 10}, {"best-emoji-R1": 20}]


def test_a_registered_model_that_somebody_deleted_is_made_again(embedded: TrackingConfig) -> None:
    tracker = Tracker(embedded, name="a", key="run-1", params={}, tags={})
    tracker.best(CHECKPOINTS[0], "emoji/R1")
    until_told(tracker)
    connect(embedded).delete_registered_model("run-1")
    tracker.best(CHECKPOINTS[1], "emoji/R1")
    tracker.tag("regression.emoji/R1", "fell")
    assert tracker.finish(timeout_s=60)
    assert aliases(embedded, "run-1") == {"best-emoji-R1": 20}
    assert tracker.run_id is not None
    assert connect(embedded).get_run(tracker.run_id).data.tags["regression.emoji/R1"] == "fell"


def until_told(tracker: Tracker) -> None:
    deadline = time.monotonic() + 60
    while tracker._actions:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_child_run_has_intervals_and_what_was_measured_with_and_charts_of_the_parent_do_not(
    embedded: TrackingConfig,
) -> None:
    tracker = Tracker(embedded, name="a", key="run-1", params={}, tags={})
    params = {"seed": 7, "data_digest": "ef" * 32, "settings.limit": None, "details.answers": [1, "two"]}
    entry = evaluation(CHECKPOINTS[0], 0.5, intervals={"t2i_R10": (0.4, 0.6)}, params=params)
    tracker.evaluation(entry)
    unread = EvaluationEntry(CHECKPOINTS[0], "vqa", "1.x", "vqa", "", {}, 1.0, 2.0, error="no annotations")
    tracker.evaluation(unread)
    assert tracker.finish(timeout_s=60)
    handle = tracker.handle
    assert handle is not None
    client = connect(embedded)
    children = client.search_runs(
        [handle.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{handle.run_id}'"
    )
    child = next(one for one in children if one.data.tags["task"] == "emoji")
    assert child.data.metrics == {
        "emoji/t2i_R10": 0.5,
        "emoji/i2t_R10": 0.25,
        "emoji/t2i_R10_low": 0.4,
        "emoji/t2i_R10_high": 0.6,
    }
    assert child.data.params == {
        "seed": "7",
        "data_digest": "ef" * 32,
        "settings.limit": "null",
        "details.answers": '[1, "two"]',
    }
    curves = {"emoji/t2i_R10", "emoji/i2t_R10"}
    assert set(client.get_run(handle.run_id).data.metrics) == curves
    (model,) = client.search_logged_models([handle.experiment_id])
    assert {metric.key for metric in model.metrics} == curves
    assert sorted(one.info.status for one in children) == ["FAILED", "FINISHED"]


def test_of_reports_that_wait_for_the_server_the_newest_alone_is_sent(
    embedded: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    store, away = RunResults.log_report, [True]

    def log_report(results: RunResults, html: str, text: str) -> None:
        if away[0]:
            raise ConnectionError("away")
        sent.append(html)
        store(results, html, text)

    monkeypatch.setattr(RunResults, "log_report", log_report)
    tracker = Tracker(embedded, name="a", key="k", params={}, tags={})
    for number in range(20):
        tracker.report(f"<html>{number}</html>", str(number))
        assert len(tracker._actions) <= 2
    away[0] = False
    tracker.report("<html>last</html>", "last")
    assert tracker.finish(timeout_s=60)
    assert set(sent) == {"<html>last</html>"}
    assert tracker.run_id is not None
    stored = connect(embedded).download_artifacts(tracker.run_id, "evaluation/report.html", str(tmp_path))
    assert Path(stored).read_text() == "<html>last</html>"


def test_the_page_of_a_run_is_an_address_where_there_is_a_server_and_a_command_elsewhere() -> None:
    on_server = RunHandle("key", "abc", "7", "http://127.0.0.1:5000/")
    assert run_page(on_server) == "http://127.0.0.1:5000/#/experiments/7/runs/abc"
    embedded = RunHandle("key", "abc", "7", "sqlite:////tmp/mlflow.db")
    assert run_page(embedded) == "mlflow ui --backend-store-uri sqlite:////tmp/mlflow.db"


def test_parameters_hold_no_secret_and_a_changed_one_is_a_tag(embedded: TrackingConfig) -> None:
    class Inner(BaseModel):
        key: SecretStr = SecretStr("hunter2")
        proxy: str = "http://me:hunter2@proxy:80"
        long: str = "x" * 9000

    class Outer(BaseModel):
        seed: int = 3
        inner: Inner = Inner()
        stages: list[dict[str, int]] = [{"steps": 5}, {"steps": 6}]
        nothing: None = None

    params = flatten_params(Outer())
    assert params["seed"] == "3"
    assert params["stages.1.steps"] == "6"
    assert params["inner.proxy"] == "http://***@proxy:80"
    assert "hunter2" not in str(params)
    handle = open_run(embedded, name="a", key="k", params=params, tags=environment_tags())
    open_run(embedded, name="a", key="k", params={**params, "seed": "4", "new": "1"}, tags={})
    data = connect(embedded).get_run(handle.run_id).data
    assert (data.params["seed"], data.params["new"], data.tags["changed.seed"]) == ("3", "1", "4")
    assert len(data.params["inner.long"]) == 6000
    assert data.tags["version.torch"]


def test_a_store_that_mlflow_cannot_open_is_refused_before_anything_starts() -> None:
    for uri in ("file:///tmp/runs", "./mlruns", "htp://host"):
        with pytest.raises(ValidationError, match="sqlite:///"):
            TrackingConfig(uri=uri)
    with pytest.raises(ValidationError) as error:
        TrackingConfig(uri="ftp://me:hunter2@host")
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in repr(TrackingConfig(uri="http://me:hunter2@host"))


@pytest.mark.parametrize(
    "uri",
    [
        "mysql:u:hunter2@host/db",
        "http:/u:hunter2@host",
        "http://u:hunter2/x@host:5000",
        "http://host:hunter2",
        "http://[hunter2",
        "https://",
        "postgresql://u:hun@ter2@host/db",
        "postgresql://u:x@host:hunter2/db",
        "postgresql://u:p@host/hunter2@db",
        "redis://u:hunter2@host",
        "http://host/\nhunter2",
        "x",
    ],
)
def test_an_address_that_cannot_be_read_is_refused_without_quoting_it(uri: str) -> None:
    with pytest.raises(ValidationError) as error:
        TrackingConfig(uri=uri)
    assert "hun" not in str(error.value)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: ") as refused:
        TrackingConfig().resolved(Path("/x"), {"MLFLOW_TRACKING_URI": uri})
    assert "hun" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "postgresql://me:q7X/SECRET+zz=@host:5432/db",
            "mysql+pymysql://u%40corp:p SECRET?d@h/db",
            "databricks",
        ),
        *("http://team:a@SECRET@host:5000", "http://[::1]:5000", "databricks://profile", "sqlite:///a@b.db"),
        *("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3DSECRET", "http://host/a@b"),
    ],
)
def test_what_sqlalchemy_and_mlflow_take_is_taken_and_shown_without_its_password(uri: str) -> None:
    config = TrackingConfig(uri=f" {uri}\n")
    assert config.uri == uri
    assert "SECRET" not in config.address


def test_a_relative_store_is_the_same_file_for_every_process(tmp_path: Path) -> None:
    assert TrackingConfig().resolved(tmp_path, {}).uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert TrackingConfig(uri="sqlite:///a/b.db").resolved(tmp_path).uri == f"sqlite:///{tmp_path}/a/b.db"
    address = f"sqlite:///file:{tmp_path}/b.db?uri=true"
    assert TrackingConfig(uri=address).resolved(Path("/x")).uri == address


def test_mlflows_variables_stand_in_for_what_the_block_leaves_out(tmp_path: Path) -> None:
    said = {"MLFLOW_TRACKING_URI": "http://me:hunter2@host:5000", "MLFLOW_EXPERIMENT_NAME": "team"}

    def found(environment: dict[str, str], **block: Any) -> tuple[str | None, str | None, str | None]:
        config = TrackingConfig(**block).resolved(tmp_path, environment)
        assert config.resolved(Path("/elsewhere"), {"MLFLOW_TRACKING_URI": "http://other"}).uri == config.uri
        return config.uri, config.experiment, config.experiment_id

    uri, own = said["MLFLOW_TRACKING_URI"], f"sqlite:///{tmp_path}/mlflow.db"
    assert found(said) == (uri, "team", None)
    assert found(said, uri="http://mine") == ("http://mine", "team", None)
    assert found(said, experiment="mine") == (uri, "mine", None)
    assert found({"MLFLOW_EXPERIMENT_ID": "7"}) == (own, None, "7")
    assert found(said | {"MLFLOW_EXPERIMENT_ID": "7"}) == (uri, "team", None)
    assert found({"MLFLOW_EXPERIMENT_ID": "7"}, experiment="mine") == (own, "mine", None)
    assert found({"MLFLOW_TRACKING_URI": " ", "MLFLOW_EXPERIMENT_NAME": ""}) == (own, "glscl", None)
    # A run's record has the address without credentials; the variable of the same address has them.
    assert found(said, uri="http://host:5000") == (uri, "team", None)
    assert found(said, uri="http://host:5001") == ("http://host:5001", "team", None)
    with pytest.raises(UserError, match="MLFLOW_EXPERIMENT_NAME: is longer than"):
        TrackingConfig().resolved(tmp_path, {"MLFLOW_EXPERIMENT_NAME": "x" * 501})
    with pytest.raises(ValidationError, match="not both"):
        TrackingConfig(experiment="a", experiment_id="1")


def test_workers_get_the_drivers_variables_of_the_connection_and_keep_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = {"MLFLOW_TRACKING_PASSWORD": "hunter2", "MLFLOW_TRACKING_USERNAME": "driver", "PATH": "/x"}
    config = pickle.loads(pickle.dumps(TrackingConfig().resolved(tmp_path, driver)))  # noqa: S301 - made here
    assert "hunter2" not in repr(config) + config.model_dump_json() + str(flatten_params(config))
    monkeypatch.setattr(os, "environ", {"MLFLOW_TRACKING_USERNAME": "worker", "PATH": "/y"})
    config.apply_variables()
    assert os.environ == driver | {"MLFLOW_TRACKING_USERNAME": "worker", "PATH": "/y"}


def test_the_registry_is_where_the_runs_are(
    embedded: TrackingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/registry.db")
    assert connect(embedded)._registry_uri == embedded.uri


def test_an_experiment_is_found_by_its_id(embedded: TrackingConfig) -> None:
    number = connect(embedded).create_experiment("by hand")
    config = TrackingConfig(uri=embedded.uri, experiment_id=number)
    handle = open_run(config, name="a", key="by-id", params={}, tags={})
    assert handle.experiment_id == number
    assert find_run(connect(config), config, "by-id") == handle.run_id
    with pytest.raises(MlflowException, match="No Experiment with id=77"):
        open_run(config.model_copy(update={"experiment_id": "77"}), name="a", key="k", params={}, tags={})


def test_a_store_that_cannot_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    def refusal(path: str) -> str:
        with pytest.raises(UserError) as caught:
            TrackingConfig(uri=f"sqlite:///{tmp_path}/{path}").check()
        return str(caught.value)

    (tmp_path / "text.db").write_text("hello, this is no database")
    (tmp_path / "folder.db").mkdir()
    assert "is no SQLite database" in refusal("text.db")
    assert "cannot be written" in refusal("folder.db")
    assert "cannot be made, since" in refusal("text.db/x/mlflow.db")
    TrackingConfig(uri=f"sqlite:///{tmp_path}/new/mlflow.db").check()
    assert not (tmp_path / "new").exists()


@pytest.mark.server
@pytest.mark.slow
def test_a_server_killed_during_the_run_misses_no_step_and_gets_none_twice(
    server: MlflowServer, spool: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(uri=server.uri, flush_s=0.05, request_timeout_s=5)
    tracker = Tracker(config, name="a", key="killed", params={"seed": "1"}, tags={})
    assert tracker.run_id is not None
    logger = MetricLogger(config, "killed", run_id=tracker.run_id, spool=spool)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 301):
            logger.log(step, {"loss": float(step)})
            time.sleep(0.005)
            if step == 100:
                server.kill()  # batches are in flight
                tracker.checkpoint(CHECKPOINTS[0])
                tracker.evaluation(evaluation(CHECKPOINTS[0], 0.5))
            if step == 200:
                assert logger.flush(1.0) is False  # a checkpoint while the server is away
        server.start()
        assert logger.close(60) == 0
        assert tracker.finish(timeout_s=60)
    assert history(config, tracker.run_id, "loss") == [(step, float(step)) for step in range(1, 301)]
    assert history(config, tracker.run_id, "emoji/t2i_R10") == [(10, 0.5)]
    assert caplog.text.count("metrics are buffered") == 1
    assert list(spool.list()) == []


@pytest.mark.server
@pytest.mark.slow
def test_a_run_that_started_without_the_server_is_made_when_it_comes(tmp_path: Path, spool: Storage) -> None:
    late = MlflowServer(tmp_path)
    config = TrackingConfig(uri=late.uri, flush_s=0.1, request_timeout_s=5)
    tracker = Tracker(config, name="a", key="late", params={"seed": "1"}, tags={}, wait_s=10)
    logger = MetricLogger(config, "late", spool=spool)
    for step in range(1, 21):
        logger.log(step, {"loss": float(step)})
    assert tracker.run_id is None
    try:
        tracker.report("<html>report</html>", "report")
        late.start()
        assert tracker.finish(timeout_s=600)
        assert tracker.run_id is not None
        assert logger.close(600) == 0
        assert history(config, tracker.run_id, "loss") == [(step, float(step)) for step in range(1, 21)]
        assert len(connect(config).list_artifacts(tracker.run_id, "evaluation")) == 2
    finally:
        late.kill()
