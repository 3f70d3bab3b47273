"""A group of training workers: Ray Train places and restarts it, ``torch.distributed`` connects it.

What ends a run and what restarts the group:

* a process or a node dies: the group starts anew, up to ``max_failures`` times, and calls the function again;
* Ray kills a process because its node runs out of memory: the run ends, as it would each time;
* the function raises: the run ends at once, on every worker. ``no_retry`` types reach the caller as they are;
* the function leaves because it was told to (``cluster.notice``): the group starts anew, which counts as no death,
  or ends, where it was the driver who said so.

A death makes noise on the workers that live (connections reset in a collective), so such an error counts as
the echo of a death, not as the function's.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from cluster.board import Board
from cluster.config import ClusterConfig
from cluster.deaths import DeathsInARow
from cluster.elastic import AdmissibleSizes
from cluster.errors import WorkerGroupError, WorkerOutOfMemory, WorkersStopped, cause_of
from cluster.loopback import ask_loopback_directly
from cluster.notice import Leaving, Notice, Reason, ask_to_end, catch_sigterm, current_notice
from cluster.resources import check_resources

if TYPE_CHECKING:
    import torch

_LOOPBACK = "127.0.0.1"
_TRACEBACK_LINES = 30
_POLL_S = 1.0  # how often Ray looks after the workers
_STOP_POLL_S = 0.2  # how often it is looked whether they are to end
_NOISE_WAIT_S = 5.0  # for Ray to notice the death behind a reset connection, so that it is the one named
_START_FAILURES = 10  # a group that could not be started

# What the living say when another process died: gloo's and NCCL's sockets, the store, a loader process, sharding's
# prefetcher.
_NOISE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket (closed|timeout)"
    r"|gloo.*(peer|timed out)"
    r"|nccl.*(remote|system|internal|unhandled|watchdog)|distnetworkerror|recvvalue failed|failed to recv"
    r"|dataloader worker.*(killed|exited unexpectedly)|prefetching process was killed"
    r"|^eoferror",  # a batch on its way out of a loader process that was killed
    re.IGNORECASE | re.DOTALL,
)


def is_noise(error: BaseException) -> bool:
    """Whether an error of the function's only says that some other process has died."""
    return _NOISE.search(f"{type(error).__name__}: {error}") is not None


