"""Where the faults happen: a cluster of two raylets, an S3 server, an MLflow server, and jobs on them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import LoggedModel

from pipeline.evaluation.ledger import Ledger
from pipeline.runs import read_record
from pipeline.training.checkpoints import Checkpoint, list_checkpoints
from pipeline.training.consumption import PartReference, StepRecord, read_ledger
from sharding.storage import Storage
from tests.chaos.journal import Trained, read_journal
from tests.end_to_end.command import LIMIT_S, Command, series, weights_digest
from tests.fixtures.jobs import tiny_job, write_job
from tests.fixtures.ray_cluster import RayCluster
from tests.fixtures.s3 import S3Server
from tests.pipeline.mlflow_server import MlflowServer

EVERY = 6  # steps between two checkpoints
#: Metrics that are functions of weights and data; those of time and memory are not.
_TIMELESS = ("loss/", "train/", "learning_rate/", "data/")


@dataclass
class Site:
    """The servers and the cluster, shared by all jobs. The S3 server's credentials are in the environment."""

    folder: Path
    raw: Path
    s3: S3Server
    mlflow: MlflowServer
    cluster: RayCluster
    url: str = ""

    def __post_init__(self) -> None:
        self.url = self.s3.fresh("jobs")

    def job(self, name: str, steps: int) -> Job:
        """A job of ``steps`` steps; all of the site share their shards."""
        tree = tiny_job(self.raw, self.url, name=name)
        tree["train"] |= {"loader_processes": 1, "max_failures": 1000, "cache_mb": 64}
        first, second = tree["train"]["stages"]
        first |= {"steps": steps // 2, "checkpoint_every": EVERY}
        second |= {"steps": steps - steps // 2, "checkpoint_every": EVERY}
        tree["checkpoints"] = {"keep_last": 10_000, "on_stop_s": 300}  # the tests' machine may be slow
        tree["tracking"]["uri"] = self.mlflow.uri
        folder = self.folder / name
        folder.mkdir()
        environment = {**self.cluster.environment, "RAY_ADDRESS": self.cluster.gcs}
        return Job(name, write_job(folder / "job.yaml", tree), self, steps, environment)


@dataclass
class Job:
    """A job, its running command if there is one, and how to look at its run."""

    name: str
    file: Path
    site: Site
    steps: int
    environment: Mapping[str, str]
    command: Command | None = None
    starts: int = field(default=0)

    @property
    def run(self) -> Storage:
        return Storage(self.site.s3.config(self.site.url)).at(f"runs/{self.name}")

    def start(self) -> Command:
        """``glscl run``, as often as one likes."""
        self.starts += 1
        self.command = Command(
            *(str(self.journal_path), "run", str(self.file)),
            log=self.file.with_name(f"log-{self.starts}"),
            environment=self.environment,
            module="tests.chaos.journal",
        )
        return self.command

    # Looking at it while it runs.

    @property
    def journal_path(self) -> Path:
        return self.file.with_name("journal")

    @property
    def journal(self) -> list[Trained]:
        return read_journal(self.journal_path)

    @property
    def step(self) -> int:
        """The step trained last; 0 before the first."""
        journal = self.journal
        return journal[-1].step if journal else 0

    def wait_until(self, condition: Callable[[], bool], pause_s: float = 0.01) -> None:
        """Poll closely: what is waited for may last no longer than a step."""
        assert self.command is not None
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.command.process.poll() is None, f"ended too early:\n{self.command.output[-6000:]}"
            assert time.monotonic() < deadline, f"took too long:\n{self.command.output[-6000:]}"
            time.sleep(pause_s)

    def uploading(self) -> bool:
        """Whether a new checkpoint is on its way: files of it are in the storage, its commit record is not."""
        steps: dict[str, set[int]] = {"committed": {0}, "begun": {0}}  # a step's folder ends with a token
        for file in self.run.list("checkpoints"):
            _, folder, name = file.path.split("/", 2)
            steps["committed" if name == "commit.json" else "begun"].add(int(folder.split("-")[1]))
        return max(steps["begun"]) > max(steps["committed"])

    def newest(self) -> int:
        """The step of the newest committed checkpoint; 0 where there is none."""
        return max((one.step for one in list_checkpoints(self.run)), default=0)

    def evaluating(self) -> bool:
        """Whether an evaluation has begun that has not ended."""
        return any(state.open for state in Ledger(self.run).states().values())

    # What came of it.

    def checkpoints(self) -> list[Checkpoint]:
        """Those that were due, not those between two that were written on leaving."""
        return [one for one in list_checkpoints(self.run) if not one.record["interim"]]

    def weights(self) -> dict[int, str]:
        """sha256 of the weights by step."""
        return {checkpoint.step: weights_digest(checkpoint) for checkpoint in self.checkpoints()}

    def consumed(self) -> list[StepRecord]:
        """What each step was trained on, as the newest checkpoint vouches for it."""
        newest = list_checkpoints(self.run)[-1]
        ledger = read_ledger(self.run, [PartReference(**newest.record["consumption"])])
        assert not ledger.gaps
        return list(ledger.records())

    def run_id(self) -> str:
        record = read_record(self.run)
        assert record is not None
        return str(record["tracking_run"])

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """All points in MLflow of the metrics that do not depend on time."""
        found = MlflowClient(tracking_uri=self.site.mlflow.uri).get_run(self.run_id()).data.metrics
        names = sorted(name for name in found if name.startswith(_TIMELESS))
        return {name: series(self.site.mlflow.uri, self.run_id(), name) for name in names}

    def evaluations(self) -> dict[tuple[int, str], dict[str, float]]:
        """The numbers of all evaluations by step and task."""
        outcomes = Ledger(self.run).outcomes()
        assert all(outcome.cause is None for outcome in outcomes), [outcome.cause for outcome in outcomes]
        return {(outcome.step, outcome.task): dict(outcome.metrics) for outcome in outcomes}

    def models(self) -> list[LoggedModel]:
        """The checkpoints as MLflow shows them, the best by R@10 first."""
        client = MlflowClient(tracking_uri=self.site.mlflow.uri)
        order = [{"field_name": "metrics.held-out/t2i_R10", "ascending": False}]
        experiment = client.get_experiment_by_name("tests")
        found = client.search_logged_models([experiment.experiment_id], order_by=order, max_results=1000)
        return [model for model in found if model.source_run_id == self.run_id()]

    def finished_runs(self) -> int:
        """How many runs in MLflow bear the job's name; all are finished."""
        client = MlflowClient(tracking_uri=self.site.mlflow.uri)
        experiment = client.get_experiment_by_name("tests")
        found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{self.name}'")
        assert {run.info.status for run in found} == {"FINISHED"}
        return len(found)


def processes(pattern: str) -> list[psutil.Process]:
    """The processes of the site's cluster whose command line or title holds ``pattern``.

    The raylets are children of a program of this one's; a driver's own processes are not among them.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if pattern in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def loader_processes(worker: psutil.Process) -> list[psutil.Process]:
    """A worker's loader processes: the children of the server that forks them."""
    return [child for server in worker.children() for child in server.children()]


def one_of(found: list[psutil.Process], draw: Any) -> psutil.Process:
    """One of them, by the seed."""
    assert found, "nothing there to be killed"
    return sorted(found, key=lambda process: process.pid)[int(draw.integers(len(found)))]


def send(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    """A signal to exactly this process."""
    os.kill(process.pid, number)
