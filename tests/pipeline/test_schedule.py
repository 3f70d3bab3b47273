"""The learning rate is a function of the step alone."""

import itertools
import math

import pytest

from pipeline.training.config import Course, ScheduleBlock, Stage
from pipeline.training.schedule import (
    learning_rate_at,
    learning_rate_scale,
    set_learning_rates,
    stages_begun,
)


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


def course(*stages: dict[str, object], **recipe: object) -> Course:
    named = [
        Stage.model_validate({"name": str(number), "mixture": {"x": 1}, **stage})
        for number, stage in enumerate(stages)
    ]
    return Course.model_validate({"global_batch": 64, "stages": named, **recipe})


def rates(of: Course) -> list[float]:
    return [learning_rate_at(of, step) for step in range(of.total_steps)]


def test_stages_without_a_schedule_share_that_of_the_run() -> None:
    assert rates(course({"steps": 60}, {"steps": 40})) == rates(course({"steps": 100}))


def test_a_stage_with_its_own_schedule_warms_up_and_decays_over_its_own_steps_and_disturbs_no_other() -> None:
    own = {"steps": 20, "schedule": {"warmup": 0.25, "decay": "linear"}, "learning_rate": 1e-5}
    without, with_it = (
        course({"steps": 60}, *between, {"steps": 40}, learning_rate=2e-5) for between in ((), (own,))
    )
    found = rates(with_it)
    assert found[:60] + found[80:] == rates(without)
    alone = [learning_rate_scale(step, 20, ScheduleBlock(warmup=0.25)) / 2 for step in range(20)]
    assert found[60:80] == pytest.approx(alone)
    assert (found[64], found[79]) == pytest.approx((0.5, 0.5 / 15))


def test_a_stages_peak_alone_scales_the_schedule_of_the_run() -> None:
    plain, lower = (
        course({"steps": 5}, {"steps": 5}),
        course({"steps": 5}, {"steps": 5, "learning_rate": 2e-6}),
    )
    assert rates(lower) == pytest.approx(rates(plain)[:5] + [rate / 10 for rate in rates(plain)[5:]])


def test_a_step_beyond_the_last_stage_has_no_rate() -> None:
    with pytest.raises(ValueError, match="step 5: the run has 5"):
        learning_rate_at(course({"steps": 5}), 5)


def test_a_stage_has_begun_with_its_first_step() -> None:
    assert [stages_begun([2, 3], done) for done in range(7)] == [0, 1, 1, 2, 2, 2, 2]


def test_each_group_keeps_its_own_peak() -> None:
    groups = [{"lr": 0.0}, {"lr": 0.0}]
    set_learning_rates(groups, [1e-3, 5e-3], 0.5)
    assert math.isclose(groups[0]["lr"], 5e-4)
    assert math.isclose(groups[1]["lr"], 2.5e-3)
