"""Is a step's loss far above those before it? Median and median deviation, which a spike in the window hardly moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.training.health.config import SpikeBlock

#: Median absolute deviation of a normal distribution, to its standard deviation (1 / its 75 % quantile).
_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Spike:
    """A loss, and the largest that the steps before it would have let pass."""

    loss: float
    limit: float
    median: float


def limit_of(losses: Sequence[float], config: SpikeBlock) -> tuple[float, float]:
    """The largest loss that is no spike after these, and their median."""
    middle = median(losses)
    sigma = _TO_SIGMA * median(abs(loss - middle) for loss in losses)
    return middle + max(config.sigmas * sigma, config.least_rise * abs(middle)), middle


class SpikeWindow:
    """The losses of a stage's latest good steps, by dataset: what is easy in one is a spike in none of the others.

    All workers are told the same losses and so find the same spikes. The state goes into each checkpoint's record,
    so that a run gone on from it finds them too.

    Args:
        state: as :meth:`state` gave it; None at the beginning.
    """

    def __init__(self, config: SpikeBlock, state: Mapping[str, Any] | None) -> None:
        self._config = config
        state = state or {"stage": "", "steps": 0, "losses": {}}
        self._stage, self._steps = str(state["stage"]), int(state["steps"])
        self._losses: dict[str, list[float]] = {name: list(found) for name, found in state["losses"].items()}

    def state(self) -> dict[str, Any]:
        """Plain data, a copy."""
        losses = {name: list(found) for name, found in self._losses.items()}
        return {"stage": self._stage, "steps": self._steps, "losses": losses}

    def judge(self, stage: str, dataset: str, loss: float) -> Spike | None:
        """Whether a finite loss is a spike; to be asked once for each step, before :meth:`add`."""
        if stage != self._stage:
            self._stage, self._steps, self._losses = stage, 0, {}
        self._steps += 1
        before = self._losses.get(dataset, [])
        if self._config.action == "off" or len(before) < self._config.window:
            return None
        limit, middle = limit_of(before, self._config)
        return Spike(loss, limit, middle) if loss > limit else None

    def add(self, dataset: str, loss: float) -> None:
        """Note the loss of a step that was made."""
        if self._config.action != "off" and self._steps > self._config.warmup:
            losses = self._losses.setdefault(dataset, [])
            losses.append(loss)
            del losses[: -self._config.window]
