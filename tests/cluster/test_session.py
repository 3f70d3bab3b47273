"""Sessions in processes of their own, as a user's command starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

REFUSALS = """
import json, socket, sys, time
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.session import session

told = {}
taken = socket.socket()
taken.bind(("127.0.0.1", 0))
taken.listen()
port = taken.getsockname()[1]
configs = {
    "unreachable": ClusterConfig(address="127.0.0.1:9"),
    "port": ClusterConfig(dashboard_port=port),
    "workers": ClusterConfig(num_cpus=1),
}
for name, config in configs.items():
    try:
        with session(config, workers=2):
            told[name] = "no error"
    except ClusterError as error:
        told[name] = str(error)
print("TOLD", json.dumps(told))
"""

# A worker that never ends: what is left of it when the driver goes is what the tests look at.
HANGING = """
import os, sys, tempfile, time
from pathlib import Path
from cluster.config import ClusterConfig
from cluster.session import session
from cluster.workers import run_workers

def hang(context, folder):
    Path(folder, f"rank{context.rank}").write_text(str(os.getpid()))
    while True:
        time.sleep(1)

folder = sys.argv[1]
config = ClusterConfig(object_store_mb=80)
with session(config, workers=1):
    run_workers(hang, folder, workers=1, config=config, name="h", max_failures=0, scratch=Path(folder))
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_hear_sigint,
    )


def _hear_sigint() -> None:
    # What a shell starts in the background ignores SIGINT, and passes that on to all below it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _hanging_run(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    driver = _start(HANGING, str(folder))
    try:
        deadline = time.monotonic() + 600
        while not (folder / "rank0").exists():
            assert driver.poll() is None, driver.stdout and driver.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield driver, psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
def test_what_cannot_be_is_refused_in_one_line() -> None:
    output = _start(REFUSALS).communicate(timeout=600)[0]
    told = json.loads(next(line for line in output.splitlines() if line.startswith("TOLD"))[5:])
    assert told["unreachable"].startswith("no Ray cluster answers at 127.0.0.1:9")
    assert told["port"].startswith("cluster.dashboard_port: ")
    assert "in use" in told["port"]
    assert told["workers"] == (
        "the cluster has room for 1 of 2 workers of 1 CPU each; its nodes: 1 CPU, 1 evaluation"
    )


@pytest.mark.slow
def test_sigterm_ends_the_run_and_every_process_and_only_loopback_was_open(tmp_path: Path) -> None:
    with _hanging_run(tmp_path) as (driver, processes):
        outside = [
            (process.name(), connection.laddr)
            for process in [psutil.Process(driver.pid), *processes]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and "127.0.0.1" not in connection.laddr.ip
        ]
        assert outside == []
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=120) == 143
        _, alive = psutil.wait_procs(processes, timeout=120)
        assert alive == []


@pytest.mark.slow
def test_sigint_ends_the_run_as_a_keyboard_interrupt(tmp_path: Path) -> None:
    with _hanging_run(tmp_path) as (driver, processes):
        driver.send_signal(signal.SIGINT)
        output = driver.communicate(timeout=120)[0]
        assert driver.returncode != 0
        assert output.splitlines()[-1] == "KeyboardInterrupt"
        _, alive = psutil.wait_procs(processes, timeout=120)
        assert alive == []


@pytest.mark.slow
def test_kill_9_of_the_driver_leaves_no_trainer_running(tmp_path: Path) -> None:
    with _hanging_run(tmp_path) as (driver, processes):
        worker = psutil.Process(int((tmp_path / "rank0").read_text()))
        assert worker in processes
        names = {process.pid: process.name() for process in processes}
        driver.kill()
        worker.wait(timeout=120)
        # Ray's two small agents take up to a minute to notice; they are not waited for.
        agents = [p for p in processes if names[p.pid] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
        _, alive = psutil.wait_procs([p for p in processes if p not in agents], timeout=120)
        assert alive == []
    for agent in agents:
        agent.kill()
