"""What a user gets wrong ends with one clear line and exit code 2, before anything starts."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import job as job_module
from tests.end_to_end.command import Command
from tests.end_to_end.conftest import Glscl
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.s3 import S3Server


@pytest.fixture
def tree(raw_corpus: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_job(raw_corpus, tmp_path / "storage")


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; two tests start one of their own."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was to start")

    monkeypatch.setattr(job_module, "session", refuse)


@pytest.fixture
def refused(glscl: Glscl, tmp_path: Path, tree: dict[str, Any]) -> Callable[[str], str]:
    """Run the verb on the job, assert exit code 2 and error lines only, and return them."""

    def call(verb: str) -> str:
        code, output = glscl(verb, write_job(tmp_path / "job.yaml", tree))
        assert code == 2, output
        assert all(line.startswith("error: ") for line in output.splitlines()), output
        return output

    return call


def test_a_valid_job_is_said_to_be_valid(glscl: Glscl, tmp_path: Path, tree: dict[str, Any]) -> None:
    code, output = glscl("validate", write_job(tmp_path / "job.yaml", tree))
    assert code == 0
    assert "is valid" in output
    assert "images (8 steps), mixed (4 steps)" in output


def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    refused: Callable[[str], str], tree: dict[str, Any]
) -> None:
    tree["train"]["global_bach"] = 3
    assert "train.global_bach: unknown key; did you mean 'global_batch'?" in refused("validate")


@pytest.mark.parametrize("verb", ["prepare", "run"])
def test_a_missing_corpus_names_its_path(
    verb: str, refused: Callable[[str], str], tmp_path: Path, tree: dict[str, Any]
) -> None:
    tree["datasets"]["emoji"]["source"]["path"] = str(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in refused(verb)


def test_an_empty_corpus_is_refused(
    refused: Callable[[str], str], tmp_path: Path, tree: dict[str, Any]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    tree["datasets"]["clips"]["source"]["path"] = str(tmp_path / "empty.jsonl")
    assert "empty.jsonl" in refused("prepare")


@pytest.mark.slow
def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path, tree: dict[str, Any]) -> None:
    rows = [{"path": "gone.webp", "captions": ["nothing"], "split": "train"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["datasets"] = {"emoji": tree["datasets"]["emoji"] | {"bad_limit": 1.0}}
    tree["datasets"]["emoji"]["source"]["path"] = str(tmp_path / "rows.jsonl")
    tree["train"]["stages"] = tree["train"]["stages"][:1]
    tree["evaluate"] = {}
    assert "missing-file" in refused_by_a_process("prepare", tmp_path, tree)


def test_a_missing_job_file_is_named(glscl: Glscl, tmp_path: Path) -> None:
    code, output = glscl("run", tmp_path / "missing.yaml")
    assert code == 2
    assert "missing.yaml: there is no such job file" in output


@pytest.mark.server
def test_a_wrong_s3_key_is_refused_without_being_printed(
    refused: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tree: dict[str, Any],
    s3_server: S3Server,
) -> None:
    tree["storage"] = {"url": s3_server.fresh("x")}
    for name, value in (s3_server.environment | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}).items():
        monkeypatch.setenv(name, value)
    output = refused("prepare")
    assert tree["storage"]["url"] in output
    assert "not-the-secret" not in output


def test_a_dashboard_port_in_use_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        tree["cluster"] = {"dashboard_port": port}
        assert str(port) in refused_by_a_process("prepare", tmp_path, tree)


def test_a_cluster_that_does_not_answer_is_named(glscl: Glscl, tmp_path: Path, tree: dict[str, Any]) -> None:
    job = write_job(tmp_path / "job.yaml", tree)
    code, output = glscl("submit", job, "--address", "http://127.0.0.1:9")
    assert code == 2
    assert output.startswith("error: ")
    assert "http://127.0.0.1:9" in output


def refused_by_a_process(verb: str, tmp_path: Path, tree: dict[str, Any]) -> str:
    """The same by ``glscl`` as a user starts it; nothing that it started lives on."""
    command = Command(verb, str(write_job(tmp_path / "job.yaml", tree)), log=tmp_path / "log")
    assert command.wait() == 2, command.output
    assert "Traceback" not in command.output
    assert command.left_over() == []
    return command.output
