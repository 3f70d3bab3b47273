"""Learning rate as a pure function of the step: nothing to save, nothing to restore.

The run's schedule goes over the stages that have none of their own, as if the others were not there; a stage with a
schedule warms up and decays over its own steps. So a stage with a schedule that is added to a run, or taken from it,
changes no other step. A stage's own peak scales whichever schedule it follows. For warm-up over 2 of 10 steps::

    stages     | low: 6 steps       | high: 4 steps, own schedule | more: 4 steps
    schedule   | 1 to 6 of the 10   | 1 to 4 of its own 4         | 7 to 10 of the 10
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.training.config import Course, ScheduleBlock


def learning_rate_scale(step: int, total_steps: int, schedule: ScheduleBlock) -> float:
    """Share of the peak learning rate at step ``step`` (counted from 0) of ``total_steps``.

    Linear warm-up over the first ``schedule.warmup`` share of them (GLSCL: 10 %), then linear or cosine
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


def stages_begun(steps: Sequence[int], done: int) -> int:
    """How many of the stages, which take ``steps`` each, have trained at least one of ``done`` steps."""
    first = 0
    for number, length in enumerate(steps):
        if done <= first:
            return number
        first += length
    return len(steps)


def learning_rate_at(course: Course, step: int) -> float:
    """Factor on every group's peak learning rate (that of ``course.learning_rate``) at the run's step ``step``.

    Args:
        step: optimizer step over all stages, from 0; below ``course.total_steps``.
    """
    shared = sum(stage.steps for stage in course.stages if stage.schedule is None)
    before = shared_before = 0
    for stage in course.stages:
        own = step - before
        if own < stage.steps:
            peak = 1.0 if stage.learning_rate is None else stage.learning_rate / course.learning_rate
            if stage.schedule is None:
                return peak * learning_rate_scale(shared_before + own, shared, course.schedule)
            return peak * learning_rate_scale(own, stage.steps, stage.schedule)
        before += stage.steps
        shared_before += stage.steps if stage.schedule is None else 0
    raise ValueError(f"step {step}: the run has {before}")


def set_learning_rates(groups: list[dict[str, Any]], peaks: list[float], scale: float) -> None:
    """Write ``peak * scale`` into each parameter group."""
    for group, peak in zip(groups, peaks, strict=True):
        group["lr"] = peak * scale
