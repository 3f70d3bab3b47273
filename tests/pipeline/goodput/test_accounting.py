"""Every second of a run is accounted for once, over deaths of workers and drivers."""

from __future__ import annotations

import pytest
from rich.console import Console

from pipeline.goodput.accounting import CAUSES, Attempt, Life, account
from pipeline.goodput.table import account_metrics, account_table

#: A driver that dies at 400 and is started again at 1000; its first workers die at 200.
LIVES = [Life(0, 400), Life(1000, 2000, evaluating=1800)]
ATTEMPTS = [
    Attempt(20, 200, {"start": 10, "compute": 100, "data": 20, "checkpoint": 30, "other": 20}, 2, step=100),
    Attempt(230, 390, {"start": 10, "redone": 40, "compute": 60, "data": 30}, 2, step=150, redone=40),
    Attempt(
        1030,
        1790,
        {"start": 15, "redone": 25, "skipped": 2, "compute": 700},
        2,
        step=900,
        redone=25,
        skipped=1,
    ),
]


def test_every_second_has_one_cause() -> None:
    found = account(reversed(LIVES), reversed(ATTEMPTS))
    assert found is not None
    assert found.seconds == {
        "compute": 860,
        "data": 50,
        "checkpoint": 30,
        "evaluation": 200,
        "start": 20 + 10,  # the driver's beginning, the workers' processes, their building
        "restart": (30 + 10)
        + (10 + 30 + 15),  # death to new steps; the second time around the time without driver
        "redone": 65,
        "skipped": 2,
        "down": 600,
        "other": 20 + 20 + 18 + 10,  # told so, not told, and between the workers' end and the evaluations
    }
    assert found.wall == 2000
    assert found.goodput == 0.43
    assert (found.attempts, found.step, found.redone, found.skipped) == (3, 900, 65, 1)


def test_waiting_for_evaluations_before_a_run_went_on_is_no_restart() -> None:
    lives = [Life(0, 100, evaluating=60), Life(200, 300)]
    attempts = [Attempt(0, 50, {"compute": 50}, 1, step=5), Attempt(210, 300, {"compute": 90}, 1, step=9)]
    found = account(lives, attempts)
    assert found is not None
    assert (found.seconds["evaluation"], found.seconds["down"], found.seconds["restart"]) == (40, 100, 20)
    assert found.wall == 300


def test_mfu_is_that_of_the_attempts_that_counted() -> None:
    def attempt(began: float, flops: float) -> Attempt:
        return Attempt(began, began + 10, {"compute": 10}, 1, step=1, flops=flops, peak=100.0, peak_name="it")

    found = account([], [attempt(0, 500.0), attempt(10, 250.0), attempt(20, 0.0)])
    assert found is not None
    assert found.mfu == pytest.approx(0.375)
    assert account_metrics(found)["goodput/mfu"] == found.mfu


def test_a_run_that_never_trained_has_no_account() -> None:
    assert account([Life(0, 10)], []) is None


def test_the_table_shows_what_took_time_and_the_metrics_all_causes() -> None:
    found = account(LIVES, ATTEMPTS)
    assert found is not None
    console = Console(width=140, record=True)
    console.print(account_table(found))
    text = console.export_text()
    assert "over 3 attempts" in text
    assert "goodput 43.0%" in text
    assert "steps trained again (65)" in text
    assert "0:14:20" in text
    metrics = account_metrics(found)
    assert {name for name in metrics if name.endswith("_s")} == {f"goodput/{cause}_s" for cause in CAUSES}
    assert metrics["goodput/share"] == found.goodput
