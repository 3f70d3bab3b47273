"""A Ray to work in for the time of a ``with`` block: one of our own on this machine, or a running cluster."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cluster import import_path
from cluster.config import EVALUATION_RESOURCE, FINE_TUNING_RESOURCE, ClusterConfig
from cluster.errors import ClusterError, in_one_line
from cluster.loopback import direct_environment, is_loopback
from cluster.resources import check_resources

if TYPE_CHECKING:
    from ray.job_config import JobConfig

_FOLDER_PREFIX = "glscl-ray-"
_LONGEST_TEMP_DIR = 50  # a Unix socket's path has at most 107 bytes, and Ray adds 57 to its folder
_PROBE_S = 5.0
_FINE_TUNING_WORKERS = 1024  # as many as one likes: how many run at once is the evaluations' to decide
# Ray replaces 127.0.0.1 by the machine's outer address, and listens there, unless this is "0".
_OUTER_ADDRESS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def session(config: ClusterConfig, *, workers: int, temp_dir: Path | None = None) -> Iterator[None]:
    """Connects this process to Ray and leaves it as it was found.

    A process that is connected already stays so, before and after. SIGTERM ends the block by
    ``SystemExit(143)``, so that a Ray of our own does not outlive the job; where the process is killed
    outright, Ray's processes notice by themselves.

    Args:
        workers: training workers that must fit, besides ``config.evaluations``.
        temp_dir: where a Ray of our own keeps sockets and logs; None: a new folder under /tmp, removed at
            the end.

    Raises:
        ClusterError: nothing answers at the address; not enough resources; a port in use; ``temp_dir`` has
            too long a path.
    """
    import ray

    if ray.is_initialized():
        check_resources(config, workers)
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    with _own_folder(temp_dir) if address is None else nullcontext() as folder, _as_found():
        try:
            if folder is not None:
                _start_local(config, workers, folder)
            else:
                assert address is not None
                _connect(config, address)
            check_resources(config, workers)
            with _sigterm_as_exit():
                yield
        finally:
            ray.shutdown()


def _start_local(config: ClusterConfig, workers: int, folder: Path) -> None:
    import ray

    if config.dashboard_port is not None:
        _refuse_used_port(config.dashboard_port)
    _use_outer_address("0")
    # With a token lying in the home directory Ray would turn authentication on, unasked.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for reports to Ray's makers
    bundle = config.worker.bundle()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options: dict[str, object] = {}
    if config.dashboard_port is not None:
        options["dashboard_port"] = config.dashboard_port
    ray.init(
        address="local",
        num_cpus=config.num_cpus or max(cores, math.ceil(workers * bundle.get("CPU", 0))),
        resources={
            EVALUATION_RESOURCE: config.evaluations,
            FINE_TUNING_RESOURCE: _FINE_TUNING_WORKERS,
            **{name: amount * workers for name, amount in config.worker.resources.items()},
        },
        object_store_memory=config.object_store_mb * 2**20,
        include_dashboard=config.dashboard_port is not None,
        log_to_driver=config.show_worker_output,
        logging_level=logging.WARNING,
        runtime_env=_driver_environment(config, local=True),
        job_config=_job_config(),
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
        **options,
    )


def _connect(config: ClusterConfig, address: str) -> None:
    import ray

    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise ClusterError(f'RAY_ADDRESS is "{address}", expected "auto" or "host:port"')
        if not _answers(host, int(port)):
            raise ClusterError(f"no Ray cluster answers at {address} (tried for {_PROBE_S:g} s)")
        if is_loopback(host) and not _answers(_outer_address(), int(port)):
            _use_outer_address("0")  # a cluster that listens on loopback only
    try:
        ray.init(
            address=address,
            log_to_driver=config.show_worker_output,
            logging_level=logging.WARNING,
            runtime_env=_driver_environment(config, local=False),
            job_config=_job_config(),
        )
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """Why Ray does not take this driver, in one line."""
    import ray

    # What Ray says: "... cluster was started with:\n Ray: 1\n Python: 2\nThis process ... with:\n Ray: 3\n Python: 4"
    versions = re.findall(r"^\s*(Ray|Python):\s*(\S+)", str(error), re.MULTILINE)
    if [name for name, _ in versions] != ["Ray", "Python", "Ray", "Python"]:
        return in_one_line(error)
    theirs, ours = dict(versions[:2]), dict(versions[2:])
    # Said by the cluster or by this process; which of the two comes first is Ray's wording.
    if (ours["Ray"], ours["Python"]) != (ray.__version__, platform.python_version()):
        theirs, ours = ours, theirs
    return (
        f"it runs Python {theirs['Python']} and Ray {theirs['Ray']}, this is Python {ours['Python']} and Ray "
        f"{ours['Ray']}; start the cluster with Python {ours['Python']} and Ray {ours['Ray']}, or glscl with "
        f"Python {theirs['Python']} and Ray {theirs['Ray']}"
    )


def _job_config() -> JobConfig:
    """What Ray puts on its workers' import path: glscl's packages, where they are not installed.

    Ray by itself puts the driver's current folder first, and a ``model.py`` or ``statistics.py`` in it would be
    imported in place of ours or of Python's.
    """
    from ray.job_config import JobConfig

    class WithoutCurrentFolder(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # then Ray adds nothing: a working directory replaces the current folder

    # The folder of a submitted job is on its workers' path already, on each machine under its own name.
    sent = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return WithoutCurrentFolder(_py_driver_sys_path=[] if sent else [import_path.ROOT])


def _driver_environment(config: ClusterConfig, *, local: bool) -> dict[str, object] | None:
    """Ray's runtime_env for this driver. In a submitted job the submission settled it; on this machine no
    packages are installed, the interpreter has them."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    environment = config.environment.runtime_env()
    if local:
        environment.pop("pip", None)
    else:
        # Workers run in the folder that `ray start` was called in: their loader processes must not import from it.
        ours = {"PYTHONSAFEPATH": "1", import_path.FOLDER_VARIABLE: import_path.current_folder()}
        variables = environment.get("env_vars", {})
        assert isinstance(variables, dict)
        environment["env_vars"] = {**ours, **variables}
    return environment or None


