"""Which worker is the slowest, and whether it always is.

In a step all workers wait for the slowest in its collectives, so that their steps take the same time. What tells them
apart is what each does before: the wait for data, and the forward of the encoders, before anything is gathered.
(Under ZeRO 3 the encoders gather their parameters; only the wait for data is then a worker's own.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch

from pipeline.training.health.config import HealthBlock

if TYPE_CHECKING:
    from cluster.workers import WorkerContext

#: The model's parts that a worker computes by itself (``model.glscl``).
_ENCODERS = ("text_encoder", "vision_encoder")
#: A lead that is less than this share of the step delays nobody.
_LEAST_DELAY = 0.05


class Stragglers:
    """One worker's own seconds, and what all of them say.

    Args:
        engine: whose model's encoders are timed.
        tell: is told of a worker that is mostly the slowest, once a window.
    """

    def __init__(
        self, config: HealthBlock, engine: Any, context: WorkerContext, tell: Callable[[str], None]
    ) -> None:
        self._config, self._context, self._tell = config, context, tell
        self._began = time.monotonic()
        self._waited = 0.0
        self._timers: list[_Timer] = []
        for name, module in engine.module.named_modules():
            if name.rpartition(".")[2] in _ENCODERS:
                self._timers.append(_Timer(module, context.device))
        self._steps = 0
        self._slow: Counter[int] = Counter()
        self._metrics: dict[str, float] = {}

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = time.monotonic(), 0.0

    def waited(self, seconds: float) -> None:
        """For a batch of this step."""
        self._waited += seconds

    def own(self) -> list[float]:
        """This worker's own seconds of the step, and those of the step so far."""
        own = self._waited + sum(timer.take() for timer in self._timers)
        return [own, time.monotonic() - self._began]

    def update(self, everywhere: Sequence[Sequence[float]]) -> None:
        """What :meth:`own` was on each worker, by rank; the same argument on all of them."""
        owns = [own for own, _ in everywhere]
        middle, longest = median_low(owns), max(owns)
        slowest, ratio = owns.index(longest), longest / max(middle, 1e-9)
        if len(owns) > 1:
            self._metrics = {"health/slowest_worker": float(slowest), "health/slowest_ratio": ratio}
        delays = longest - middle > _LEAST_DELAY * max(step for _, step in everywhere)
        if delays and ratio > self._config.straggler_ratio:
            self._slow[slowest] += 1
        self._steps += 1
        if self._steps == self._config.straggler_window:
            for rank, times in self._slow.items():
                if times > self._steps / 2:
                    self._tell(
                        f"worker {rank} was the slowest in {times} of the last {self._steps} steps, more than "
                        f"{self._config.straggler_ratio:g} times the median; in the last one its data and encoders "
                        f"took {owns[rank]:.3g} s, those of the median worker {middle:.3g} s"
                    )
            self._steps, self._slow = 0, Counter()

    def metrics(self) -> dict[str, float]:
        """Of the last step; nothing for a worker alone."""
        return self._metrics


class _Timer:
    """Seconds in the forwards of a module: on the device, where it has a clock of its own."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        module.register_forward_pre_hook(self._mark)
        module.register_forward_hook(self._mark)

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks = []
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in pairs))
        if pairs:
            pairs[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000

    def _mark(self, *_: Any) -> None:
        if not self._on_gpu:
            self._marks.append(time.monotonic())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