@dataclass(frozen=True)
class WorkerContext:
    """Where a worker stands in its group, and what it was told (``notice``)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    device: torch.device
    notice: Notice = field(default_factory=Notice)


def run_workers(
    function: Callable[[WorkerContext, Any], None],
    argument: Any,
    *,
    workers: int,
    config: ClusterConfig,
    name: str,
    max_failures: int,
    scratch: Path,
    sizes: Sequence[int] = (),
    progress: Callable[[], int] | None = None,
    no_retry: tuple[type[BaseException], ...] = (ValueError,),
    stop: threading.Event | None = None,
    patience_s: float = 60.0,
    grace_s: float = 0.0,
) -> None:
    """Calls ``function(context, argument)`` in ``workers`` processes and returns when all have returned.

    ``torch.distributed`` is initialised in each (gloo on CPU, NCCL on CUDA). After a death the function is
    called again from the start: it finds its own checkpoints. Ray must be connected (``cluster.session``); this
    may be called within one of its actors, whose death ends the workers.

    Args:
        function: importable or picklable, as is ``argument``.
        sizes: numbers of workers, ascending and up to ``workers``, with which the group may do when nodes are lost
            (see ``cluster.elastic``); none: always with all.
        name: of the run, for Ray's own logs.
        max_failures: how many deaths of a process or node are made good; without getting on in between, where
            ``progress`` tells how far the function has come.
        progress: a number that grows as the function gets on, picklable; asked in a process of Ray's.
        scratch: a folder for Ray Train's own notes; nothing in it outlives its use.
        no_retry: exceptions of the function that are raised here with their type and message, the worker's
            traceback as ``__cause__``.
        stop: whoever sets it ends the workers where they are, as SIGKILL does; to be called from the main thread.
        patience_s: how long a start of the group waits for room that others hold now.
        grace_s: how long after SIGINT (or what the session makes of SIGTERM) the workers may take to leave in
            good order; a second signal ends the wait.

    Raises:
        ClusterError: the cluster cannot hold the workers.
        WorkerOutOfMemory: Ray killed one for its node's memory.
        WorkerGroupError: the function raised anything else, or workers died too often.
        WorkersStopped: ``stop`` was set before the function had returned everywhere.
        KeyboardInterrupt: on SIGINT, after the workers were stopped.
    """
    sizes = sorted({*sizes, workers})
    check_resources(config, sizes[0])
    asked = stop or threading.Event()
    if asked.is_set():
        raise WorkersStopped("the workers were stopped before they began")
    board = Board() if grace_s else None
    trainer = _Trainer(
        sizes,
        progress,
        _Entry(function, argument, no_retry, board),
        train_loop_config={},
        torch_config=_GroupConfig(threads=config.worker.threads),
        scaling_config=ScalingConfig(
            num_workers=workers if len(sizes) == 1 else (sizes[0], workers),
            elastic_resize_monitor_interval_s=config.grow_check_s,
            use_gpu=config.worker.gpus > 0,
            resources_per_worker=config.worker.bundle(),
            placement_strategy=config.placement,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(scratch.absolute()),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=_START_FAILURES),
            callbacks=[_EndOnError()],
        ),
    )
    with _quiet_ray_train(patience_s), _end_when(asked, trainer):
        try:
            _fit(trainer, max_failures, asked)
        except KeyboardInterrupt:
            _end_in_good_order(trainer, board, grace_s)
            raise


def _end_in_good_order(trainer: _Trainer, board: Board | None, grace_s: float) -> None:
    """After an interrupt: the workers may leave by themselves within the time; then whoever is left is killed."""
    import ray

    if trainer.controller is None:
        return
    try:
        if board is not None:
            ask_to_end(board)
            deadline = time.monotonic() + grace_s
            while time.monotonic() < deadline and not trainer.has_ended():
                time.sleep(_STOP_POLL_S)
    finally:
        ray.kill(trainer.controller)  # the workers are its own and go with it


@contextmanager
def _end_when(asked: threading.Event, trainer: _Trainer) -> Iterator[None]:
    """Kills the controller once ``asked`` is set; the workers are its own and go with it."""
    import ray

    over = threading.Event()

    def kill() -> None:
        while not over.wait(_STOP_POLL_S):
            if asked.is_set() and trainer.controller is not None:
                ray.kill(trainer.controller)
                return

    thread = threading.Thread(target=kill, name="stop-workers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _fit(trainer: _Trainer, max_failures: int, asked: threading.Event) -> None:
    import ray
    from ray.train import ControllerError, TrainingFailedError
    from ray.train import WorkerGroupError as RayWorkerGroupError

    try:
        trainer.fit()
    except ray.exceptions.RayActorError as error:
        if asked.is_set():
            raise WorkersStopped("the workers were stopped") from None
        raise WorkerGroupError(f"Ray's controller of the workers died: {cause_of(error)}") from error
    except ControllerError as error:
        failure = error.controller_failure
        if isinstance(failure, _KilledForMemory):
            raise WorkerOutOfMemory(failure.summary, failure.rank) from error
        if not isinstance(failure, _FunctionFailed):
            raise WorkerGroupError(f"the workers could not be started: {cause_of(failure)}") from error
        report = WorkerGroupError(
            f"worker {failure.rank} failed: {failure.summary}\n{failure.traceback_tail}", failure.rank
        )
        if failure.original is not None:
            raise failure.original from report
        raise report from None
    except RayWorkerGroupError as error:
        # Deaths come before what the living say of them.
        rank, first = min(
            error.worker_failures.items(), key=lambda item: (isinstance(item[1], _FunctionFailed), item[0])
        )
        how = "lost its connections" if isinstance(first, _FunctionFailed) else "died"
        cause = cause_of(getattr(first, "health_check_failure", first))
        raise WorkerGroupError(
            f"worker {rank} {how}, and {max_failures} earlier deaths had been made good: {cause}", rank
        ) from error
    except TrainingFailedError as error:
        raise WorkerGroupError(cause_of(error)) from error


class _Trainer(TorchTrainer):
    """Ray's own, but SIGINT stays a KeyboardInterrupt (Ray's handler ends the process without clean-up), and
    there is no process for Ray Data, which no worker here reads from."""

    controller: Any = None

    def __init__(
        self, sizes: Sequence[int], progress: Callable[[], int] | None, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._sizes, self._progress = sizes, progress

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if len(self._sizes) > 1:
            options["scaling_policy"] = AdmissibleSizes(self.scaling_config, self._sizes)
        if self._progress is not None:
            options["failure_policy"] = DeathsInARow(self.run_config.failure_config, self._progress)
        return super()._initialize_and_run_controller(**options)

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, DatasetsCallback)
        ]

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def has_ended(self) -> bool:
        """Whether the controller has come to an end, whichever."""
        import ray

        try:
            ray.get(self.controller.get_result.remote(), timeout=_POLL_S)
        except (ValueError, ray.exceptions.GetTimeoutError):  # Ray's way to say "not yet", or a busy machine
            return False
        except ray.exceptions.RayError:
            return True
        return True


class _Left(RayActorError):
    """A worker left as it was told to. Ray counts it with the nodes that were taken back, not with the deaths."""

    def __init__(self, rank: int) -> None:
        super().__init__(error_msg=f"worker {rank} was told to leave", preempted=True)
        self.rank = rank

    def __reduce__(self) -> tuple[type[_Left], tuple[int]]:
        return _Left, (self.rank,)


class _FunctionFailed(Exception):
    """The function raised on a worker. ``noise``: perhaps only the echo of another process's death."""

    def __init__(
        self, rank: int, summary: str, traceback_tail: str, original: BaseException | None, noise: bool
    ) -> None:
        super().__init__(rank, summary, traceback_tail, original, noise)
        self.rank = rank
        self.summary = summary
        self.traceback_tail = traceback_tail
        self.original = original
        self.noise = noise

    def __str__(self) -> str:
        return f"{self.summary}\n{self.traceback_tail}"


