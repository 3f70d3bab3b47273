"""What a task finds: scores of single items, of which its metrics are means or medians, and things to look at.

Items are kept, not only their mean: confidence intervals resample them, and two checkpoints are compared item by
item.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Statistic = Literal["mean", "median"]


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is more: true of ranks, of nothing else that is measured."""
    return metric.endswith("rank")


@dataclass(frozen=True)
class Measured:
    """One metric before it is summed up: ``values`` float64 [N], one for each item of its family."""

    values: np.ndarray
    statistic: Statistic = "mean"

    @property
    def value(self) -> float:
        """The metric."""
        return float(np.median(self.values) if self.statistic == "median" else np.mean(self.values))


@dataclass(frozen=True)
class Family:
    """N items (queries, questions, images) that were scored one by one.

    Args:
        name: short, unique in the task, e.g. ``"t2i"``.
        keys: names of the items, unique; the same in every evaluation on the same data.
        metrics: by the metric's name, e.g. ``"t2i_R10"``.
        groups: what each item belongs to; items of a group are not independent (captions of one picture) and are
            resampled together. None: every item is a group.
    """

    name: str
    keys: list[str]
    metrics: dict[str, Measured]
    groups: list[str] | None = None


@dataclass(frozen=True)
class Example:
    """One item to look at in the report.

    Args:
        title: what was asked.
        right: whether the model had it right; None where that is no question (a map).
        pictures: JPEG or PNG bytes, small, with a caption each.
        lines: label and text, e.g. ``("answer", "two (0.93)")``.
    """

    title: str
    right: bool | None
    pictures: list[tuple[bytes, str]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class TaskResult:
    """The outcome of one evaluation.

    Args:
        families: the scored items.
        facts: numbers that are not estimates: chance, candidates, skipped samples.
        examples: a few, chosen by the run's seed or by the data, never by what looks good.
        files: to be stored beside the outcome, by name, e.g. a test server's JSON.
        details: plain data worth recording: seeds, digests, versions.
    """

    families: list[Family]
    facts: dict[str, float] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics and facts by name."""
        found = {name: m.value for family in self.families for name, m in family.metrics.items()}
        return found | self.facts
