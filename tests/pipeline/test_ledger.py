"""The ledger says what is done, what failed and what is open, from the storage alone."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.ledger import EvaluationKey, Ledger, Outcome, best_outcome
from pipeline.evaluation.result import Example, Family, Measured, TaskResult
from sharding.errors import BadData
from sharding.storage import Storage, open_storage

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


def test_what_was_given_up_keeps_its_cause_until_it_is_opened_again(tmp_path: Path) -> None:
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
    ledger.reopen(KEY)
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


def result() -> TaskResult:
    queries = Family(
        "t2i",
        ["b#0", "b#1", "a#0"],
        {
            "R1": Measured(np.array([1.0, 0.0, 1.0])),
            "median_rank": Measured(np.array([1.0, 3.0, 1.0]), "median"),
        },
        groups=["b", "b", "a"],
    )
    images = Family("i2t", ["b", "a"], {"i2t_R1": Measured(np.array([0.0, np.nan]))})
    example = Example(
        "a red balloon", True, [(b"\xff\xd8picture", "rank 1")], [("score", "0.93"), ("rank", "1")]
    )
    return TaskResult([queries, images], {"chance": 0.1}, [example], {"server.json": b"[]"}, {"answers": 3})


def test_items_and_examples_come_back_as_they_were_written(storage: Storage) -> None:
    written = result()
    kept = Ledger(storage).finish(outcome(), written)
    (found,) = Ledger(storage).outcomes()
    assert found == kept
    assert set(found.files) == {"items.parquet", "examples.json", "files/server.json"}
    ledger = Ledger(storage)
    assert ledger.examples(found) == written.examples
    assert ledger.file(found, "files/server.json") == b"[]"
    families = ledger.items(found)
    assert [(f.name, f.keys, f.groups) for f in families] == [
        (f.name, f.keys, f.groups) for f in written.families
    ]
    for mine, theirs in zip(families, written.families, strict=True):
        assert list(mine.metrics) == list(theirs.metrics)
        for name, measured in mine.metrics.items():
            assert measured.statistic == theirs.metrics[name].statistic
            np.testing.assert_array_equal(measured.values, theirs.metrics[name].values)
    # Failed ones have neither.
    failed = outcome(key=EvaluationKey("cd" * 8, "images", "1-0123abcd"), metrics={}, cause="broke")
    assert (ledger.items(failed), ledger.examples(failed)) == ([], [])


def test_equal_results_are_equal_bytes(tmp_path: Path) -> None:
    first = Ledger(open_storage(tmp_path / "a")).finish(outcome(), result())
    second = Ledger(open_storage(tmp_path / "b")).finish(outcome(), result())
    assert first.files == second.files


@pytest.mark.parametrize("name", ["items.parquet", "examples.json"])
@pytest.mark.parametrize("damage", ["flipped", "gone", "garbage"])
def test_a_damaged_file_beside_an_outcome_is_told_as_bad_data(tmp_path: Path, name: str, damage: str) -> None:
    storage = open_storage(tmp_path)
    ledger = Ledger(storage)
    kept = ledger.finish(outcome(), result())
    path = ledger.file_path(kept, name)
    if damage == "gone":
        storage.delete(path)
    elif damage == "flipped":
        data = bytearray(storage.read_bytes(path))
        data[len(data) // 2] ^= 1
        storage.write_bytes(path, bytes(data))
    else:  # what an evaluation of another program might have left there, digest and all
        garbage = b'{"title": 1}'
        storage.write_bytes(path, garbage)
        entry = {"size": len(garbage), "sha256": hashlib.sha256(garbage).hexdigest()}
        kept = replace(kept, files={**kept.files, name: entry})
    with pytest.raises(BadData, match=name):
        ledger.items(kept) if name == "items.parquet" else ledger.examples(kept)


def test_files_of_lost_attempts_are_deleted_and_those_of_the_one_that_counts_stay(storage: Storage) -> None:
    ledger = Ledger(storage)
    ledger._write_files(outcome(attempt=1), result())  # killed before its numbers were written
    second = ledger.finish(outcome(attempt=2), result())
    third = ledger.finish(outcome(attempt=3, metrics={"t2i_R10": 0.9}), result())
    assert third == second
    assert {file.path.split("/")[3] for file in storage.list("evaluations") if file.path.count("/") > 2} == {
        "attempt-2"
    }
    assert Ledger(storage).items(second)


@pytest.mark.parametrize("write", range(4))
def test_killed_at_any_write_an_evaluation_counts_once_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    storage = open_storage(tmp_path)
    ledger = Ledger(storage)
    assert ledger.claim(KEY, 0) == 1
    left = [write]

    def dying(self: Storage, *arguments: Any, real: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "create_exclusive"):
            real = getattr(Storage, name)
            patch.setattr(Storage, name, functools.partialmethod(dying, real=real))
        with pytest.raises(KeyboardInterrupt):
            ledger.finish(outcome(attempt=1), result())
    again = Ledger(open_storage(tmp_path))
    state = again.states()[KEY]
    assert state.open
    attempt = again.claim(KEY, state.attempts)
    kept = again.finish(outcome(attempt=attempt), result())
    assert again.outcomes() == [kept]
    assert len(again.items(kept)) == 2
    stored = {file.path for file in storage.list(KEY.path)}
    assert stored == {again.file_path(kept, name) for name in kept.files}


def test_a_record_whose_answer_was_lost_is_ones_own_and_keeps_its_files(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    first = Ledger(storage).finish(outcome(), result())
    # The storage said no, because an earlier try of the same write had got through.
    assert Ledger(storage).finish(outcome(), result()) == first
    assert len(Ledger(storage).items(first)) == 2
