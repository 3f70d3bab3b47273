"""A run that loses nodes goes on with fewer workers, and grows when they are back: same batches, same losses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs import read_record
from pipeline.training.checkpoints import Checkpoint
from sharding.storage import open_storage
from tests.chaos.scene import processes
from tests.end_to_end.command import Command, committed, series
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.ray_cluster import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.server]

_STEPS = 160
# A group of another size adds up in another order, by an ulp (6e-8) or so a step; AdamW lifts that noise where a
# gradient vanishes, so that runs part slowly. Measured over these steps: 2.5e-7 at most.
_RATE, _TOLERANCE = 1e-4, 1e-5


def _job(folder: Path, raw: Path, name: str, **train: Any) -> Path:
    tree = tiny_job(raw, folder / name / "storage", name=name, tracking=folder / name)
    tree["train"] |= {
        "workers": 4,
        "global_batch": 24,
        "lanes": 12,
        "learning_rate": _RATE,
        "max_failures": 10,
        "deepspeed": {"zero_optimization": {"stage": 2}},
        **train,
    }
    (stage, _) = tree["train"]["stages"]
    tree["train"]["stages"] = [stage | {"steps": _STEPS, "checkpoint_every": 20}]
    tree["datasets"].pop("clips")
    tree["cluster"]["grow_check_s"] = 1.0
    tree["checkpoints"] = {"keep_last": 1000}
    tree["evaluate"] = {}
    (folder / name).mkdir()
    return write_job(folder / name / "job.yaml", tree)


def _run(job: Path, environment: dict[str, str]) -> Command:
    return Command("run", str(job), log=job.with_name("log"), environment=environment)


def _checkpoints(job: Path) -> list[Checkpoint]:
    return committed(open_storage(job.parent / "storage").at(f"runs/{job.parent.name}"))


def _losses(job: Path) -> dict[int, float]:
    record = read_record(open_storage(job.parent / "storage").at(f"runs/{job.parent.name}"))
    assert record is not None
    points = series(f"sqlite:///{job.parent}/mlflow.db", str(record["tracking_run"]), "loss/total")
    assert [step for step, _ in points] == list(range(1, _STEPS + 1)), "each step once"
    return dict(points)


def test_a_run_that_goes_from_4_workers_to_2_to_3_to_4_lies_on_the_curve_of_a_constant_one(
    ray_cluster: RayCluster, raw_corpus: Path, tmp_path: Path
) -> None:
    environment = {**ray_cluster.environment, "RAY_ADDRESS": ray_cluster.gcs}
    constant = _job(tmp_path, raw_corpus, "constant", workers=1)
    _run(constant, environment).succeed()
    assert {one.record["world_size"] for one in _checkpoints(constant)} == {1}

    elastic = _job(tmp_path, raw_corpus, "elastic", min_workers=2)
    command = _run(elastic, environment)

    def trained_by(workers: int) -> bool:
        found = _checkpoints(elastic)
        return bool(found) and found[-1].record["world_size"] == workers

    command.wait_until(lambda: trained_by(4))
    (raylet,) = [
        one for one in processes("raylet/raylet") if "--node_ip_address=127.0.0.1" not in one.cmdline()
    ]
    os.kill(raylet.pid, signal.SIGKILL)
    command.wait_until(lambda: trained_by(2))
    ray_cluster.add_raylet(cpus=1)
    command.wait_until(lambda: trained_by(3))
    ray_cluster.add_raylet(cpus=1)
    command.succeed()
    assert trained_by(4)

    sizes = [one.record["world_size"] for one in _checkpoints(elastic)]
    changes = [now for before, now in zip([None, *sizes], sizes, strict=False) if now != before]
    assert changes == [4, 2, 3, 4]
    found, expected = _losses(elastic), _losses(constant)
    apart = {step: abs(found[step] / expected[step] - 1) for step in expected}
    print("largest distance", max(apart.values()), "at step", max(apart, key=lambda step: apart[step]))
    assert max(apart.values()) < _TOLERANCE
    assert found != expected, "nothing was computed in another order: the groups were not of different sizes"
    proof = Command(
        *("verify-epoch", str(elastic.parent / "storage/runs/elastic"), "--json"),
        log=elastic.with_name("proof"),
    ).succeed()
    assert json.loads(proof[proof.index("{") :])["proven"] == _STEPS
