"""Jobs on a running Ray cluster, through the job server of its head (``http://host:8265``).

What is sent is a folder with the project's packages and the job's YAML, so that the cluster's machines need
the dependencies only. It works from a checkout and from an installed wheel alike.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from cluster import import_path
from cluster.config import Environment
from cluster.errors import ClusterError, in_one_line
from cluster.job_start import PYTHON_VARIABLE, SUBMISSION
from cluster.loopback import ask_loopback_directly, proxy_variable

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STAGED_YAML = "job.yaml"
#: In a shell command of a job: the Python that runs Ray there (``cluster.job_start``).
PYTHON = f'"${{{PYTHON_VARIABLE}:-python3}}"'
RUN_JOB = f"{PYTHON} -m cluster.job_start"
_DISTRIBUTION = "glscl-pipeline"
_WAY_IN = "glscl_pipeline.py"
_LARGEST_PACKAGE = 64 * 2**20  # bytes in all
_DEMO_CORPUS = Path("demo", "corpus")  # below a package: read by `glscl demo` alone, on the user's machine
_CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_POLL_S = 1.0
_OTHER_ADDRESSES = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
)  # Ray's client takes them instead of the one it is given
_LONGEST_REASON = 300  # characters of what a server says
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
    content: bytes | None = None,
    job_id: str | None = None,
    arguments: Sequence[str] = ("run", STAGED_YAML),
    environment: Environment | None = None,
    variables: Mapping[str, str] | None = None,
    modules: Sequence[Path] = (),
    wait: bool = False,
    entrypoint: str = RUN_JOB,
) -> str:
    """Sends a job to the cluster and returns its id (a new one, after the YAML's name, if none is given).

    Args:
        content: of the YAML, where it was read already: it may be a pipe.
        arguments: of the ``glscl`` that runs there. They travel in a file: Ray shows a job's command to whoever can
            reach its dashboard.
        variables: more of the environment of the job's driver; they travel in that file too.
        modules: files and folders of the user's that the job imports, sent along.
        wait: return only once the job has ended, however it ended.
        entrypoint: the shell command, run in the folder that is sent.

    Raises:
        ClusterError: no job server at the address; the id is taken; the job was refused; the code is too
            large.
        FileNotFoundError: no such YAML.
    """
    client = _client(address)
    chosen = job_id or f"{job_yaml.stem}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="glscl-job-") as folder, _explained(address):
        sent = job_yaml.read_bytes() if content is None else content
        stage(sent, Path(folder), arguments, variables or {}, modules)
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=chosen,
                runtime_env={**_runtime_env(environment or Environment()), "working_dir": folder},
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise ClusterError(f'job id "{chosen}" is taken on {address}; choose another') from None
            raise
    while wait and not status(address, chosen).finished:
        time.sleep(_POLL_S)
    return chosen


def _runtime_env(environment: Environment) -> dict[str, object]:
    """The job's ``runtime_env``, with what Ray and Python do otherwise in it."""
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

    runtime_env = environment.runtime_env()
    given = runtime_env.get("env_vars", {})
    assert isinstance(given, dict)
    variables = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(_STOP_WAIT_S)),  # Ray's own: 3 s, then it kills
        "PYTHONSAFEPATH": "1",  # as in the session of a driver
        HOOK: "cluster.job_start.begin_process",  # as Ray passes a hook on; what submit_job takes reaches no supervisor
        **given,
    }
    return {**runtime_env, "env_vars": variables}


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
    """The lines that the job has printed; with ``follow`` those to come as well, until it ends.

    Raises:
        ClusterError: no such job or no job server; a followed connection was cut, which does not end the job. A
            stream that is closed in good order while the job runs (by a gateway, by Ray itself) is taken up where it
            ended.
    """
    client = _client(address)
    if follow:
        yield from _lines(_followed(client, address, job_id))
        return
    with _explained(address, job_id):
        text = client.get_job_logs(job_id)
    yield from text.splitlines()


def stop(address: str, job_id: str) -> JobReport:
    """Asks the job to end (SIGTERM, and SIGKILL ``_STOP_WAIT_S`` later), waits for that; returns its last state."""
    client = _client(address)
    with _explained(address, job_id):
        client.stop_job(job_id)
    deadline = time.monotonic() + _STOP_WAIT_S + 10 * _POLL_S  # so long the job has, then Ray kills it
    while not (report := status(address, job_id)).finished and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return report


