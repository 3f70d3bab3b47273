"""The faults of the matrix: what each does, when, and what it may cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.training.checkpoints import list_checkpoints
from tests.chaos.journal import set_gate
from tests.chaos.scene import EVERY, Job, loader_processes, one_of, processes, send

WORKER = "ray::RayTrainWorker"
EVALUATION = "ray::EvaluationActor"
_AWAY_S = 3.0  # how long a server is gone


@dataclass(frozen=True)
class Fault:
    """One way for something to end.

    Attributes:
        name: as in the table.
        inflict: does it; draws from the generator whom it hits.
        during: when: while "training", in the middle of a step or between two; while a checkpoint is on its way
            ("upload"); while something is evaluated ("evaluation").
        ends: what ends with it and has to start again: the "group" of workers, the "driver" (the test gives the
            command once more), "nothing".
        may_cost: steps that may have to be done again. After a kill: those since the last committed checkpoint, that is
            up to an interval, and those that were trained while the next one was on its way.
        spoils: whether the newest checkpoint is lost too.
    """

    name: str
    inflict: Callable[[Job, Any], None]
    during: str = "training"
    ends: str = "group"
    may_cost: int = 2 * EVERY
    spoils: bool = False


def _kill_worker(job: Job, draw: Any) -> None:
    send(one_of(processes(WORKER), draw))


def _kill_loader(job: Job, draw: Any) -> None:
    send(one_of([child for worker in processes(WORKER) for child in loader_processes(worker)], draw))


def _raylet(draw: Any) -> psutil.Process:
    """One with a training worker on it that is not the driver's."""
    raylets = [
        one
        for one in processes("raylet/raylet")
        if "--node_ip_address=127.0.0.1" not in one.cmdline() and {*one.children()} & {*processes(WORKER)}
    ]
    return one_of(raylets, draw)


def _kill_raylet(job: Job, draw: Any) -> None:
    """Another takes its place."""
    send(_raylet(draw))
    job.site.cluster.add_raylet()


def _drain_node(job: Job, draw: Any) -> None:
    """As the autoscaler, or a node that is sent SIGTERM, tells Ray that the machine will be taken back."""
    [node] = [one.partition("=")[2] for one in _raylet(draw).cmdline() if one.startswith("--node_id=")]
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "drain-node", "--address", job.site.cluster.gcs, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    command += ["--deadline-remaining-seconds", "600"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **job.environment})
    job.site.cluster.add_raylet()


def _kill_driver(job: Job, draw: Any) -> None:
    assert job.command is not None
    job.command.kill()


def _spoil_checkpoint(job: Job, draw: Any) -> None:
    """Kill the driver, and change one byte of what the newest checkpoint would be gone on from."""
    job.wait_until(lambda: bool(list_checkpoints(job.run)))
    workers = processes(WORKER)
    _kill_driver(job, draw)
    _, alive = psutil.wait_procs(workers, timeout=120)  # they might still commit one more
    assert not alive
    newest = list_checkpoints(job.run)[-1]
    name = min(name for name in newest.files if not name.startswith("model/"))
    data = bytearray(job.run.read_bytes(f"{newest.path}/{name}"))
    data[int(draw.integers(len(data)))] ^= 1
    job.run.write_bytes(f"{newest.path}/{name}", bytes(data))


def _kill_mlflow(job: Job, draw: Any) -> None:
    job.site.mlflow.kill()
    time.sleep(_AWAY_S)
    job.site.mlflow.start()


def _kill_evaluation(job: Job, draw: Any) -> None:
    send(one_of(processes(EVALUATION), draw))


def _kill_s3(job: Job, draw: Any) -> None:
    job.site.s3.kill()
    time.sleep(_AWAY_S)
    job.site.s3.start()


def _terminate_worker(job: Job, draw: Any) -> None:
    send(one_of(processes(WORKER), draw), signal.SIGTERM)


def _terminate_driver(job: Job, draw: Any) -> None:
    assert job.command is not None
    set_gate(job.journal_path, None)  # what waits there hears of nothing
    job.command.process.terminate()
    assert job.command.wait() == 143, job.command.output[-6000:]
    newest = list_checkpoints(job.run)[-1].step
    assert f"interrupted; the same command goes on with the checkpoint of step {newest}" in job.command.output
    assert "Traceback" not in job.command.output


#: One of each.
SHORT = (
    Fault("kill -9 of a worker during a checkpoint's upload", _kill_worker, "upload"),
    Fault("kill -9 of a loader or prefetching process", _kill_loader),
    Fault("SIGTERM to a worker", _terminate_worker, may_cost=1),
    Fault("kill -9 of an evaluation", _kill_evaluation, "evaluation", "nothing", 0),
    Fault("kill -9 of the MLflow server", _kill_mlflow, ends="nothing", may_cost=0),
    Fault("kill -9 of the S3 server", _kill_s3, ends="nothing", may_cost=0),
    Fault("SIGTERM to the driver", _terminate_driver, ends="driver", may_cost=1),
    Fault("kill -9 of a raylet", _kill_raylet),
    Fault(
        "kill -9 of the driver, newest checkpoint damaged",
        _spoil_checkpoint,
        ends="driver",
        may_cost=3 * EVERY,
        spoils=True,
    ),
)

#: And at other moments.
LONG = (
    *SHORT,
    Fault("a node is drained", _drain_node, may_cost=1),
    Fault("kill -9 of a worker", _kill_worker),
    Fault("kill -9 of the driver", _kill_driver, ends="driver"),
    Fault("kill -9 of the driver during a checkpoint's upload", _kill_driver, "upload", "driver"),
    Fault("kill -9 of the S3 server during a checkpoint's upload", _kill_s3, "upload", "nothing", 0),
    Fault("SIGTERM to a worker during a checkpoint's upload", _terminate_worker, "upload", may_cost=1),
    Fault("SIGTERM to the driver during a checkpoint's upload", _terminate_driver, "upload", "driver", 1),
)
