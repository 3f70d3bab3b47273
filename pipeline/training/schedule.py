"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Any

from pipeline.training.config import ScheduleBlock


def learning_rate_scale(step: int, total_steps: int, schedule: ScheduleBlock) -> float:
    """Factor on every group's peak learning rate at optimizer step ``step`` (counted from 0).

    Linear warm-up over the first ``schedule.warmup`` share of the run (GLSCL: 10 %), then linear or cosine
    decay to 0 at ``total_steps``, or constant.
    """
    warmup_steps = round(schedule.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.decay == "constant":
        return 1.0
    remaining = (total_steps - step) / max(1, total_steps - warmup_steps)
    if schedule.decay == "linear":
        return remaining
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - remaining)))


def set_learning_rates(groups: list[dict[str, Any]], peaks: list[float], scale: float) -> None:
    """Write ``peak * scale`` into each parameter group."""
    for group, peak in zip(groups, peaks, strict=True):
        group["lr"] = peak * scale
