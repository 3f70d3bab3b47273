"""The best by each metric, and falls that are larger than allowed and than chance explains."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.evaluation.config import EvaluateConfig, Regression
from pipeline.evaluation.ledger import Ledger, Outcome
from pipeline.evaluation.standings import Standings
from sharding.storage import Storage
from tests.pipeline.evaluation_run import task
from tests.pipeline.test_compare import evaluated, make_run

RULE = Regression(metric="images/R1", drop=0.1)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return make_run(tmp_path, "one")


def standings(run: Storage, *rules: Regression) -> Standings:
    return Standings(rules or [RULE], Ledger(run), seed=7)


def steps(better: dict[str, Outcome]) -> dict[str, int]:
    return {metric: outcome.step for metric, outcome in better.items()}


def test_the_best_by_each_metric_whatever_the_order_of_arrival(run: Storage) -> None:
    one = standings(run)
    assert steps(one.add(evaluated(run, 30, 0.5))) == {"images/R1": 30, "images/median_rank": 30}
    assert steps(one.add(evaluated(run, 10, 0.3))) == {}
    assert steps(one.add(evaluated(run, 40, 0.5))) == {}  # as good, later
    assert steps(one.add(evaluated(run, 20, 0.5))) == {"images/R1": 20, "images/median_rank": 20}  # earlier
    assert steps(one.add(evaluated(run, 50, 0.7, task="clips"))) == {"clips/R1": 50, "clips/median_rank": 50}
    better = one.add(evaluated(run, 60, 0.8))
    assert steps(better) == {
        "images/R1": 60,
        "images/median_rank": 60,
    }  # chance is a fact, not a metric to be best by


def test_not_a_number_is_never_the_best(run: Storage) -> None:
    one = standings(run)
    broken = evaluated(run, 10, 0.5, metrics={"R1": np.nan, "median_rank": 1.0})
    assert steps(one.add(broken)) == {"images/median_rank": 10}
    assert steps(one.add(evaluated(run, 20, 0.1))) == {"images/R1": 20}


def test_a_fall_beyond_the_rule_is_told_once(run: Storage) -> None:
    one = standings(run)
    for step, share in ((10, 0.3), (20, 0.6), (30, 0.52)):
        one.add(evaluated(run, step, share))
    assert one.falls() == []  # 0.08 is within the rule
    one.add(evaluated(run, 40, 0.45))
    (fall,) = one.falls()
    assert (fall.best.step, fall.outcome.step) == (20, 40)
    assert fall.difference.interval[1] < 0
    assert "images/R1 fell from 0.6 at step 20 to 0.45 at step 40: -0.15" in str(fall)
    assert one.falls() == []
    one.add(evaluated(run, 50, 0.61))
    assert one.falls() == []  # and it has recovered


def test_only_the_newest_checkpoint_is_judged_and_only_by_earlier_ones(run: Storage) -> None:
    one = standings(run)
    for step, share in ((40, 0.5), (20, 0.2), (10, 0.5)):  # 20 had fallen: that is over
        one.add(evaluated(run, step, share))
    assert one.falls() == []
    one.add(evaluated(run, 30, 0.65))  # evaluated late, and better than the newest
    (fall,) = one.falls()
    assert (fall.best.step, fall.outcome.step) == (30, 40)
    # A step that was trained once more, after its checkpoint was damaged, is not compared with itself.
    again = standings(run)
    for digest, share in (("ab" * 32, 0.6), ("cd" * 32, 0.2)):
        path = {"path": "checkpoints/step-00000050", "digest": digest, "step": 50, "stage": 0}
        again.add(evaluated(run, 50, share, checkpoint=path))
    assert again.falls() == []


def test_a_fall_within_chance_is_none(run: Storage) -> None:
    one = standings(run, Regression(metric="images/R1", drop=0.004))
    one.add(evaluated(run, 10, 0.5))
    one.add(evaluated(run, 20, 0.495))  # one item of 200: larger than the rule, but the interval holds zero
    assert one.falls() == []
    one.add(evaluated(run, 30, 0.4))
    assert len(one.falls()) == 1


def test_of_a_rank_a_rise_is_a_fall(run: Storage) -> None:
    one = standings(run, Regression(metric="images/median_rank", drop=5))
    one.add(evaluated(run, 10, 0.6))
    one.add(evaluated(run, 20, 0.4))
    (fall,) = one.falls()
    assert fall.difference.difference > 100


def test_failed_evaluations_and_other_tasks_are_no_fall(run: Storage) -> None:
    one = standings(run)
    one.add(evaluated(run, 10, 0.6))
    one.add(evaluated(run, 20, 0.1, task="clips"))
    one.add(evaluated(run, 30, 0.1, metrics={}, intervals={}, cause="broke"))
    assert one.falls() == []


def test_a_metric_that_the_task_does_not_measure_is_named_once(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    one = standings(run, Regression(metric="images/R2"))
    with caplog.at_level(logging.ERROR):
        for step in (10, 20):
            one.add(evaluated(run, step, 0.5))
            assert one.falls() == []
    assert [record.getMessage() for record in caplog.records] == [
        "evaluate.regression: task images measures no R2; it has R1, median_rank"
    ]


def test_damaged_items_are_told_and_judge_nothing(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    one = standings(run)
    one.add(evaluated(run, 10, 0.6))
    newest = evaluated(run, 20, 0.2)
    one.add(newest)
    run.delete(Ledger(run).file_path(newest, "items.parquet"))
    assert one.falls() == []
    assert "images/R1 cannot be compared with that of step 10" in caplog.text


def test_a_rule_names_a_task_of_the_job() -> None:
    tasks = [task("images")]
    assert EvaluateConfig(tasks=tasks, regression=[RULE]).regression == [RULE]
    with pytest.raises(ValidationError, match="must be TASK/METRIC with one of the evaluate tasks"):
        EvaluateConfig(tasks=tasks, regression=[Regression(metric="imagse/R1")])
    with pytest.raises(ValidationError):
        Regression(metric="R1")
