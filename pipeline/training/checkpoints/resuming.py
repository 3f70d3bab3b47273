"""The newest good checkpoint into an engine, whatever number of workers and ZeRO stage wrote it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pipeline.training.checkpoints.fragments import Pieces, Stretch
from pipeline.training.checkpoints.record import (
    Checkpoint,
    fetch_files,
    files_below,
    list_checkpoints,
)
from pipeline.training.checkpoints.state import Restoring, held, restore_loss_scale
from sharding.errors import BadData, UserError
from sharding.storage import Storage

if TYPE_CHECKING:
    from cluster.workers import WorkerContext

logger = logging.getLogger(__name__)


def resume(
    engine: Any,
    run: Storage,
    context: WorkerContext,
    scratch: Path,
    *,
    expected: dict[str, Any],
    warn: Callable[[str], None],
) -> Checkpoint | None:
    """Load the newest checkpoint that verifies into ``engine``; None when there is none. Collective.

    Args:
        expected: the record's entries that must be equal (data digests, seed, ...).
        warn: told, on worker 0, of each checkpoint that is passed over.

    Raises:
        UserError: the run was made with something else of ``expected``.
    """
    folder = scratch / f"resume-{context.node_rank}"
    wanted = [piece.stretch for piece in held(engine, saving=False)]
    for candidate in _agreed_candidates(run, context):
        _refuse_mismatch(candidate, expected, run)
        fetched = _Fetched(run, context, candidate, folder)
        causes = fetched.fetch(wanted)
        if causes:
            fetched.clear()
            if context.rank == 0:
                passed = f"checkpoint of step {candidate.step} is damaged and passed over for the one before"
                warn(f"{passed}: {'; '.join(causes)}")
            continue
        with Pieces(fetched.paths) as pieces, Restoring(engine):
            for piece in held(engine, saving=False):
                piece.fill(pieces)
        fetched.clear()
        restore_loss_scale(engine, candidate.record.get("loss_scale"))
        engine.global_steps = candidate.step
        return candidate
    return None


class _Fetched:
    """The files of a checkpoint that this node's workers need, on its disk.

    Where the group is of the size that wrote the checkpoint, each worker needs its own file; where it is not, or a
    worker holds other stretches now, the node takes all.
    """

    def __init__(self, run: Storage, context: WorkerContext, checkpoint: Checkpoint, folder: Path) -> None:
        self._run, self._context, self._checkpoint, self._folder = run, context, checkpoint, folder
        self.paths: list[Path] = []

    def fetch(self, wanted: list[Stretch]) -> list[str]:
        """Returns what is wrong with the checkpoint, the same on every worker; nothing: it is good. Collective."""
        every = list(files_below(self._checkpoint, "state"))
        own = f"state/worker-{self._context.rank:05d}.safetensors"
        if self._checkpoint.record["world_size"] == self._context.world_size and own in every:
            faults, lacking = self._agree(self._take([own], wanted))
            if faults or not lacking:
                return faults
        faults, _ = self._agree(self._take(every, []) if self._context.local_rank == 0 else ("", False))
        if faults:
            return faults
        self.paths = [self._folder / name for name in every]
        faults, _ = self._agree(self._look(wanted, must_have=True))
        return faults

    def clear(self) -> None:
        """Remove the files once all workers of the node are done with them. Collective."""
        dist.barrier()
        if self._context.local_rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, names: list[str], wanted: list[Stretch]) -> tuple[str, bool]:
        try:
            fetch_files(self._run, self._checkpoint, names, self._folder)
        except BadData as error:
            return str(error), False
        self.paths = [self._folder / name for name in names]
        return self._look(wanted)

    def _look(self, wanted: Iterable[Stretch], *, must_have: bool = False) -> tuple[str, bool]:
        """(what is wrong with the files, whether something wanted is not in them)."""
        try:
            with Pieces(self.paths) as pieces:
                missing = pieces.missing(wanted)
        except BadData as error:
            return str(error), False
        if missing and must_have:
            return f"missing-piece: {missing[0]} and {len(missing) - 1} more are in no file", True
        return "", bool(missing)

    def _agree(self, outcome: tuple[str, bool]) -> tuple[list[str], bool]:
        outcomes: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(outcomes, outcome)
        return [fault for fault, _ in outcomes if fault], any(lacking for _, lacking in outcomes)


def _agreed_candidates(run: Storage, context: WorkerContext) -> list[Checkpoint]:
    """The checkpoints worker 0 sees, newest first: every worker must try the same ones in the same order."""
    box: list[Any] = [list_checkpoints(run)[::-1] if context.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, device=context.device)
    candidates: list[Checkpoint] = box[0]
    return candidates


def _refuse_mismatch(checkpoint: Checkpoint, expected: dict[str, Any], run: Storage) -> None:
    url = run.url_of(checkpoint.path)
    for key, value in expected.items():
        if checkpoint.record.get(key) != value:
            raise UserError(
                f"{url}: {key} was {checkpoint.record.get(key)!r}, now it is {value!r}; "
                "a run goes on with what it began with: give the job another name to start anew"
            )