def stage(
    job_yaml: bytes,
    folder: Path,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    modules: Sequence[Path] = (),
    packages: Sequence[str] = import_path.PACKAGES,
) -> None:
    """Fills an empty folder with the packages, without caches and the demo's corpus, and the YAML (``job.yaml``).

    Args:
        arguments: of the ``glscl`` that will run there.
        variables: of its environment.
        modules: files and folders of the user's, put beside the packages.

    Raises:
        ClusterError: a package is not importable, or all is more than 64 MiB.
    """
    (folder / STAGED_YAML).write_bytes(job_yaml)
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise ClusterError(f"package {name} is not installed here, so it cannot be sent")
        _copy(Path(found.submodule_search_locations[0]), folder / name)
    shutil.copyfile(Path(import_path.ROOT) / _WAY_IN, folder / _WAY_IN)
    for module in modules:
        _copy(module, folder / module.name)
    submission = {
        "python": sys.version_info[:2],
        "modules": _required(),
        "arguments": list(arguments),
        "variables": dict(variables or {}),
    }
    (folder / SUBMISSION).write_text(json.dumps(submission), encoding="utf-8")
    if (size := _size(folder)) > _LARGEST_PACKAGE:
        raise ClusterError(
            f"the code to send has {size / 2**20:.0f} MiB, at most {_LARGEST_PACKAGE >> 20} MiB are allowed: "
            "is there data among the packages?"
        )


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)
        return
    corpus = source / _DEMO_CORPUS

    def left_out(folder: str, names: list[str]) -> set[str]:
        return _CACHES(folder, names) | {name for name in names if Path(folder, name) == corpus}

    shutil.copytree(source, target, ignore=left_out)


def _required() -> dict[str, str]:
    """Modules that glscl imports, each with the package that brings it, as this installation declares them."""
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return {}
    modules = {}
    for requirement in requirements:
        package = re.match(r"[\w.-]+", requirement)
        if package is None or "extra ==" in requirement:
            continue
        try:
            listed = importlib.metadata.distribution(package[0]).read_text("top_level.txt")
        except importlib.metadata.PackageNotFoundError:  # not needed here, so perhaps not there
            continue
        for name in (listed or package[0].replace("-", "_")).split():
            if not name.startswith("_") and importlib.util.find_spec(name) is not None:
                modules[name] = package[0]
    return modules


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _client(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise ClusterError(f'address "{address}": expected the job server\'s, like http://host:8265')
    ask_loopback_directly(address)
    from ray.job_submission import JobSubmissionClient

    for chatty in (
        "dashboard.modules.dashboard_sdk",
        "dashboard.modules.job.sdk",
        "_private.runtime_env.packaging",
    ):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)  # they tell of each package and stream
    with _explained(address), _without(*_OTHER_ADDRESSES):
        return JobSubmissionClient(address.rstrip("/"))


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Without these variables for the time of the block."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextmanager
def _explained(address: str, job_id: str | None = None) -> Iterator[None]:
    """Turns what Ray's client raises into one line."""
    import aiohttp
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
    except (ConnectionError, requests.RequestException, aiohttp.ClientError, TimeoutError) as error:
        proxy = proxy_variable(address)
        by = "" if proxy is None else f" (asked through the proxy that {proxy} names; NO_PROXY excepts hosts)"
        raise ClusterError(f"no Ray job server answers at {address}{by}") from error
    except RuntimeError as error:
        if job_id is not None and "status code 404" in str(error):
            raise ClusterError(f'there is no job "{job_id}" on {address}') from None
        raise ClusterError(f"{address} refuses: {in_one_line(error)[:_LONGEST_REASON]}") from error


def _followed(client: JobSubmissionClient, address: str, job_id: str) -> Iterator[str]:
    """Ray's asynchronous stream of log pieces, for a caller that is not asynchronous.

    Each stream begins with the job's first line: what was seen before is passed over.
    """
    seen = 0  # characters
    while True:
        broke: ClusterError | None = None
        began = time.monotonic()
        try:
            for piece in _new(_stream(client, address, job_id), seen):
                seen += len(piece)
                yield piece
        except ClusterError as error:
            broke = error
        report = status(address, job_id)  # the stream itself says nothing of an unknown job
        if report.finished:
            with _explained(address, job_id):
                yield client.get_job_logs(job_id)[seen:]  # what came after the stream ended
            return
        if broke is not None:
            raise ClusterError(
                f"{broke}; the job goes on ({report.status}): glscl logs -f {job_id} --address {address}"
            ) from broke
        time.sleep(max(0.0, _POLL_S - (time.monotonic() - began)))


def _stream(client: JobSubmissionClient, address: str, job_id: str) -> Iterator[str]:
    """The pieces of one connection, until the server closes it.

    In a thread of its own: Ctrl-C, which may come at any moment, then finds the main thread waiting for a piece, and
    never within asyncio.
    """
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    loop = asyncio.new_event_loop()

    async def follow() -> None:
        async for piece in client.tail_job_logs(job_id):
            pieces.put(piece)

    task = loop.create_task(follow())

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the pieces are read
            pieces.put(error)
        else:
            pieces.put(None)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="follow-logs", daemon=True)
    thread.start()
    with _explained(address, job_id):
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            with suppress(RuntimeError):  # the loop is closed: the stream has ended
                loop.call_soon_threadsafe(task.cancel)
            thread.join(_POLL_S)


def _new(pieces: Iterator[str], seen: int) -> Iterator[str]:
    """What is left of the pieces after so many characters."""
    for piece in pieces:
        passed = min(seen, len(piece))
        seen -= passed
        if passed < len(piece):
            yield piece[passed:]


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Whole lines out of pieces that are cut anywhere."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    if rest:
        yield rest
