"""MFU: the FLOPs that a step needs, over what the devices of all workers could have done in its time.

(Model FLOPs utilisation as of PaLM, arXiv 2204.02311, appendix B: what is computed twice to save memory counts
once.) On a CPU, and on a device that ``devices`` does not list, the peak is the measured rate of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.goodput.devices import peak_of

if TYPE_CHECKING:
    from cluster.workers import WorkerContext
    from pipeline.goodput.records import AttemptRecorder


class Utilisation:
    """Worker 0 counts its own batches, which stand for those of all.

    Args:
        step_flops: ``(stage, batch)`` -> FLOPs of this worker's forward and backward, 0 where nobody knows.
        precision: as ``train.precision``.
    """

    def __init__(
        self,
        step_flops: Callable[[Any, Any], float],
        precision: str,
        context: WorkerContext,
        recorder: AttemptRecorder,
    ) -> None:
        self._step_flops, self._precision, self._recorder = step_flops, precision, recorder
        self._device = context.device
        self._workers = context.world_size if context.rank == 0 else 0
        self._peak, self._name = 0.0, ""  # not measured yet
        self._flops = 0.0

    def add(self, stage: Any, batch: Any) -> None:
        """One more contrastive batch of the present step. The first time it is collective."""
        with self._recorder.clock.phase("other"):
            if not self._name:
                self._measure()
            if self._workers:
                self._flops += self._step_flops(stage, batch) * self._workers

    def _measure(self) -> None:
        """Once there is a batch: until then what starts beside the worker (loader processes) takes its cores.

        All workers measure at once, as those of one machine share its cores.
        """
        rate, self._name = peak_of(self._device, self._precision)
        rates = torch.tensor([rate], dtype=torch.float64, device=self._device)
        dist.all_reduce(rates)
        self._peak = float(rates[0])

    def of_step(self, seconds: float) -> dict[str, float]:
        """``speed/mfu`` of the step that ends now; nothing where nobody counts."""
        flops, self._flops = self._flops, 0.0
        if not flops:
            return {}
        self._recorder.computed(flops, self._peak, self._name)
        return {"speed/mfu": flops / (seconds * self._peak)}
