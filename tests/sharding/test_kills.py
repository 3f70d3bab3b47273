"""Nothing is lost to a kill: of drivers, workers and raylets, at moments drawn from a fixed seed.

All on one real cluster of two raylets. A driver that is killed is started again, and goes on; a worker or the second
raylet that is killed must not even end the run. In the end the dataset has the bytes of one that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sharding.manifest import load_manifest
from sharding.prepare import PrepareConfig, PreparedDataset, prepare
from sharding.storage import Storage, open_storage
from tests.fixtures.ray_cluster import RayCluster

SEED = 20
DRIVERS_KILLED, WORKERS_KILLED = 3, 4

DRIVER = textwrap.dedent(
    """
    import os, sys
    import ray
    from sharding.prepare import PrepareConfig, prepare
    from sharding.storage import open_storage
    address, config, out = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, _node_ip_address="127.0.0.1")
    prepare("pairs", PrepareConfig.model_validate_json(config), open_storage(out), in_flight=4)
    """
)


def _config(folder: Path, inputs: int) -> PrepareConfig:
    """Noisy pictures, three a task; each tenth is a copy of the first, one is too small."""
    folder.mkdir()
    for number in range(inputs):
        shape = (20 if number == 5 else 200, 200, 3)
        pixels = np.random.default_rng(0 if number % 10 == 0 else number).integers(0, 255, shape, np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG", compress_level=1)
        (folder / f"{number:03d}.png").write_bytes(sink.getvalue())
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    return PrepareConfig.model_validate(
        {
            "source": {"kind": "folder", "path": str(folder)},
            "modality": "image",
            "samples_per_shard": 3,
            "image": {"resize": 150},
            "filters": [{"kind": "size", "min": 30}, {"kind": "duplicates"}],
            "task_retries": WORKERS_KILLED + 3,
        }
    )


def _digests(root: Path) -> dict[str, str]:
    (dataset,) = (root / "datasets").iterdir()
    files = (path for path in dataset.rglob("*") if path.is_file())
    # What a killed process was writing keeps its temporary name, which no reader sees.
    whole = (path for path in files if not path.name.endswith(".part"))
    return {str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest() for path in whole}


def _start(cluster: RayCluster, config: PrepareConfig, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.gcs, config.model_dump_json(), str(out)],
        cwd=Path(__file__).parents[2],
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=(out.parent / "driver.log").open("ab"),
        start_new_session=True,
    )


class _Watch:
    """Counts the names that come up below a folder, those of files being written too."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.seen: set[str] = set()

    def wait_for(self, count: int, driver: subprocess.Popen[bytes], meanwhile: Callable[[], None]) -> bool:
        """Until so many more names came up; False if the driver ended before."""
        wanted = len(self.seen) + count
        deadline = time.monotonic() + 60
        while len(self.seen) < wanted:
            assert time.monotonic() < deadline, "nothing is written any more"
            for folder, _, names in os.walk(self._root):
                self.seen.update(f"{folder}/{name}" for name in names)
            if driver.poll() is not None:
                return False
            meanwhile()
            time.sleep(0.001)
        return True


