"""How sure a metric is: bootstrap intervals over items, and paired comparison of two results on the same items.

Items of a group (the captions of one picture) are not independent, so groups are drawn, with replacement, and bring
all their items along (the cluster bootstrap). Percentile intervals: robust for means and medians alike; of a share
that is exactly 0 or 1 in the sample the interval is that one point, which says less than it seems to with few items.

Every draw follows from (run seed, task, family), not from the order of the items or the metrics asked for. Memory is
bounded: resamples are worked off in blocks of :data:`_BLOCK` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.evaluation.result import Family, Measured, lower_is_better
from sharding.seeds import derive_seed, generator

RESAMPLES = 1000
LEVEL = 0.95

_BLOCK = 2_000_000  # counts (of an item in a resample) in memory at once: 16 MB

Verdict = Literal["better", "worse", "no difference shown"]
_Estimator = Callable[[np.ndarray], np.ndarray]  # counts [R, N] of the items -> the metric [R]


def bootstrap_intervals(
    families: Iterable[Family], *, seed: int, task: str, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every metric.

    Args:
        families: of one result.
        seed: of the run.
        task: name of the task.

    Returns:
        (low, high) by the metric's name.
    """
    found: dict[str, tuple[float, float]] = {}
    for family in families:
        order, groups = _in_order(family)
        values = [Measured(one.values[order], one.statistic) for one in family.metrics.values()]
        draws = _draw([_estimator(one) for one in values], groups, _seed(seed, task, family), resamples)
        found |= {name: _interval(draws[:, i]) for i, name in enumerate(family.metrics)}
    return found


@dataclass(frozen=True)
class Difference:
    """One metric of two results A and B on the same items.

    Args:
        a, b: the metric of each on the items that both have.
        difference: b - a.
        interval: 95 % interval of the difference, the same groups drawn for both.
        verdict: of B against A: shown only where the interval excludes zero.
        items: scored in both.
    """

    metric: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    verdict: Verdict
    items: int


def compare_families(
    first: Sequence[Family],
    second: Sequence[Family],
    *,
    seed: int,
    task: str,
    only: str | None = None,
    resamples: int = RESAMPLES,
) -> list[Difference]:
    """Compares the metrics that two results share, item by item.

    The difference of a median is that of the two medians, not the median of the items' differences.

    Args:
        first, second: the families of A and B; items are matched by key, and those of one alone are left out.
        seed: for the draws.
        task: name of the task.
        only: one metric alone.
    """
    theirs = {family.name: family for family in second}
    found = []
    for mine in first:
        other = theirs.get(mine.name)
        if other is None:
            continue
        a, b = _paired(mine, other)
        names = [n for n in a.metrics if n in b.metrics and only in (None, n)]
        if not names or not a.keys:
            continue
        _, groups = _in_order(a)
        pairs = [(a.metrics[name], b.metrics[name]) for name in names]
        estimators = [_difference(one, two) for one, two in pairs]
        draws = _draw(estimators, groups, _seed(seed, task, mine), resamples)
        for column, (name, (one, two)) in enumerate(zip(names, pairs, strict=True)):
            interval = _interval(draws[:, column])
            found.append(
                Difference(
                    metric=name,
                    a=one.value,
                    b=two.value,
                    difference=two.value - one.value,
                    interval=interval,
                    verdict=_verdict(name, interval),
                    items=len(a.keys),
                )
            )
    return found


def _verdict(metric: str, interval: tuple[float, float]) -> Verdict:
    low, high = interval
    if not (low > 0 or high < 0):  # NaN shows nothing either
        return "no difference shown"
    return "better" if (low > 0) != lower_is_better(metric) else "worse"


def _paired(first: Family, second: Family) -> tuple[Family, Family]:
    """Both families on the items that both have, in the order of the keys."""
    places = {key: place for place, key in enumerate(second.keys)}
    shared = sorted((key, mine) for mine, key in enumerate(first.keys) if key in places)
    keys = [key for key, _ in shared]
    mine = np.array([place for _, place in shared], dtype=np.int64)
    theirs = np.array([places[key] for key in keys], dtype=np.int64)
    groups = None if first.groups is None else [first.groups[place] for place in mine]
    return (
        Family(first.name, keys, _taken(first, mine), groups),
        Family(first.name, keys, _taken(second, theirs), groups),
    )


def _taken(family: Family, places: np.ndarray) -> dict[str, Measured]:
    return {name: Measured(one.values[places], one.statistic) for name, one in family.metrics.items()}


def _in_order(family: Family) -> tuple[np.ndarray, np.ndarray]:
    """The places of the items in the order of their keys, and the number of each one's group, in that order."""
    order = np.array(sorted(range(len(family.keys)), key=family.keys.__getitem__), dtype=np.int64)
    if family.groups is None:
        return order, np.arange(len(order))
    _, numbers = np.unique(np.array(family.groups, dtype=object)[order].astype(str), return_inverse=True)
    return order, numbers


def _seed(seed: int, task: str, family: Family) -> int:
    return derive_seed(seed, "evaluation.bootstrap", task, family.name)


def _draw(estimators: Sequence[_Estimator], groups: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """The metrics [resamples, len(estimators)] of resampled items; ``groups`` [N] as :func:`_in_order` gives them."""
    number = int(groups.max()) + 1 if len(groups) else 0
    drawn = np.full((resamples, len(estimators)), np.nan)
    if not number:
        return drawn
    start = 0
    alone = number == len(groups)
    for counts in _counts(number, len(groups), seed, resamples):
        block = counts if alone else counts[:, groups]
        for column, estimate in enumerate(estimators):
            drawn[start : start + len(block), column] = estimate(block)
        start += len(block)
    return drawn


def _counts(groups: int, items: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each group is in each resample: int64 [R, groups], R at a time, ``resamples`` in all."""
    random = generator(seed)
    size = max(1, _BLOCK // max(groups, items))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        chosen = random.integers(0, groups, size=(rows, groups))
        chosen += np.arange(rows)[:, None] * groups
        yield np.bincount(chosen.ravel(), minlength=rows * groups).reshape(rows, groups)


def _estimator(measured: Measured) -> _Estimator:
    if measured.statistic == "median":
        return _median(measured.values)
    values = measured.values.astype(np.float64)
    return lambda counts: counts @ values / counts.sum(axis=1)


def _median(values: np.ndarray) -> _Estimator:
    order = np.argsort(values, kind="stable")
    ascending = values[order].astype(np.float64)

    def estimate(counts: np.ndarray) -> np.ndarray:
        upto = counts[:, order].cumsum(axis=1)  # items up to each value
        total = upto[:, -1:]
        low = (upto > (total - 1) // 2).argmax(axis=1)
        high = (upto > total // 2).argmax(axis=1)
        return (ascending[low] + ascending[high]) / 2

    return estimate


def _difference(first: Measured, second: Measured) -> _Estimator:
    if first.statistic == second.statistic == "mean":
        return _estimator(Measured(second.values - first.values))
    a, b = _estimator(first), _estimator(second)
    return lambda counts: b(counts) - a(counts)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
