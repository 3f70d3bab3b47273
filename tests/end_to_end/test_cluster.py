"""A job sent with ``glscl submit`` to a real head and a second raylet, and followed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.evaluation.ledger import Ledger
from sharding.storage import open_storage
from tests.end_to_end.command import Command, committed
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.ray_cluster import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_a_submitted_job_prepares_trains_on_both_raylets_and_evaluates(
    ray_cluster: RayCluster, raw_corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_job(raw_corpus, tmp_path / "storage", name="submitted")
    tree["train"]["micro_batch"] = 4  # each worker computes its 8 samples in two parts
    job = write_job(tmp_path / "job.yaml", tree)
    address = ("--address", ray_cluster.dashboard)
    overrides = ("--set", "train.stages.1.steps=3")
    Command("submit", str(job), *address, "--id", "the-job", *overrides, log=tmp_path / "submit").succeed()

    again = Command("submit", str(job), *address, "--id", "the-job", log=tmp_path / "again")
    assert again.wait() == 2
    assert "the-job" in again.output

    followed = Command("logs", "-f", "the-job", *address, log=tmp_path / "logs").succeed()
    assert "ITM R@1" in followed, followed[-3000:]
    assert "SUCCEEDED" in Command("status", "the-job", *address, log=tmp_path / "status").succeed()

    run = open_storage(tmp_path / "storage").at("runs/submitted")
    checkpoints = committed(run)
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 8, 11]
    assert [checkpoint.record["nodes"] for checkpoint in checkpoints] == [2, 2, 2]
    assert len(Ledger(run).outcomes()) == 3


def test_a_stopped_job_is_stopped_and_a_missing_one_is_named(
    ray_cluster: RayCluster, raw_corpus: Path, tmp_path: Path
) -> None:
    tree = tiny_job(raw_corpus, tmp_path / "storage", name="stopped")
    tree["train"]["stages"][0]["steps"] = 100_000
    job = write_job(tmp_path / "job.yaml", tree)
    address = ("--address", ray_cluster.dashboard)
    Command("submit", str(job), *address, "--id", "long-job", log=tmp_path / "submit").succeed()
    run = open_storage(tmp_path / "storage").at("runs/stopped")
    follow = Command("logs", "-f", "long-job", *address, log=tmp_path / "logs")
    follow.wait_until(lambda: len(committed(run)) >= 1)
    assert "STOPPED" in Command("stop", "long-job", *address, log=tmp_path / "stop").succeed()
    assert follow.wait(60) == 0
    missing = Command("status", "no-such-job", *address, log=tmp_path / "missing")
    assert missing.wait() == 2
    assert "no-such-job" in missing.output
