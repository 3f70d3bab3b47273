"""The ledger says what is done, what failed and what is open, from the storage alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.evaluation.ledger import EvaluationKey, Ledger, Outcome, best_outcome
from sharding.storage import open_storage

KEY = EvaluationKey("ab" * 8, "images", "1-0123abcd")


def outcome(step: int = 10, attempt: int = 1, key: EvaluationKey = KEY, **options: object) -> Outcome:
    values: dict[str, object] = {
        "checkpoint": {
            "path": f"checkpoints/step-{step:08d}",
            "digest": key.digest * 4,
            "step": step,
            "stage": 0,
        },
        "task": key.task,
        "version": key.version,
        "dataset": {"name": "held-out", "digest": "cd" * 32},
        "started": 1.0,
        "finished": 2.0,
        "attempt": attempt,
        "metrics": {"t2i_R10": 0.5},
        **options,
    }
    return Outcome(**values)  # type: ignore[arg-type]


def test_a_claim_that_nobody_finished_is_open_again(tmp_path: Path) -> None:
    ledger = Ledger(open_storage(tmp_path))
    assert ledger.claim(KEY, 0) == 1
    state = Ledger(open_storage(tmp_path)).states()[KEY]
    assert state.open
    assert (state.attempts, state.failures) == (1, 0)
    assert Ledger(open_storage(tmp_path)).claim(KEY, state.attempts) == 2


def test_two_dispatchers_never_get_the_same_attempt(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert [Ledger(storage).claim(KEY, 0), Ledger(storage).claim(KEY, 0)] == [1, 2]


def test_the_first_result_stays(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    first, second = outcome(), outcome(attempt=2, metrics={"t2i_R10": 0.9})
    assert Ledger(storage).finish(first) == first
    assert Ledger(storage).finish(second) == first
    assert Ledger(storage).outcomes() == [first]
    assert Ledger(storage).states()[KEY].done


def test_what_was_given_up_keeps_its_cause_until_it_is_retried(tmp_path: Path) -> None:
    ledger = Ledger(open_storage(tmp_path))
    ledger.claim(KEY, 0)
    ledger.fail(outcome(metrics={}, cause="disk full"), give_up=False)
    assert ledger.states()[KEY].open
    ledger.claim(KEY, 1)
    ledger.fail(outcome(attempt=2, metrics={}, cause="disk full"), give_up=True)
    state = ledger.states()[KEY]
    assert not state.open
    assert (state.attempts, state.failures, state.failed) == (2, 2, True)
    assert [o.cause for o in Ledger(open_storage(tmp_path)).outcomes()] == ["disk full"]
    assert ledger.retry_failed() == 1
    state = ledger.states()[KEY]
    assert state.open
    assert (state.attempts, state.failures) == (2, 0)
    ledger.finish(outcome(attempt=3))
    assert [o.cause for o in ledger.outcomes()] == [None]


def test_other_files_in_the_folder_are_not_evaluations(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("evaluations/readme.txt", b"x")
    storage.write_bytes(f"evaluations/{'ab' * 8}/images-v1.json", b"x")
    assert Ledger(storage).states() == {}


def test_the_best_checkpoint_is_the_highest_recall_or_the_lowest_rank_and_the_earlier_of_equals() -> None:
    outcomes = [
        outcome(
            step,
            key=EvaluationKey(f"{step:016x}", "images", "1-0123abcd"),
            metrics={"R": r, "median_rank": m},
        )
        for step, r, m in ((10, 0.2, 9.0), (20, 0.7, 3.0), (30, 0.7, 2.0))
    ]
    outcomes.append(outcome(40, metrics={}, cause="failed"))
    best = best_outcome(outcomes, "images/R")
    assert best is not None
    assert best.step == 20
    lowest = best_outcome(outcomes, "images/median_rank")
    assert lowest is not None
    assert lowest.step == 30
    assert best_outcome(outcomes, "video/R") is None


def test_a_damaged_record_is_named_and_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(tmp_path)
    other = EvaluationKey("cd" * 8, "images", "1-0123abcd")
    for key in (KEY, other):
        Ledger(storage).finish(outcome(key=key))
    for damage in (b"{not json", b'{"format": "something else"}'):
        storage.write_bytes(f"{other.path}.json", damage)
        caplog.clear()
        assert [o.key for o in Ledger(storage).outcomes()] == [KEY]
        assert f"{other.path}.json cannot be read; delete it" in caplog.text
