"""Jobs on a running Ray cluster, through the job server of its head (``http://host:8265``).

What is sent is a folder with the project's packages and the job's YAML, so that the cluster's machines need
the dependencies only. It works from a checkout and from an installed wheel alike.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import Environment
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("pipeline", "model", "sharding", "cluster")
STAGED_YAML = "job.yaml"
RUN_JOB = f"python -m pipeline.cli run {STAGED_YAML}"
_LARGEST_PACKAGE = 64 * 2**20  # bytes in all; beyond it the demo's corpus stays behind
_LEFT_BEHIND = ("pipeline/demo/corpus",)
_CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_POLL_S = 1.0
_STOP_WAIT_S = 60.0  # a job that is stopped may write a last checkpoint


@dataclass(frozen=True)
class JobReport:
    """What the job server knows of a job. Times: seconds since the epoch, None where not reached yet."""

    job_id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    message: str
    entrypoint: str
    started: float | None
    ended: float | None

    @property
    def finished(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def submit(
    job_yaml: Path,
    address: str,
    *,
    job_id: str | None = None,
    overrides: Sequence[str] = (),
    environment: Environment | None = None,
    wait: bool = False,
    entrypoint: str = RUN_JOB,
) -> str:
    """Sends a job to the cluster and returns its id (a new one, after the YAML's name, if none is given).

    Args:
        overrides: ``key=value`` settings, appended to the entrypoint as ``--set``.
        wait: return only once the job has ended, however it ended.
        entrypoint: the shell command, run in the folder that is sent.

    Raises:
        ClusterError: no job server at the address; the id is taken; the job was refused; the code is too
            large.
        FileNotFoundError: no such YAML.
    """
    client = _client(address)
    chosen = job_id or f"{job_yaml.stem}-{secrets.token_hex(4)}"
    command = shlex.join([part for setting in overrides for part in ("--set", setting)])
    with tempfile.TemporaryDirectory(prefix="glscl-job-") as folder, _explained(address):
        stage(job_yaml, Path(folder))
        try:
            client.submit_job(
                entrypoint=f"{entrypoint} {command}".strip(),
                submission_id=chosen,
                runtime_env={**_patient(environment or Environment()), "working_dir": folder},
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise ClusterError(f'job id "{chosen}" is taken on {address}; choose another') from None
            raise
    while wait and not status(address, chosen).finished:
        time.sleep(_POLL_S)
    return chosen


def _patient(environment: Environment) -> dict[str, object]:
    """The job's ``runtime_env``, in which Ray waits longer than its 3 s before it kills a job that is stopped."""
    runtime_env = environment.runtime_env()
    variables = runtime_env.get("env_vars", {})
    assert isinstance(variables, dict)
    return {**runtime_env, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(round(_STOP_WAIT_S)), **variables}}


def status(address: str, job_id: str) -> JobReport:
    """The job's state. ``ClusterError`` where there is no such job or no job server."""
    client = _client(address)
    with _explained(address, job_id):
        details = client.get_job_info(job_id)
    return JobReport(
        job_id=job_id,
        status=str(details.status.value),
        message=details.message or "",
        entrypoint=details.entrypoint,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )


def logs(address: str, job_id: str, follow: bool = False) -> Iterator[str]:
    """The lines that the job has printed; with ``follow`` those to come as well, until it ends."""
    client = _client(address)
    if follow:
        yield from _lines(_followed(client, address, job_id))
        return
    with _explained(address, job_id):
        text = client.get_job_logs(job_id)
    yield from text.splitlines()


def stop(address: str, job_id: str) -> JobReport:
    """Asks the job to end (SIGTERM, and SIGKILL 3 s later), waits for that and returns its last state."""
    client = _client(address)
    with _explained(address, job_id):
        client.stop_job(job_id)
    deadline = time.monotonic() + _STOP_WAIT_S + 10 * _POLL_S  # so long the job has, then Ray kills it
    while not (report := status(address, job_id)).finished and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return report


def stage(job_yaml: Path, folder: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Copies the packages, without caches, and the YAML (as ``job.yaml``) into an empty folder.

    Raises:
        ClusterError: a package is not importable, or all is more than 64 MiB even without the demo's corpus.
    """
    shutil.copyfile(job_yaml, folder / STAGED_YAML)
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise ClusterError(f"package {name} is not installed here, so it cannot be sent")
        shutil.copytree(found.submodule_search_locations[0], folder / name, ignore=_CACHES)
    if _size(folder) > _LARGEST_PACKAGE:
        for part in _LEFT_BEHIND:
            shutil.rmtree(folder / part, ignore_errors=True)
    if (size := _size(folder)) > _LARGEST_PACKAGE:
        raise ClusterError(
            f"the code to send has {size / 2**20:.0f} MiB, at most {_LARGEST_PACKAGE >> 20} MiB are allowed: "
            "is there data among the packages?"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _client(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise ClusterError(f'address "{address}": expected the job server\'s, like http://host:8265')
    from ray.job_submission import JobSubmissionClient

    with _explained(address):
        return JobSubmissionClient(address.rstrip("/"))


@contextmanager
def _explained(address: str, job_id: str | None = None) -> Iterator[None]:
    """Turns what Ray's client raises into one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        told = (
            "RAY_AUTH_TOKEN is set but not accepted" if "RAY_AUTH_TOKEN" in os.environ else "it wants a token"
        )
        raise ClusterError(
            f"{address} refuses the connection: {told} (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        ) from None
    except (ConnectionError, requests.ConnectionError, requests.Timeout):
        raise ClusterError(f"no Ray job server answers at {address}") from None
    except RuntimeError as error:
        if job_id is not None and "404" in str(error):
            raise ClusterError(f'there is no job "{job_id}" on {address}') from None
        reason = str(error).strip().splitlines()
        raise ClusterError(f"{address} refuses: {reason[0] if reason else error!r}") from error


def _followed(client: JobSubmissionClient, address: str, job_id: str) -> Iterator[str]:
    """Ray's asynchronous stream of log pieces, for a caller that is not asynchronous."""
    with _explained(address, job_id):
        client.get_job_info(job_id)  # the stream itself says nothing of an unknown job
        loop = asyncio.new_event_loop()
        stream: AsyncIterator[str] = client.tail_job_logs(job_id)
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(stream))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(stream.aclose())  # type: ignore[attr-defined]
            loop.close()


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Whole lines out of pieces that are cut anywhere."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    if rest:
        yield rest
