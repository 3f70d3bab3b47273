"""Intervals cover what they say, and depend on nothing but the items, the groups and the seed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pipeline.evaluation import statistics
from pipeline.evaluation.result import Family, Measured, Statistic, lower_is_better
from pipeline.evaluation.statistics import bootstrap_intervals, compare_families


def family(
    values: np.ndarray, groups: list[str] | None = None, statistic: Statistic = "mean", metric: str = "R1"
) -> Family:
    keys = [f"item-{number:06d}" for number in range(len(values))]
    return Family("t2i", keys, {metric: Measured(np.asarray(values, float), statistic)}, groups)


def interval(one: Family, seed: int = 0, **options: int) -> tuple[float, float]:
    (found,) = bootstrap_intervals([one], seed=seed, task="images", **options).values()
    return found


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    low, high = interval(family(values), resamples=4000)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_a_median_is_that_of_the_order_statistics() -> None:
    values = np.sort(np.random.default_rng(1).exponential(1.0, 400))
    low, high = interval(family(values, statistic="median"), resamples=4000)
    # Distribution-free: the ranks are binomial(n, 1/2).
    reach = 1.96 * np.sqrt(len(values)) / 2
    for found, rank in ((low, 200 - reach), (high, 200 + reach)):
        assert values[int(rank) - 4] <= found <= values[int(rank) + 4]


def test_the_median_of_a_resample_is_numpys() -> None:
    values = np.array([5.0, 1.0, 3.0, 3.0, 9.0])
    estimate = statistics._median(values)
    counts = np.array([[1, 1, 1, 1, 1], [2, 0, 0, 1, 1], [0, 3, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 4]])
    expected = [np.median(np.repeat(values, row)) for row in counts]
    np.testing.assert_array_equal(estimate(counts), expected)


def test_items_of_a_group_are_resampled_together() -> None:
    """k copies of each item add nothing: the interval is that of the groups, not of a k times larger sample."""
    groups = np.random.default_rng(2).normal(size=200)
    copies = np.repeat(groups, 5)
    names = [f"g{number}" for number in np.repeat(np.arange(200), 5)]
    alone, grouped = interval(family(groups), resamples=4000), interval(family(copies, names), resamples=4000)
    naive = interval(family(copies), resamples=4000)
    width = alone[1] - alone[0]
    assert grouped[1] - grouped[0] == pytest.approx(width, rel=0.08)
    assert naive[1] - naive[0] == pytest.approx(width / np.sqrt(5), rel=0.08)


def test_groups_of_different_sizes_weigh_by_their_items() -> None:
    """A ratio estimator: its variance by the delta method is that of the residuals of the groups' sums."""
    random = np.random.default_rng(3)
    sizes = random.integers(1, 8, 300)
    names = [f"g{g}" for g in np.repeat(np.arange(300), sizes)]
    values = np.repeat(random.normal(size=300), sizes) + random.normal(size=sizes.sum())
    low, high = interval(family(values, names), resamples=4000)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    residuals = np.add.reduceat(values - values.mean(), starts)
    error = np.sqrt((residuals**2).sum()) / sizes.sum()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_95_percent_of_the_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(4)
    held = 0
    for trial in range(400):
        low, high = interval(family(random.random(80) < 0.3), seed=trial, resamples=400)
        held += low <= 0.3 <= high
    assert (
        0.91 <= held / 400 <= 0.98
    )  # 0.95 give or take the trials' own error, a little less for the few items


def test_neither_the_order_of_items_nor_blocks_nor_other_metrics_change_a_digit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(5)
    values, ranks = random.random(101), random.integers(1, 50, 101).astype(float)
    groups = [f"g{number % 17}" for number in range(101)]
    whole = family(values, groups)
    whole.metrics["median_rank"] = Measured(ranks, "median")
    before = bootstrap_intervals([whole], seed=1, task="images")
    order = random.permutation(101)
    shuffled = Family(
        "t2i",
        [whole.keys[i] for i in order],
        {"R1": Measured(values[order]), "median_rank": Measured(ranks[order], "median")},
        [groups[i] for i in order],
    )
    assert bootstrap_intervals([shuffled], seed=1, task="images") == before
    assert interval(family(values, groups), seed=1) == before["R1"]
    alone = Family("t2i", shuffled.keys, shuffled.metrics)
    assert interval(family(values), seed=1) == bootstrap_intervals([alone], seed=1, task="images")["R1"]
    monkeypatch.setattr(statistics, "_BLOCK", 700)
    assert bootstrap_intervals([whole], seed=1, task="images") == before
    assert bootstrap_intervals([whole], seed=2, task="images") != before
    assert bootstrap_intervals([whole], seed=1, task="clips") != before


