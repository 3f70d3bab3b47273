"""A run may die often, but not over and over at the same place."""

from __future__ import annotations

from ray.train import FailureConfig
from ray.train import WorkerGroupError as RayWorkerGroupError
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision

from cluster.deaths import DeathsInARow

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def _decisions(reached: list[int | OSError], max_failures: int = 2) -> list[FailureDecision]:
    """What is decided at each death, given how far the run had come."""
    known = iter(reached)

    def progress() -> int:
        found = next(known)
        if isinstance(found, OSError):
            raise found
        return found

    policy = DeathsInARow(FailureConfig(max_failures=max_failures), progress)
    death = RayWorkerGroupError("a worker died", {0: RuntimeError("killed")})
    return [policy.make_decision(death) for _ in reached]


def test_deaths_between_which_the_run_gets_on_never_end_it() -> None:
    assert _decisions([10, 20, 30, 40, 50, 60]) == [RETRY] * 6


def test_deaths_in_a_row_end_it() -> None:
    assert _decisions([10, 10, 10]) == [RETRY, RETRY, RAISE]
    assert _decisions([10, 20, 20, 20]) == [RETRY, RETRY, RETRY, RAISE]


def test_a_storage_that_cannot_be_asked_counts_as_no_progress() -> None:
    assert _decisions([10, OSError("away"), OSError("away")]) == [RETRY, RETRY, RAISE]