class _KilledForMemory(Exception):
    """Ray's memory monitor killed a worker."""

    def __init__(self, rank: int, summary: str) -> None:
        super().__init__(rank, summary)
        self.rank = rank
        self.summary = summary


class _EndOnError(UserCallback):
    """In Ray's controller: raises where the function failed, which ends the run whatever retries are left.

    (Ray itself retries on any exception. An error of the controller's is final.)
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        from ray.exceptions import OutOfMemoryError

        for rank, error in sorted(worker_exceptions.items()):
            cause = getattr(error, "health_check_failure", error)
            if isinstance(cause, OutOfMemoryError):
                raise _KilledForMemory(rank, _first_line(cause))
        failures = [e for _, e in sorted(worker_exceptions.items()) if isinstance(e, _FunctionFailed)]
        someone_died = len(failures) < len(worker_exceptions)
        typed = [failure for failure in failures if failure.original is not None]
        bugs = [failure for failure in failures if not failure.noise and not someone_died]
        for failure in (*typed, *bugs):
            raise failure


class _Entry:
    """What runs in each worker's training thread."""

    def __init__(
        self,
        function: Callable[[WorkerContext, Any], None],
        argument: Any,
        no_retry: tuple[type[BaseException], ...],
        board: Board | None,
    ) -> None:
        self._function = function
        self._argument = argument
        self._no_retry = no_retry
        self._board = board

    def __call__(self, config: dict[str, Any]) -> None:
        import torch
        from ray.train import get_context
        from ray.train.torch import get_device

        ray_context = get_context()
        context = WorkerContext(
            rank=ray_context.get_world_rank(),
            world_size=ray_context.get_world_size(),
            local_rank=ray_context.get_local_rank(),
            local_world_size=ray_context.get_local_world_size(),
            node_rank=ray_context.get_node_rank(),
            device=get_device(),
            notice=current_notice(),
        )
        if self._board is not None and context.rank == 0:
            context.notice.listen(self._board)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        try:
            self._function(context, self._argument)
        except Leaving as leaving:
            if leaving.reason is Reason.MACHINE:
                raise _Left(context.rank) from None
        except BaseException as error:  # passed on, whatever it is, in a form that always travels
            failure = self._describe(context.rank, error)
            if failure.noise:
                time.sleep(_NOISE_WAIT_S)
            raise failure from error
        finally:
            context.notice.dismiss()

    def _describe(self, rank: int, error: BaseException) -> _FunctionFailed:
        text = "".join(traceback.format_exception(error))
        typed = isinstance(error, self._no_retry)
        return _FunctionFailed(
            rank,
            f"{type(error).__name__}: {_first_line(error)}",
            "\n".join(text.splitlines()[-_TRACEBACK_LINES:]),
            error if typed and _travels(error) else None,
            not typed and is_noise(error),
        )


