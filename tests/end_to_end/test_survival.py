"""A killed run that goes on equals one that was never disturbed: weights, order of data, MLflow series."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.runs import read_record
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.verify_epoch import verify_epoch
from sharding.storage import Storage, open_storage
from tests.end_to_end.command import Command, committed, series, weights_digest
from tests.fixtures.jobs import tiny_job, write_job

pytestmark = pytest.mark.slow

STEPS = 40
EVERY = 5


@dataclass
class Job:
    """A job's file, and how to look at its run."""

    file: Path
    run: Storage
    uri: str

    def start(self, log: str) -> Command:
        return Command("run", str(self.file), log=self.file.with_name(log))

    def checkpoints(self) -> list[Checkpoint]:
        return committed(self.run)

    def run_id(self) -> str:
        record = read_record(self.run)
        assert record is not None
        return str(record["tracking_run"])

    def losses(self) -> list[tuple[int, float]]:
        return series(self.uri, self.run_id(), "loss/total")


@pytest.fixture(scope="module")
def make_job(raw_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    def make(name: str) -> Job:
        folder = tmp_path_factory.mktemp(name)
        tree: dict[str, Any] = tiny_job(raw_corpus, folder / "storage", name=name)
        tree["train"]["stages"][0] |= {"steps": STEPS - 10, "checkpoint_every": EVERY}
        tree["train"]["stages"][1] |= {"steps": 10, "checkpoint_every": EVERY}
        tree["checkpoints"] = {"keep_last": 100}
        tree["evaluate"]["after"] = "end"
        file = write_job(folder / "job.yaml", tree)
        return Job(file, open_storage(folder / "storage").at(f"runs/{name}"), tree["tracking"]["uri"])

    return make


@pytest.fixture(scope="module")
def undisturbed(make_job: Callable[[str], Job]) -> Job:
    job = make_job("undisturbed")
    job.start("log").succeed()
    return job


def assert_equals_undisturbed(job: Job, undisturbed: Job) -> None:
    assert [c.step for c in job.checkpoints()] == list(range(EVERY, STEPS + 1, EVERY))
    for mine, reference in zip(job.checkpoints(), undisturbed.checkpoints(), strict=True):
        assert weights_digest(mine) == weights_digest(reference), f"weights differ at step {mine.step}"
    # The newest part of the ledger holds the digest of all before it: the same samples in every step.
    assert job.checkpoints()[-1].record["consumption"] == undisturbed.checkpoints()[-1].record["consumption"]
    assert verify_epoch(job.run.url, Console()), "the ledger is not what the run had to be trained on"
    assert [step for step, _ in job.losses()] == list(range(1, STEPS + 1)), "each step once in MLflow"
    assert job.losses() == undisturbed.losses()
    runs = MlflowClient(tracking_uri=job.uri).search_runs(
        [MlflowClient(tracking_uri=job.uri).get_experiment_by_name("tests").experiment_id],
        filter_string="attributes.status = 'FINISHED'",
    )
    trainings = [
        run.info.run_id
        for run in runs
        if "mlflow.parentRunId" not in run.data.tags and run.data.tags.get("kind") != "prepare"
    ]
    assert trainings == [job.run_id()]


def test_verify_epoch_proves_an_undisturbed_run(undisturbed: Job) -> None:
    command = Command("verify-epoch", undisturbed.run.url, "--json", log=undisturbed.file.with_name("proof"))
    output = command.succeed()
    proof = json.loads(output[output.index("{") :])  # progress, on the other stream, came before
    assert (proof["proven"], proof["steps"], proof["parts"]) == (STEPS, STEPS, STEPS // EVERY)
    emoji = [epoch for epoch in proof["epochs"] if epoch["dataset"] == "emoji"]
    assert [epoch["epoch"] for epoch in emoji] == list(range(len(emoji)))
    assert all(epoch["complete"] and epoch["trained"] == 40 for epoch in emoji[:-1])
    assert {stage for epoch in emoji for stage in epoch["stages"]} == {"images", "mixed"}


def test_an_undisturbed_run_trains_every_step_once_and_learns(undisturbed: Job) -> None:
    losses = undisturbed.losses()
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    first, last = (
        losses[:5],
        losses[STEPS - 15 : STEPS - 10],
    )  # of the first stage: the second has fewer objectives
    assert sum(value for _, value in last) < sum(value for _, value in first)


def test_a_killed_worker_is_made_good_without_a_trace(
    make_job: Callable[[str], Job], undisturbed: Job
) -> None:
    job = make_job("killed-worker")
    command = job.start("log")
    command.wait_until(lambda: len(job.checkpoints()) >= 2)
    workers = command.training_workers()
    assert len(workers) == 2
    workers[1].kill()
    command.succeed()
    assert_equals_undisturbed(job, undisturbed)


def test_a_killed_driver_goes_on_when_started_again(make_job: Callable[[str], Job], undisturbed: Job) -> None:
    job = make_job("killed-driver")
    command = job.start("first-log")
    command.wait_until(lambda: len(job.checkpoints()) >= 2)
    left_behind = psutil.Process(command.process.pid).children(recursive=True)
    command.kill()
    _, alive = psutil.wait_procs(left_behind, timeout=150)  # Ray's agents take about a minute
    assert not alive, f"processes outlived the driver: {alive}"
    before = [c.step for c in job.checkpoints()]
    assert before[-1] < STEPS
    output = job.start("second-log").succeed()
    assert "preparing emoji" not in output.replace("\n", " ") or "encode" not in output, (
        "shards were made again"
    )
    assert_equals_undisturbed(job, undisturbed)


def test_a_checkpoint_with_a_flipped_byte_is_passed_over_loudly(
    make_job: Callable[[str], Job], undisturbed: Job
) -> None:
    job = make_job("flipped-byte")
    command = job.start("first-log")
    command.wait_until(lambda: len(job.checkpoints()) >= 3)
    workers = command.training_workers()
    command.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)  # they may still commit one more
    assert not alive
    newest = job.checkpoints()[-1]
    name = next(name for name in newest.files if name.startswith("deepspeed/"))
    path = job.run.local_path(f"{newest.path}/{name}")
    assert path is not None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    output = job.start("second-log").succeed()
    assert f"checkpoint of step {newest.step} is damaged and passed over" in output
    assert_equals_undisturbed(job, undisturbed)


def test_a_finished_run_is_not_trained_again_and_a_changed_one_is_refused(undisturbed: Job) -> None:
    again = Command("run", str(undisturbed.file), log=undisturbed.file.with_name("again"))
    assert "training is complete" in again.succeed()
    changed = Command(
        "run",
        str(undisturbed.file),
        "--set",
        "train.learning_rate=0.5",
        log=undisturbed.file.with_name("changed"),
    )
    assert changed.wait() == 2
    assert "train.learning_rate was 0.001, now 0.5" in changed.output