def test_25_000_items_stay_within_a_few_blocks_of_memory_whatever_the_resamples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "_BLOCK", 200_000)
    one = family(np.random.default_rng(6).random(25_000), [f"g{n // 5}" for n in range(25_000)])
    one.metrics["median_rank"] = Measured(np.arange(25_000.0), "median")
    tracemalloc.start()
    bootstrap_intervals([one], seed=0, task="images", resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * statistics._BLOCK  # 19 MB; the counts of all 200 resamples at once are 40 MB


def test_a_paired_comparison_sees_what_two_intervals_cannot() -> None:
    random = np.random.default_rng(7)
    hard = random.normal(size=500)  # most of the variation is the items' own
    first, second = hard + 0.1 * random.normal(size=500), hard + 0.05 + 0.1 * random.normal(size=500)
    alone = interval(family(first)), interval(family(second))
    assert alone[0][1] > alone[1][0]  # they overlap
    (found,) = compare_families([family(first)], [family(second)], seed=0, task="images")
    assert found.verdict == "better"
    assert found.difference == pytest.approx((second - first).mean())
    assert (found.a, found.b, found.items) == (first.mean(), second.mean(), 500)
    error = (second - first).std() / np.sqrt(500)
    assert found.interval[0] == pytest.approx(found.difference - 1.96 * error, abs=0.3 * error)
    (back,) = compare_families([family(second)], [family(first)], seed=0, task="images")
    assert back.verdict == "worse"
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=1e-12)


def test_no_difference_is_claimed_where_none_is_shown() -> None:
    values = np.random.default_rng(8).random(300)
    for other in (values, np.roll(values, 7)):
        (found,) = compare_families([family(values)], [family(other)], seed=0, task="images")
        assert found.verdict == "no difference shown"
    noisy = np.random.default_rng(9)
    shown = 0
    for trial in range(200):
        base = noisy.random(60) < 0.5
        other = np.where(noisy.random(60) < 0.2, noisy.random(60) < 0.5, base)
        (found,) = compare_families([family(base)], [family(other)], seed=trial, task="images", resamples=300)
        shown += found.verdict != "no difference shown"
    assert shown / 200 < 0.12  # 5 % of them by chance


def test_of_a_rank_the_lower_is_better_and_medians_are_compared_as_medians() -> None:
    assert lower_is_better("t2i_median_rank")
    assert not lower_is_better("t2i_R1")
    random = np.random.default_rng(10)
    first = random.integers(1, 60, 400).astype(float)
    first[:40] = 5000.0  # outliers move the mean of the differences, not the median
    second = np.maximum(1, first - 8)
    one, two = (family(v, statistic="median", metric="median_rank") for v in (first, second))
    (found,) = compare_families([one], [two], seed=0, task="images")
    assert found.difference == np.median(second) - np.median(first)
    assert found.interval[1] < 0
    assert found.verdict == "better"


def test_only_items_and_metrics_that_both_have_are_compared() -> None:
    first, second = family(np.arange(10.0)), family(np.arange(10.0) + 1)
    fewer = Family("t2i", second.keys[3:][::-1], {"R1": Measured(second.metrics["R1"].values[3:][::-1])})
    fewer.metrics["other"] = Measured(np.zeros(7))
    (found,) = compare_families([first], [fewer], seed=0, task="images")
    assert (found.metric, found.items, found.a, found.b) == ("R1", 7, 6.0, 7.0)
    assert found.interval == (1.0, 1.0)
    assert compare_families([first], [Family("i2t", ["x"], {})], seed=0, task="images") == []