def _travels(error: BaseException) -> bool:
    """Whether an exception comes out of pickling with its type and message."""
    from ray import cloudpickle

    try:
        copy = cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception class may do anything in there
        return False
    return type(copy) is type(error) and str(copy) == str(error)


def _first_line(error: object) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _prepare_worker(threads: int | None) -> str:
    """In a worker, before its process group: the environment that torch, gloo and DeepSpeed read.

    Returns the node's address.
    """
    import psutil
    import ray
    import torch
    from ray.train import get_context

    catch_sigterm()
    ask_loopback_directly()
    context = get_context()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.update(
        {
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(threads or max(1, cores // context.get_local_world_size())),
            "RANK": str(context.get_world_rank()),
            "WORLD_SIZE": str(context.get_world_size()),
            "LOCAL_RANK": str(context.get_local_rank()),
            "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        }
    )
    address = str(ray.util.get_node_ip_address())
    if address == _LOOPBACK:
        # gloo would look up the host's name, which often leads to an outer address.
        for interface, addresses in psutil.net_if_addrs().items():
            if any(entry.address == _LOOPBACK for entry in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = interface
    return address


def _host_store_on_loopback(world_size: int) -> int:
    """In the first worker: a store for the group that, unlike torch's default, only loopback reaches."""
    import torch.distributed as dist

    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        listener.listen(128)
        port = int(listener.getsockname()[1])
        _stores.append(
            dist.TCPStore(
                _LOOPBACK, port, world_size, True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        )
    return port


def _join_on_loopback(port: int, backend: str, timeout_s: int) -> None:
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update({"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port)})
    store = _stores[0] if rank == 0 else dist.TCPStore(_LOOPBACK, port, world_size, False)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


_stores: list[Any] = []  # in the first worker of a group on loopback; lives as long as the process


class _GroupBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's own, with the environment prepared first, nothing open to the outside where all is on one machine,
    and no polite farewell: a worker that waits in a collective for one that failed would hold the farewell up
    for 30 s, and all are killed right after."""

    def on_start(self, worker_group: Any, backend_config: _GroupConfig) -> None:
        addresses = worker_group.execute(_prepare_worker, backend_config.threads)
        if set(addresses) != {_LOOPBACK}:
            super().on_start(worker_group, backend_config)
            return
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        port = worker_group.execute_single(0, _host_store_on_loopback, len(addresses))
        worker_group.execute(_join_on_loopback, port, backend, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        pass


@dataclass
class _GroupConfig(TorchConfig):
    threads: int | None = None

    @property
    def backend_cls(self) -> type[_GroupBackend]:
        return _GroupBackend


@contextmanager
def _quiet_ray_train(patience_s: float) -> Iterator[None]:
    """Ray Train's settings: read from this process's environment, passed on to the workers."""
    wanted = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(_POLL_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(patience_s),
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same as in the driver
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
