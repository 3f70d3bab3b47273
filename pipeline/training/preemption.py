"""Leaving when told to: all workers at the same step, with a checkpoint of it.

SIGTERM reaches one worker (its machine is taken back), or word from the driver reaches the first one
(``cluster.notice``). After each step all agree on whether anybody was told anything, so that all write the checkpoint
and none waits in a collective for one that has gone. A notice that comes while a checkpoint is written, or while
the loader starts, is kept and agreed on at the next occasion: before the first step, or after the next one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from cluster.notice import Leaving, Reason
from cluster.workers import WorkerContext
from pipeline.training.checkpoints.writer import CheckpointWriter


class Preemption:
    """What the workers have agreed on. From its making on, SIGTERM does not end the process.

    Attributes:
        agreed: why all workers are to leave; ``NONE`` as long as they are not.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self.agreed = Reason.NONE
        context.notice.attend()

    def agree(self) -> bool:
        """Whether any worker was told to leave. Collective: one number."""
        reason = torch.tensor([int(self._context.notice.reason)], device=self._context.device)
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        self.agreed = Reason(int(reason))
        return self.agreed is not Reason.NONE

    def leave(self, checkpoints: CheckpointWriter) -> None:
        """Leave if that was agreed on, once the checkpoint under way is committed. Collective.

        Raises:
            Leaving: on all workers alike.
        """
        if self.agreed is Reason.NONE:
            return
        checkpoints.wait()
        dist.barrier()  # who leaves first takes the others with him: worker 0 must have committed
        raise Leaving(self.agreed)
