"""Which checkpoints may go. Decided in the driver, where it is known what evaluations still need."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeline.training.checkpoints import Checkpoint
from pipeline.training.config import CheckpointBlock


def expendable(
    checkpoints: Sequence[Checkpoint], rules: CheckpointBlock, *, pinned: Collection[int], best: int | None
) -> list[Checkpoint]:
    """The checkpoints that no rule keeps.

    Kept: the newest ``keep_last``, not counting those between two that were written on leaving, of which only the
    very newest is of use; every multiple of ``keep_every`` steps; the ends of stages (each starts the
    next, and is what people compare); the ``best`` step; the ``pinned`` steps (evaluations not done yet).
    """
    by_step = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    regular = [checkpoint for checkpoint in by_step if not checkpoint.record.get("interim")]
    newest = {checkpoint.step for checkpoint in [*regular[-rules.keep_last :], *by_step[-1:]]}

    def kept(checkpoint: Checkpoint) -> bool:
        return (
            checkpoint.step in newest
            or checkpoint.step in pinned
            or checkpoint.step == best
            or bool(checkpoint.record.get("stage_end"))
            or (rules.keep_every is not None and checkpoint.step % rules.keep_every == 0)
        )

    return [checkpoint for checkpoint in by_step if not kept(checkpoint)]
