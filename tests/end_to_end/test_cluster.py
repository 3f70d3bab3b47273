"""A job sent with ``glscl submit`` to a real head and a second raylet, and followed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.ledger import Ledger
from sharding.storage import open_storage
from tests.end_to_end.command import Command, committed
from tests.end_to_end.conftest import Glscl
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.ray_cluster import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.server]


def small_job(raw: Path, storage: Path, name: str) -> dict[str, Any]:
    """Of stills alone, in one stage."""
    tree = tiny_job(raw, storage, name=name)
    del tree["datasets"]["clips"], tree["train"]["stages"][1]
    return tree


def test_a_submitted_job_prepares_trains_on_both_raylets_and_evaluates(
    glscl: Glscl, ray_cluster: RayCluster, raw_corpus: Path, tmp_path: Path
) -> None:
    tree = small_job(raw_corpus, tmp_path / "storage", "submitted")
    tree["train"]["micro_batch"] = 4  # each worker computes its 8 samples in two parts
    job = write_job(tmp_path / "job.yaml", tree)
    address = ("--address", ray_cluster.dashboard)
    overrides = ("--set", "train.stages.0.steps=7")
    code, output = glscl("submit", job, *address, "--id", "the-job", *overrides)
    assert code == 0, output

    code, output = glscl("submit", job, *address, "--id", "the-job")
    assert code == 2
    assert "the-job" in output

    followed = Command("logs", "-f", "the-job", *address, log=tmp_path / "logs").succeed()
    assert "ITM R@1" in followed, followed[-3000:]
    assert "SUCCEEDED" in glscl("status", "the-job", *address)[1]

    run = open_storage(tmp_path / "storage").at("runs/submitted")
    checkpoints = committed(run)
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 7]
    assert [checkpoint.record["nodes"] for checkpoint in checkpoints] == [2, 2]
    assert len(Ledger(run).outcomes()) == 2


def test_a_stopped_job_is_stopped_and_a_missing_one_is_named(
    glscl: Glscl, ray_cluster: RayCluster, raw_corpus: Path, tmp_path: Path
) -> None:
    tree = small_job(raw_corpus, tmp_path / "storage", "stopped")
    del tree["datasets"]["held-out"], tree["evaluate"]
    tree["train"]["workers"] = 1
    tree["train"]["stages"][0]["steps"] = 100_000
    job = write_job(tmp_path / "job.yaml", tree)
    address = ("--address", ray_cluster.dashboard)
    assert glscl("submit", job, *address, "--id", "long-job")[0] == 0
    run = open_storage(tmp_path / "storage").at("runs/stopped")
    follow = Command("logs", "-f", "long-job", *address, log=tmp_path / "logs")
    follow.wait_until(lambda: len(committed(run)) >= 1)
    assert "STOPPED" in glscl("stop", "long-job", *address)[1]
    assert follow.wait() == 0
    code, output = glscl("status", "no-such-job", *address)
    assert code == 2
    assert "no-such-job" in output