@contextmanager
def _own_folder(given: Path | None) -> Iterator[Path]:
    """``given``, or a new folder under /tmp removed afterwards, along with those of killed sessions."""
    if given is not None:
        folder = given.absolute()
        if len(str(folder)) > _LONGEST_TEMP_DIR:
            raise ClusterError(
                f"Ray's folder {folder} has a path of more than {_LONGEST_TEMP_DIR} characters"
            )
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    _remove_abandoned_folders()
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir="/tmp"))
    # The kernel drops the lock with this process, whatever kills it.
    with open(folder / "owner.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned_folders() -> None:
    for lock_path in Path("/tmp").glob(f"{_FOLDER_PREFIX}*/owner.lock"):
        with suppress(OSError), open(lock_path, "r+") as lock:
            if os.fstat(lock.fileno()).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_path.parent, ignore_errors=True)


@contextmanager
def _as_found() -> Iterator[None]:
    """Puts back what Ray and this module change in the process: signal handlers, the environment."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = (
        {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if in_main else {}
    )
    outer = os.environ.get(_OUTER_ADDRESS_VARIABLE)
    for_children = {**import_path.child_environment(), **direct_environment()}
    before = {name: os.environ.get(name) for name in for_children}
    os.environ.update(for_children)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _use_outer_address(outer)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM within the block ends it by ``SystemExit(143)``.

    On the way it is a KeyboardInterrupt: a SystemExit that a handler raises while Ray waits in its C++ code
    ends the process on the spot, with status 1 and without any clean-up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    received = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise


def _use_outer_address(value: str | None) -> None:
    """Whether Ray takes the machine's outer address for 127.0.0.1, in this process and in those it starts."""
    if value is None:
        os.environ.pop(_OUTER_ADDRESS_VARIABLE, None)
    else:
        os.environ[_OUTER_ADDRESS_VARIABLE] = value
    if constants := sys.modules.get("ray._private.ray_constants"):
        vars(constants)["ENABLE_RAY_CLUSTER"] = value != "0"  # read from the environment at import only


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_PROBE_S):
            return True
    except OSError:
        return False


def _outer_address() -> str:
    """The address this machine would send from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: belongs to nobody
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _refuse_used_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"cluster.dashboard_port: {port} is in use on this machine ({error.strerror})"
            ) from None
