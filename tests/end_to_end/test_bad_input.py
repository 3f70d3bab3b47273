"""What a user gets wrong ends with one clear line and exit code 2, before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.command import Command
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.s3 import S3Server


@pytest.fixture
def tree(raw_corpus: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_job(raw_corpus, tmp_path / "storage")


def refused(verb: str, tmp_path: Path, tree: dict[str, Any], *arguments: str, **environment: str) -> str:
    """Run the verb on the job, assert exit code 2 and error lines only, and return them."""
    job = write_job(tmp_path / "job.yaml", tree)
    command = Command(verb, str(job), *arguments, log=tmp_path / "log", environment=environment)
    assert command.wait() == 2, command.output
    assert "Traceback" not in command.output
    return command.output


def test_a_valid_job_is_said_to_be_valid(tmp_path: Path, tree: dict[str, Any]) -> None:
    output = Command("validate", str(write_job(tmp_path / "job.yaml", tree)), log=tmp_path / "log").succeed()
    assert "is valid" in output
    assert "12" not in output.splitlines()[0] or "images (8 steps), mixed (4 steps)" in output


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["train"]["global_bach"] = 3
    assert "train.global_bach: unknown key; did you mean 'global_batch'?" in refused(
        "validate", tmp_path, tree
    )


def test_a_missing_corpus_names_its_path(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["datasets"]["emoji"]["source"]["path"] = str(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in refused("prepare", tmp_path, tree)


def test_an_empty_corpus_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    tree["datasets"]["emoji"]["source"]["path"] = str(tmp_path / "empty.jsonl")
    assert "empty.jsonl" in refused("prepare", tmp_path, tree)


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path, tree: dict[str, Any]) -> None:
    rows = [{"path": "gone.webp", "captions": ["nothing"], "split": "train"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["datasets"] = {"emoji": tree["datasets"]["emoji"] | {"bad_limit": 1.0}}
    tree["datasets"]["emoji"]["source"]["path"] = str(tmp_path / "rows.jsonl")
    tree["train"]["stages"] = tree["train"]["stages"][:1]
    tree["evaluate"] = {}
    assert "missing-file" in refused("prepare", tmp_path, tree)


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    command = Command("run", str(tmp_path / "missing.yaml"), log=tmp_path / "log")
    assert command.wait() == 2
    assert "missing.yaml: there is no such job file" in command.output


@pytest.mark.server
def test_a_wrong_s3_key_is_refused_without_being_printed(
    tmp_path: Path, tree: dict[str, Any], s3_server: S3Server
) -> None:
    tree["storage"] = {"url": s3_server.fresh("x")}
    wrong = s3_server.environment | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    output = refused("prepare", tmp_path, tree, **wrong)
    assert tree["storage"]["url"] in output
    assert "not-the-secret" not in output


def test_a_dashboard_port_in_use_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        tree["cluster"] = {"dashboard_port": port}
        assert str(port) in refused("prepare", tmp_path, tree)


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, tree: dict[str, Any]) -> None:
    job = write_job(tmp_path / "job.yaml", tree)
    command = Command("submit", str(job), "--address", "http://127.0.0.1:9", log=tmp_path / "log")
    assert command.wait() == 2
    assert "http://127.0.0.1:9" in command.output
    assert "Traceback" not in command.output
