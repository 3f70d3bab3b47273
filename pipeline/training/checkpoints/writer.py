"""Writing checkpoints beside the training.

::

    training     step 100 | snapshot | step 101 | step 102 | ...
    background                       | files, upload, part | (worker 0:) all parts there -> ledger, metrics -> commit

The snapshot, a copy of this worker's pieces in host memory, is all that the training waits for; and for the write
before, if it still goes on.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pipeline.patience import patiently
from pipeline.training.checkpoints.fragments import Stretch, write_pieces
from pipeline.training.checkpoints.record import FOLDER, FORMAT, VERSION, Checkpoint, commit
from pipeline.training.checkpoints.state import held, loss_scale, whole_weights
from sharding.errors import StorageFault, StorageRefused
from sharding.storage import Storage
from sharding.storage_file import passes

if TYPE_CHECKING:
    from cluster.workers import WorkerContext

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_POLL_S = 0.2  # first look for the other workers' parts
_LONGEST_POLL_S = 2.0
#: For so long a local disk that is full is waited for: unlike the storage it is seldom somebody else's to mend.
_SCRATCH_PATIENCE_S = 60.0


@dataclass(frozen=True)
class _Snapshot:
    """What goes into a checkpoint, apart from the engine, which trains on."""

    step: int
    path: str  # below the run's folder
    record: dict[str, Any]
    values: dict[Stretch, dict[str, torch.Tensor]]
    updates: dict[Stretch, int]
    weights: dict[str, torch.Tensor]  # worker 0


class CheckpointWriter:
    """One worker's side of writing checkpoints. To be closed: what is under way is then waited for.

    Args:
        run: the run's folder.
        context: this worker.
        scratch: local folder for files on their way.
        committed: told on worker 0, in the background, of each checkpoint once it exists.
    """

    def __init__(
        self,
        run: Storage,
        context: WorkerContext,
        scratch: Path,
        *,
        committed: Callable[[Checkpoint], None] | None = None,
    ) -> None:
        self._run, self._context = run, context
        self._scratch = scratch / f"checkpoint-{context.rank}"
        self._committed = committed
        self._buffers: dict[tuple[Stretch, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._seconds: float | None = None

    def save(
        self,
        engine: Any,
        *,
        step: int,
        stage: int,
        details: dict[str, Any],
        before_commit: Callable[[], dict[str, Any]],
    ) -> None:
        """Take a snapshot and write it in the background. Collective: every worker calls it at the same step.

        Args:
            details: goes into the record (data digests, seed, MLflow run, ...).
            before_commit: called on worker 0 in the background, once everything else is in storage: what must be
                safe before the checkpoint exists. What it returns goes into the record too. It is called again
                after a StorageFault.

        Raises:
            StorageFault, OSError: of the write before.
        """
        self.wait()
        context = self._context
        drawn: list[Any] = [None] * context.world_size
        dist.all_gather_object(drawn, (context.node_rank, secrets.token_hex(4)))
        token = drawn[0][1]  # worker 0's: names this write's folder
        record = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "stage": stage,
            "world_size": context.world_size,
            "nodes": len({node for node, _ in drawn}),
            "loss_scale": loss_scale(engine),
            **details,
        }
        values, updates = self._copy(engine)
        snapshot = _Snapshot(
            step,
            f"{FOLDER}/step-{step:08d}-{token}",
            record,
            values,
            updates,
            whole_weights(engine, keep=context.rank == 0),
        )
        self._thread = threading.Thread(
            target=self._write, args=(engine.module, snapshot, before_commit), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise here what went wrong in the background."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until nothing is under way; raises as :meth:`check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """See :meth:`wait`."""
        self.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def seconds(self) -> float | None:
        """How long the last write took in the background; told once."""
        seconds, self._seconds = self._seconds, None
        return seconds

    def _copy(self, engine: Any) -> tuple[dict[Stretch, dict[str, torch.Tensor]], dict[Stretch, int]]:
        """This worker's pieces in host memory, the same memory at every checkpoint."""
        values: dict[Stretch, dict[str, torch.Tensor]] = {}
        updates = {}
        for piece in held(engine, saving=True):
            copies = values.setdefault(piece.stretch, {})
            for kind, tensor in piece.values().items():
                buffer = self._buffers.get((piece.stretch, kind))
                if buffer is None:
                    pinned = tensor.is_cuda
                    buffer = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=pinned)
                    self._buffers[piece.stretch, kind] = buffer
                buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                copies[kind] = buffer
            updates[piece.stretch] = piece.updates()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return values, updates

    def _write(self, module: Any, snapshot: _Snapshot, before_commit: Callable[[], dict[str, Any]]) -> None:
        began = time.monotonic()
        try:
            files = self._upload(module, snapshot)
            if self._context.rank == 0:
                self._commit(snapshot, files, before_commit)
            else:
                part = f"{snapshot.path}/{_part(self._context.rank)}"
                self._patiently(partial(self._run.write_bytes, part, _encoded(files)))
            self._seconds = time.monotonic() - began
        except BaseException as error:  # noqa: BLE001 - raised again in the training's thread
            self._error = error

    def _upload(self, module: Any, snapshot: _Snapshot) -> dict[str, dict[str, Any]]:
        """This worker's files into storage; returns their sizes and sums."""
        patiently(
            partial(self._write_scratch, module, snapshot), "the checkpoint", patience_s=_SCRATCH_PATIENCE_S
        )
        files = {}
        for source in sorted(path for path in self._scratch.rglob("*") if path.is_file()):
            name = source.relative_to(self._scratch).as_posix()
            uploaded = self._patiently(partial(self._run.upload, source, f"{snapshot.path}/{name}"))
            files[name] = {"size": uploaded.size, "sha256": uploaded.sha256}
        shutil.rmtree(self._scratch, ignore_errors=True)
        return files

    def _write_scratch(self, module: Any, snapshot: _Snapshot) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        name = f"state/worker-{self._context.rank:05d}.safetensors"
        with _scratch_disk(self._scratch):
            (self._scratch / "state").mkdir(parents=True)
            write_pieces(self._scratch / name, snapshot.values, snapshot.updates)
            if snapshot.weights:
                module.save_pretrained(self._scratch / "model", state_dict=snapshot.weights)

    def _commit(
        self,
        snapshot: _Snapshot,
        files: dict[str, dict[str, Any]],
        before_commit: Callable[[], dict[str, Any]],
    ) -> None:
        for rank in range(1, self._context.world_size):
            files = files | self._patiently(partial(self._await_part, snapshot.path, rank))
        record = {**snapshot.record, **self._patiently(before_commit), "files": dict(sorted(files.items()))}
        saved = self._patiently(partial(commit, self._run, snapshot.path, record))
        logger.info("checkpoint of step %d committed (%s)", saved.step, saved.digest[:12])
        if self._committed is not None:
            self._patiently(partial(self._committed, saved))

    def _patiently(self, act: Callable[[], _Result]) -> _Result:
        """The training goes on beside it, and waits for it at the next checkpoint."""
        return patiently(act, "the checkpoint")

    def _await_part(self, path: str, rank: int) -> dict[str, dict[str, Any]]:
        """What another worker has uploaded. A worker that fails ends the group, and this thread with it."""
        pause = _POLL_S
        while True:
            try:
                return _decoded(self._run.read_bytes(f"{path}/{_part(rank)}"))
            except FileNotFoundError:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL_S)


@contextmanager
def _scratch_disk(folder: Path) -> Iterator[None]:
    """Faults of the disk of ``folder`` in one line that names it.

    Raises:
        StorageFault, StorageRefused: it is full, read-only, ...; safetensors tells all of these alike.
    """
    where = f"cannot write {folder} (local scratch, below TMPDIR)"
    try:
        yield
    except SafetensorError as error:
        raise StorageFault(f"{where}: {error}") from None
    except OSError as error:
        kind = StorageFault if passes(error) else StorageRefused
        raise kind(f"{where}: {error.strerror or error}", error) from None


def _part(rank: int) -> str:
    return f"parts/worker-{rank:05d}.json"


def _encoded(files: dict[str, dict[str, Any]]) -> bytes:
    return json.dumps(files, sort_keys=True).encode()


def _decoded(data: bytes) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = json.loads(data)
    return files
