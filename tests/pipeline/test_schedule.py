"""The learning rate is a function of the step alone."""

import itertools
import math

import pytest

from pipeline.training.config import ScheduleBlock
from pipeline.training.schedule import learning_rate_scale, set_learning_rates


def test_warms_up_linearly_over_a_tenth_then_falls_linearly_to_zero() -> None:
    schedule = ScheduleBlock()
    scales = [learning_rate_scale(step, 100, schedule) for step in range(101)]
    assert scales[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert scales[10] == 1.0
    assert scales[55] == pytest.approx(0.5)
    assert scales[100] == 0.0
    assert all(a > b for a, b in itertools.pairwise(scales[10:]))


def test_cosine_is_half_way_down_in_the_middle_and_constant_stays() -> None:
    cosine = ScheduleBlock(warmup=0.0, decay="cosine")
    assert learning_rate_scale(50, 100, cosine) == pytest.approx(0.5)
    assert learning_rate_scale(100, 100, cosine) == pytest.approx(0.0)
    constant = ScheduleBlock(warmup=0.0, decay="constant")
    assert {learning_rate_scale(step, 100, constant) for step in range(100)} == {1.0}


def test_each_group_keeps_its_own_peak() -> None:
    groups = [{"lr": 0.0}, {"lr": 0.0}]
    set_learning_rates(groups, [1e-3, 5e-3], 0.5)
    assert math.isclose(groups[0]["lr"], 5e-4)
    assert math.isclose(groups[1]["lr"], 2.5e-3)
