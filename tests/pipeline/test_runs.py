"""A run remembers what it began with, its job as it is now, and which code trained it."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster import workers
from pipeline import job as jobs
from pipeline.config import JobConfig, parse_job
from pipeline.runs import load_run_job, open_run_folder, read_record
from sharding.errors import UserError
from tests.fixtures.jobs import tiny_job
from tests.pipeline.trained_run import make_trained_run


def test_a_start_records_each_change_of_the_code_and_clears_away_what_killed_writes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trained_run(tmp_path)
    begun: list[Any] = []
    monkeypatch.setattr(workers, "run_workers", lambda *arguments, **options: begun.append(options["name"]))
    monkeypatch.setattr(jobs, "Board", lambda: None)
    monkeypatch.setattr(jobs, "Watch", lambda *arguments: nullcontext())
    tracker: Any = SimpleNamespace(config=made.job.tracking, run_id=None)
    dispatcher: Any = None
    results: Any = SimpleNamespace(stop=threading.Event())
    lease: Any = SimpleNamespace(fence=None)
    made.checkpoint(4, tmp_path / "scratch")
    made.run.write_bytes("checkpoints/step-00000004-0a/state/worker-00000.safetensors", b"of a killed write")
    for commit in ("0123abc", "0123abc", "4567def"):
        monkeypatch.setattr(jobs, "environment_tags", lambda commit=commit: {"commit": commit})
        run = open_run_folder(made.job, made.root, {})  # as a new start finds it
        jobs._train(made.job, run, {}, tracker, dispatcher, Console(quiet=True), results, lease)
    assert begun == [run.key] * 3
    assert {file.path.split("/")[1] for file in made.run.list("checkpoints")} == {"step-00000004"}
    record = read_record(made.run)
    assert record is not None
    assert record["code"] == [{"commit": "0123abc"}, {"commit": "4567def"}]


def changed(job: JobConfig, **blocks: Any) -> JobConfig:
    """The job of ``make_trained_run`` with other values in its blocks."""
    tree = json.loads(job.model_dump_json())
    for name, values in blocks.items():
        tree[name] |= values
    tree["storage"] = {"url": job.storage.url}
    return parse_job(tree, "job.yaml")


def test_a_changed_evaluate_block_is_allowed_and_recorded_and_a_restart_is_no_change(tmp_path: Path) -> None:
    made = make_trained_run(tmp_path)
    for after in ("checkpoint", "checkpoint", "end", "end", "checkpoint"):
        job = changed(made.job, evaluate={"after": after})
        assert open_run_folder(job, made.root, {}).key
    record = read_record(made.run)
    assert record is not None
    assert [block["after"] for block in record["evaluate"]] == ["checkpoint", "end", "checkpoint"]
    assert record["job"]["evaluate"] == record["evaluate"][-1]
    with pytest.raises(UserError, match=r"seed was 7, now 8"):
        open_run_folder(made.job.model_copy(update={"seed": 8}), made.root, {})


def test_a_runs_address_gives_its_job_as_it_was_last(tmp_path: Path) -> None:
    made = make_trained_run(tmp_path)
    job = changed(made.job, evaluate={"after": "stage"}, checkpoints={"keep_last": 3})
    open_run_folder(job, made.root, {"later": "datasets/later-0123"})
    found = load_run_job(made.run.url)
    assert (found.name, found.seed, found.storage.url) == (job.name, job.seed, made.root.url)
    assert found.evaluate == job.evaluate
    assert found.checkpoints == job.checkpoints
    assert found.model == job.model
    assert found.train == job.train
    assert found.tracking.uri == job.tracking.uri
    held_out = found.datasets["held-out"]
    assert held_out.modality == "image"
    assert held_out.prepared == made.root.url_of("datasets/held-out-0123")  # type: ignore[union-attr]
    assert open_run_folder(found, made.root, {}).key == open_run_folder(job, made.root, {}).key
    # Moved as a whole, it is found where it is now; values may be overridden as those of a file.
    (tmp_path / "storage").rename(tmp_path / "moved")
    moved = load_run_job(
        str(tmp_path / "moved/runs/tiny"), ["evaluate.concurrent=1", "cluster.evaluations=3"]
    )
    assert moved.cluster.evaluations == 3
    assert moved.datasets["held-out"].prepared.startswith((tmp_path / "moved").as_uri())  # type: ignore[union-attr]


def test_datasets_for_evaluations_may_change_and_those_trained_on_stay_as_recorded(tmp_path: Path) -> None:
    made = make_trained_run(tmp_path)
    made.checkpoint(4, tmp_path / "scratch")
    open_run_folder(made.job, made.root, {"emoji": "datasets/emoji-new", "held-out": "datasets/held-out-new"})
    record = read_record(made.run)
    assert record is not None
    assert record["datasets"]["emoji"] == "datasets/emoji-0123"
    assert record["datasets"]["held-out"] == "datasets/held-out-new"


def test_no_secret_of_the_job_is_in_its_record(tmp_path: Path) -> None:
    tree = tiny_job("/data/raw", tmp_path / "storage")
    tree["storage"] |= {"access_key": "hunter-key", "secret_key": "hunter2"}
    tree["tracking"]["uri"] = "http://me:hunter3@tracking:5000"
    tree["cluster"] = {"environment": {"env_vars": {"TOKEN": "hunter4"}}}
    tree["datasets"]["emoji"]["source"]["path"] = "s3://bucket/images.jsonl"
    job = parse_job(tree, "job.yaml")
    made = make_trained_run(tmp_path)
    paths = {name: f"datasets/{name}" for name in job.datasets}
    open_run_folder(job, made.root.at("other"), paths)
    text = made.root.read_bytes("other/runs/tiny/run.json").decode()
    assert "hunter" not in text
    found = load_run_job(made.root.url_of("other/runs/tiny"))
    assert found.tracking.uri == "http://tracking:5000"
    assert (
        found.cluster.environment.env_vars == {}
    )  # left out, not replaced by something that looks like a value


def test_an_address_that_is_no_run_is_refused(tmp_path: Path) -> None:
    made = make_trained_run(tmp_path)
    with pytest.raises(UserError, match=r"is no run: it has no run\.json"):
        load_run_job(made.root.url)
    record = read_record(made.run)
    assert record is not None
    for damage in (
        {"job": None},
        {"job": {**record["job"], "datasets": {"emoji": {}}}},
        {"job": {**record["job"], "train": 3}},
    ):
        made.run.write_json("run.json", record | damage)
        with pytest.raises(UserError, match=r"run\.json|runs/tiny"):
            load_run_job(made.run.url)
