"""Running ``glscl`` as a user does, in a process of its own, and looking at what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from mlflow import MlflowClient

from pipeline.training.checkpoints import Checkpoint, list_checkpoints
from sharding.storage import Storage
from tests.fixtures.processes import session_members

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1200.0  # only so that a hang ends


class Command:
    """A running ``glscl``; its output (both streams) goes to a file beside the job's."""

    def __init__(
        self,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        module: str = "pipeline",
        folder: Path = ROOT,
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "160", **(environment or {})},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """The exit code; kills and raises with the output when it takes too long."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(self.output[-4000:]) from None

    def succeed(self) -> str:
        """Wait, assert that it ended well, and return its output."""
        assert self.wait() == 0, self.output[-6000:]
        return self.output

    def wait_until(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Poll until the condition holds; fails when the command ends or time is over first."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.output[-6000:]}"
            assert time.monotonic() < deadline, f"took too long:\n{self.output[-6000:]}"
            time.sleep(0.05)

    def left_over(self) -> list[psutil.Process]:
        """Processes of its session that live on after it ended (some take a moment to)."""
        return psutil.wait_procs(session_members(self.process.pid), timeout=60)[1]

    def training_workers(self) -> list[psutil.Process]:
        """The processes of the training's workers."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to the driver alone, as when somebody closes the wrong machine."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def committed(run: Storage) -> list[Checkpoint]:
    """The committed checkpoints; none while there is no run."""
    return list_checkpoints(run)


def weights_digest(checkpoint: Checkpoint) -> str:
    """sha256 of the checkpoint's weights file."""
    return str(checkpoint.files["model/model.safetensors"]["sha256"])


def series(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """All points of a metric, as MLflow has them."""
    points = MlflowClient(tracking_uri=uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)