def _busy_workers() -> list[psutil.Process]:
    """The processes that run a task of a preparation."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith(("ray::encode", "ray::commit", "ray::find_duplicates", "ray::summarise")):
            found.append(process)
    return found


def _second_raylet(cluster: RayCluster) -> psutil.Process:
    """That of 127.0.0.2 in the cluster of this test; others may run on the machine."""
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.info["name"] == "raylet" and cluster.gcs in line and "--node_ip_address=127.0.0.2" in line:
            return process
    raise AssertionError("the cluster has no second raylet")


def _mine(cluster: RayCluster, process: psutil.Process) -> bool:
    """Whether a worker belongs to this test's cluster: its raylet is the parent."""
    try:
        return any(cluster.gcs in " ".join(parent.cmdline()) for parent in process.parents())
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> bool:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.mark.slow
@pytest.mark.server
def test_kills_of_drivers_workers_and_a_raylet_leave_the_same_bytes(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    draw, config = random.Random(SEED), _config(tmp_path / "corpus", 36)
    undisturbed = tmp_path / "undisturbed"
    driver = _start(ray_cluster, config, undisturbed)
    reference = _Watch(undisturbed)
    reference.wait_for(10**9, driver, lambda: None)
    assert driver.wait() == 0, (tmp_path / "driver.log").read_text()[-3000:]
    expected = _digests(undisturbed)
    assert {"manifest.json", "report.html", "000000.tar"} <= expected.keys()

    out = tmp_path / "out"
    watch = _Watch(out)
    for _ in range(DRIVERS_KILLED):
        driver = _start(ray_cluster, config, out)
        moment = draw.randrange(1, len(reference.seen) // DRIVERS_KILLED)
        assert watch.wait_for(moment, driver, lambda: None), "the driver ended before it could be killed"
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    (dataset,) = (out / "datasets").iterdir()
    assert not (dataset / "manifest.json").exists()
    print("killed drivers after", len(watch.seen), "of", len(reference.seen), "names")

    killed: list[int] = []

    def kill_a_worker() -> None:
        if len(killed) < WORKERS_KILLED and draw.random() < 0.02:
            workers = [process for process in _busy_workers() if _mine(ray_cluster, process)]
            if workers and _kill(victim := draw.choice(workers)):
                killed.append(victim.pid)

    # The whole again elsewhere: kills that the run itself survives, from the first task to the last.
    survivor = tmp_path / "survivor"
    raylet = _second_raylet(ray_cluster)
    driver = _start(ray_cluster, config, survivor)
    watch = _Watch(survivor)
    assert watch.wait_for(draw.randrange(20, len(reference.seen) // 2), driver, kill_a_worker)
    assert _kill(raylet)
    watch.wait_for(10**9, driver, kill_a_worker)
    assert driver.wait() == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert killed, "no worker was killed"
    print("killed", len(killed), "workers and a raylet")
    assert _digests(survivor) == expected

    driver = _start(ray_cluster, config, out)
    assert driver.wait(timeout=60) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    assert _digests(out) == expected


@pytest.mark.slow
def test_two_drivers_at_once_make_one_dataset(tmp_path: Path, ray_session: None) -> None:
    config = _config(tmp_path / "corpus", 12)
    alone = prepare("pairs", config, open_storage(tmp_path / "alone"), in_flight=4)
    storage = open_storage(tmp_path / "both")
    results: list[PreparedDataset] = []
    errors: list[BaseException] = []

    def run(delay: float) -> None:
        time.sleep(delay)
        try:
            results.append(prepare("pairs", config, storage, in_flight=2))
        except BaseException as error:
            errors.append(error)
            raise

    drivers = [threading.Thread(target=run, args=(delay,)) for delay in (0.0, 0.1)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert not errors
    assert results == [alone, alone]
    assert load_manifest(storage.at(alone.path)) == alone.manifest
    assert _digests(tmp_path / "both") == _digests(tmp_path / "alone")


@pytest.mark.slow
def test_a_slower_driver_returns_what_a_quicker_one_finished(tmp_path: Path, ray_session: None) -> None:
    """The quicker one ends, and tidies up, while the slower one stands in each of its phases."""
    config = _config(tmp_path / "corpus", 12)
    alone = prepare("pairs", config, open_storage(tmp_path / "alone"), in_flight=4)
    for phase in ("encode", "duplicates", "write", "report"):
        storage = open_storage(tmp_path / phase)
        quicker: list[PreparedDataset] = []

        def overtake(
            progress: object, phase: str = phase, storage: Storage = storage, quicker: list = quicker
        ) -> None:
            if getattr(progress, "phase", None) == phase and not quicker:
                quicker.append(prepare("pairs", config, storage, in_flight=2))

        assert prepare("pairs", config, storage, in_flight=2, progress=overtake) == alone == quicker[0]
        assert _digests(tmp_path / phase) == _digests(tmp_path / "alone")
