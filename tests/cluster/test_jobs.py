"""A real cluster of two raylets: drivers that join it, and jobs driven over HTTP as a user would."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import SecretStr

from cluster import jobs
from cluster.config import Environment
from cluster.errors import ClusterError
from tests.cluster.test_import_path import users_folder
from tests.fixtures.ray_cluster import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.server]

# A YAML only by name: these entrypoints run it as Python, from the folder that was sent.
SPREAD = """
import json
from pathlib import Path
from cluster.config import ClusterConfig
from cluster.session import session
from cluster.workers import run_workers

def where(context, folder):
    import os, ray, torch
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    node = ray.get_runtime_context().get_node_id()
    (Path(folder) / f"rank{context.rank}").write_text(f"{node} {total.item()} {os.environ['GREETING']}")

folder, = json.loads(Path("submission.json").read_text())["arguments"]
config = ClusterConfig(evaluations=2, placement="SPREAD")
with session(config, workers=2):
    run_workers(where, folder, workers=2, config=config, name="spread", max_failures=0, scratch=Path(folder))
print("all done")
"""
COUNT = """
import time
for second in range(600):
    print("second", second, flush=True)
    time.sleep(0.5)
"""

CONNECTED = """
import sys, ray
from cluster.config import ClusterConfig
from cluster.session import session

@ray.remote
def imported():
    import multiprocessing, os, random, statistics, sys
    import cluster.config, model, sharding.errors
    from sharding.filters.config import load_class
    loader = multiprocessing.get_context("forkserver").Process(target=print)
    loader.start()
    loader.join()
    files = [module.__file__ for module in (random, statistics, cluster.config, model, sharding.errors)]
    return files, loader.exitcode, load_class("own_filters.Keep").__module__

with session(ClusterConfig(address=sys.argv[1], evaluations=2), workers=4):
    files, loader, own = ray.get(imported.remote())
    print("NODES", len(ray.nodes()), "LOADER", loader, "FILTER OF", own, *files, sep="\n")
"""
FILTER = """
class Keep:
    level = "caption"
    def keeps(self, caption): return True
"""


def _script(folder: Path, text: str) -> Path:
    path = folder / "script.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_submitted_job_trains_on_both_raylets(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job_id = jobs.submit(
        _script(tmp_path, SPREAD),
        ray_cluster.dashboard,
        arguments=[str(tmp_path)],
        environment=Environment(env_vars={"GREETING": SecretStr("hello")}),
        wait=True,
        entrypoint=f"{jobs.PYTHON} {jobs.STAGED_YAML}",
    )
    printed = list(jobs.logs(ray_cluster.dashboard, job_id))
    report = jobs.status(ray_cluster.dashboard, job_id)
    assert report.status == "SUCCEEDED", "\n".join([report.message, *printed])
    assert "all done" in printed
    first, second = ((tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1))
    assert first[0] != second[0]  # node ids
    assert first[1:] == second[1:] == ["2.0", "hello"]


def test_logs_follow_a_job_until_it_is_stopped(ray_cluster: RayCluster, tmp_path: Path) -> None:
    address = ray_cluster.dashboard
    entrypoint = f"{jobs.PYTHON} {jobs.STAGED_YAML}"
    job_id = jobs.submit(_script(tmp_path, COUNT), address, job_id="counting", entrypoint=entrypoint)
    assert job_id == "counting"
    with pytest.raises(ClusterError, match='job id "counting" is taken'):
        jobs.submit(_script(tmp_path, COUNT), address, job_id="counting", entrypoint=entrypoint)

    seen = []
    for line in jobs.logs(address, job_id, follow=True):
        seen.append(line)
        if line == "second 3":
            assert jobs.status(address, job_id).status == "RUNNING"
            assert jobs.stop(address, job_id).status == "STOPPED"
    assert [line for line in seen if line.startswith("second")][:4] == [f"second {i}" for i in range(4)]
    assert "second 100" not in seen


def test_an_unknown_job_and_a_missing_server_are_told_in_a_line(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    for ask in (jobs.status, jobs.stop, lambda *args: list(jobs.logs(*args, follow=True))):
        with pytest.raises(ClusterError, match='there is no job "nobody"'):
            ask(ray_cluster.dashboard, "nobody")
    with pytest.raises(ClusterError, match=r"no Ray job server answers at http://127\.0\.0\.1:9$"):
        jobs.submit(_script(tmp_path, COUNT), "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="expected the job server's"):
        jobs.status("127.0.0.1:6379", "x")


def test_a_driver_joins_a_running_cluster_and_nothing_of_its_folder_is_imported(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    folder = users_folder(
        tmp_path / "work", ("model", "sharding", "cluster", "random", "statistics", "queue")
    )
    (folder / "own_filters.py").write_text(FILTER)
    script = tmp_path / "driver.py"
    script.write_text(CONNECTED)
    root = Path(__file__).parents[2]
    environment = {
        name: value for name, value in ray_cluster.environment.items() if not name.startswith("RAY_")
    }
    done = subprocess.run(
        [sys.executable, script, ray_cluster.gcs],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert "NODES\n2\nLOADER\n0\nFILTER OF\nown_filters\n" in done.stdout, done.stdout
    assert not (folder / "seen").exists(), (folder / "seen").read_text()
