"""Every checkpoint is evaluated exactly once, over failures of evaluations, of their processes and of the
driver.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.ledger import Ledger, Outcome
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from sharding.errors import StorageFault, UserError
from sharding.storage import Storage
from tests.pipeline.evaluation_run import EvaluationRun, Script, make_run, task

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def run(tmp_path: Path) -> EvaluationRun:
    return make_run(tmp_path, [10, 20, 30])


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Script]:
    return lambda steps=None: Script(tmp_path / "notes.txt", steps or {})


def dispatcher(run: EvaluationRun, script: Script, *names: str | TaskConfig, **options: Any) -> Dispatcher:
    names_of_own = ("on_result", "retry_failed", "only", "every_checkpoint")
    own = {k: options.pop(k) for k in names_of_own if k in options}
    return Dispatcher(
        run.run,
        run.config(*names, **options),
        run.root,
        {"pairs": run.dataset},
        runner=script,
        checkpoints=run.checkpoints,
        poll_s=0.2,
        **own,
    )


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


def test_checkpoints_are_evaluated_as_they_appear_and_once(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    told: list[Outcome] = []
    run.steps = [10]
    one = dispatcher(run, script(), "images", "clips", on_result=told.append)
    assert one.pinned() == {10}
    one.start()
    until(lambda: len(told) == 2)
    assert one.pinned() == set()
    run.steps = [10, 20]
    assert one.pinned() == {20}
    until(lambda: len(told) == 4)
    assert one.wait(60)
    one.stop()
    assert sorted((o.task, o.step, o.metrics["t2i_R10"]) for o in told) == [
        ("clips", 10, 0.1),
        ("clips", 20, 0.2),
        ("images", 10, 0.1),
        ("images", 20, 0.2),
    ]
    assert one.best_step("images/t2i_R10") == 20
    for outcome in told:
        (items,) = Ledger(run.run).items(outcome)
        assert (items.keys, items.metrics["t2i_R10"].value) == (list("abcd"), outcome.metrics["t2i_R10"])
        assert outcome.intervals["t2i_R10"] == pytest.approx((outcome.step / 100,) * 2)
        assert (outcome.kind, outcome.seed, outcome.settings["rerank"]) == ("retrieval", 0, 16)

    # The next life does nothing again, but tells everything again: the driver may have died before it could.
    again: list[Outcome] = []
    two = dispatcher(run, script(), "images", "clips", on_result=again.append)
    two.start()
    assert two.wait(60)
    two.stop()
    assert sorted(again, key=lambda o: (o.step, o.task)) == sorted(told, key=lambda o: (o.step, o.task))
    assert len(script().attempts()) == 4


def test_failures_are_retried_then_recorded_with_their_cause_and_stop_nothing(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    told: list[Outcome] = []
    acting = script({10: "once-raise", 20: "raise"})
    one = dispatcher(run, acting, on_result=told.append, attempts=2)
    one.start()
    assert one.wait(120)
    one.stop()
    assert [step for _, step in acting.attempts()] == [30, 20, 10, 20, 10]  # what failed waits for the others
    causes = {o.step: o.cause for o in told}
    assert causes == {10: None, 20: causes[20], 30: None}
    assert "RuntimeError: it broke at evaluation_run.py" in str(causes[20])
    assert one.counts() == (2, 1, 0, 0)
    assert one.pinned() == set()
    # Given up stays given up, unless it is asked for.
    for retry, attempts in ((False, 5), (True, 6)):
        mended = script()
        two = dispatcher(run, mended, retry_failed=retry)
        two.start()
        assert two.wait(60)
        two.stop()
        assert len(mended.attempts()) == attempts
    assert two.counts() == (3, 0, 0, 0)


def test_a_process_that_dies_or_hangs_costs_an_attempt_and_nothing_else(
    run: EvaluationRun, script: Callable[..., Script], caplog: pytest.LogCaptureFixture
) -> None:
    acting = script({10: "once-die", 20: "once-hang"})
    one = dispatcher(run, acting, timeout_s=4.0, concurrent=2)
    with caplog.at_level(logging.ERROR):
        one.start()
        assert one.wait(120)
    one.stop()
    assert one.counts() == (3, 0, 0, 0)
    assert sorted(step for _, step in acting.attempts()) == [10, 10, 20, 20, 30]
    assert "process died" in caplog.text
    assert "took longer than 4 s" in caplog.text


def test_a_damaged_checkpoint_is_marked_failed_at_once_with_the_cause(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    acting = script({20: "damaged"})
    one = dispatcher(run, acting, attempts=3)
    one.start()
    assert one.wait(60)
    one.stop()
    assert [step for _, step in acting.attempts()] == [30, 20, 10]
    assert [o.cause for o in one.outcomes() if o.cause] == [
        "sha256-mismatch: model.safetensors is not what was committed"
    ]


def test_what_ran_when_the_driver_died_is_run_again(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    hanging = script({30: "once-hang"})
    one = dispatcher(run, hanging)
    one.start()
    until(lambda: len(hanging.attempts()) == 1)
    assert one.pinned() == {10, 20, 30}
    one.stop()  # kills the actor, as the end of the driver does
    two = dispatcher(run, script())
    two.start()
    assert two.wait(60)
    two.stop()
    assert [step for _, step in script().attempts()] == [30, 30, 20, 10]
    assert two.counts() == (3, 0, 0, 0)


def test_evaluations_after_stages_or_at_the_end_are_for_those_checkpoints_alone(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    stages = dispatcher(run, script(), after="stage")
    assert stages.pinned() == {10, 20, 30}  # it has not looked at the data yet
    stages.start()
    until(lambda: len(script().attempts()) == 1)
    assert stages.pinned() <= {20}
    assert stages.wait(60)  # the training is over: the last counts too
    stages.stop()
    assert [step for _, step in script().attempts()] == [20, 30]
    end = dispatcher(run, script(), "other", after="end")
    end.start()
    time.sleep(0.5)
    assert script().attempts()[2:] == []
    assert end.wait(60)
    end.stop()
    assert script().attempts()[2:] == [("other", 30)]


def test_evaluations_run_beside_each_other_up_to_the_limit(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    acting = script({10: "slow", 20: "slow", 30: "slow"})
    one = dispatcher(run, acting, concurrent=2)
    one.start()
    seen: set[int] = set()
    while not one.wait(0.05):
        seen.add(one.counts().running)
    one.stop()
    assert max(seen) == 2


def test_a_storage_that_is_away_for_a_while_delays_evaluations_only(
    run: EvaluationRun, script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {"fail": 2, "claim": 2, "states": 3}
    for name in faults:
        real = getattr(Ledger, name)

        def faulty(*arguments: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            if faults[name]:
                faults[name] -= 1
                raise StorageFault("s3://bucket: timed out")
            return real(*arguments, **options)

        monkeypatch.setattr(Ledger, name, faulty)
    acting = script({10: "once-raise", 20: "raise"})
    one = dispatcher(run, acting)
    one.start()
    assert one.wait(60)
    one.stop()
    assert faults == {"fail": 0, "claim": 0, "states": 0}
    assert one.counts() == (2, 1, 0, 0)


def test_a_run_without_tasks_has_nothing_to_wait_for(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    config = run.config().model_copy(update={"tasks": []})
    one = Dispatcher(run.run, config, run.root, {}, runner=script(), checkpoints=run.checkpoints)
    one.start()
    assert one.wait(10)
    one.stop()
    assert one.pinned() == set()


def finished(one: Dispatcher) -> None:
    one.start()
    assert one.wait(120)
    one.stop()


def test_each_task_has_its_own_checkpoints_attempts_limit_and_priority(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    acting = script({20: "raise-of-stubborn hang-of-slow"})
    one = dispatcher(
        run,
        acting,
        task("late", after="end", priority=5),
        task("stubborn", after="stage", attempts=3),
        task("slow", after="stage", attempts=1, timeout_s=3.0),
        task("usual"),
        after="checkpoint",
        attempts=2,
        timeout_s=600,
    )
    one.start()
    until(lambda: ("usual", 10) in acting.attempts())  # the training still runs: nothing is the end yet
    assert not [name for name, _ in acting.attempts() if name == "late"]
    assert one.wait(120)
    one.stop()
    attempts = acting.attempts()
    assert {
        name: sorted(s for n, s in attempts if n == name) for name in ("late", "stubborn", "slow", "usual")
    } == {
        "late": [30],
        "stubborn": [20, 20, 20, 30],
        "slow": [20, 30],
        "usual": [10, 20, 30],
    }
    assert {(o.task, o.step): o.cause for o in one.outcomes() if o.cause} == {
        ("stubborn", 20): next(o.cause for o in one.outcomes() if o.task == "stubborn" and o.cause),
        ("slow", 20): "took longer than 3 s",
    }


def test_an_actor_has_the_gpus_of_the_task_it_runs(
    run: EvaluationRun, script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    real = Dispatcher._new_slot

    def without_gpus(self: Dispatcher, gpus: float) -> Any:  # there are none here
        asked.append(gpus)
        slot = real(self, 0.0)
        slot.gpus = gpus
        return slot

    monkeypatch.setattr(Dispatcher, "_new_slot", without_gpus)
    begun: list[tuple[str, float]] = []
    begin = Dispatcher._begin

    def noted(self: Dispatcher, slot: Any, due: Any) -> None:
        begun.append((due.task.name, slot.gpus))
        begin(self, slot, due)

    monkeypatch.setattr(Dispatcher, "_begin", noted)
    finished(dispatcher(run, script(), task("none", priority=1, gpus=0), task("block"), gpus=0.25))
    assert asked == [0.0, 0.25]  # the one process makes room for the other, once
    assert begun == [("none", 0.0)] * 3 + [("block", 0.25)] * 3


class Broken(RetrievalTask):
    """Its data are missing until ``there`` is a file."""

    there: Path

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        if not self.there.exists():
            raise UserError(f"evaluate task {self.name!r}, annotations: there is no {self.there}")
        return super().data_digest(storage, datasets)


def test_a_task_without_its_data_fails_with_the_cause_and_the_others_go_on(
    run: EvaluationRun,
    script: Callable[..., Script],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    there, line = tmp_path / "annotations.json", "annotations: there is no"
    broken = Broken(name="broken", dataset="pairs", there=there)
    told: list[Outcome] = []
    one = dispatcher(run, script(), broken, "images", on_result=told.append, after="stage")
    with caplog.at_level(logging.ERROR):
        finished(one)
    assert sorted(script().attempts()) == [("images", 20), ("images", 30)]
    assert one.counts() == (2, 2, 0, 0)
    causes = {(o.task, o.step): o.cause for o in told}
    assert sorted(causes) == [("broken", 20), ("broken", 30), ("images", 20), ("images", 30)]
    assert all(line in str(causes["broken", step]) for step in (20, 30))
    assert len([r for r in caplog.records if line in r.getMessage()]) == 1  # one line, not one a checkpoint
    assert one.pinned() == set()
    # Still missing: nothing new is recorded. There at last: everything that is due is evaluated.
    before = sorted(file.path for file in run.run.list())
    finished(dispatcher(run, script(), broken, "images", after="stage"))
    assert sorted(file.path for file in run.run.list()) == before
    there.write_text("{}")
    mended = dispatcher(run, script(), broken, "images", after="stage")
    finished(mended)
    assert sorted(script().attempts())[:2] == [("broken", 20), ("broken", 30)]
    assert mended.counts() == (4, 0, 0, 0)
    assert [o.cause for o in mended.outcomes()] == [None] * 4


def test_a_storage_that_is_away_while_a_tasks_data_are_read_delays_that_task_only(
    run: EvaluationRun, script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [3]
    real = RetrievalTask.data_digest

    def faulty(self: RetrievalTask, *arguments: Any) -> str:
        if self.name == "away" and left[0]:
            left[0] -= 1
            raise StorageFault("s3://elsewhere: timed out")
        return real(self, *arguments)

    monkeypatch.setattr(RetrievalTask, "data_digest", faulty)
    one = dispatcher(run, script(), "near", "away")
    finished(one)
    assert left == [0]
    assert one.counts() == (6, 0, 0, 0)


def test_a_start_does_not_wait_for_the_digests_of_the_data(
    run: EvaluationRun, script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    real = RetrievalTask.data_digest

    def slow(self: RetrievalTask, *arguments: Any) -> str:
        assert held.wait(60)
        return real(self, *arguments)

    monkeypatch.setattr(RetrievalTask, "data_digest", slow)
    one = dispatcher(run, script())
    one.start()
    assert not one.wait(0.5)
    assert one.pinned() == {10, 20, 30}  # none may be deleted before it is known what is done
    assert one.outcomes() == []
    held.set()
    assert one.wait(60)
    one.stop()
    assert one.pinned() == set()


def test_what_has_no_result_of_the_present_version_is_evaluated_on_request(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    finished(dispatcher(run, script(), "images", "clips", after="end"))
    assert sorted(script().attempts()) == [("clips", 30), ("images", 30)]
    # A task of another version, and only it: what is due as configured, then all that is missing.
    newer = task("images", rerank=3)
    finished(dispatcher(run, script(), newer, "clips", after="end", only=["images"]))
    assert script().attempts()[2:] == [("images", 30)]
    finished(dispatcher(run, script(), newer, "clips", after="end", only=["images"], every_checkpoint=True))
    assert script().attempts()[3:] == [("images", 20), ("images", 10)]
    steps = [o.step for o in Ledger(run.run).outcomes() if o.task == "images"]
    assert sorted(steps) == [10, 20, 30, 30]  # the older version's is kept


def test_only_what_is_due_is_tried_again(run: EvaluationRun, script: Callable[..., Script]) -> None:
    finished(dispatcher(run, script({20: "raise"}), "images", "clips", attempts=1))
    mended = script()
    finished(dispatcher(run, mended, "images", "clips", retry_failed=True, only=["clips"]))
    assert mended.attempts()[6:] == [("clips", 20)]
    assert {(o.task, o.step) for o in Ledger(run.run).outcomes() if o.cause} == {("images", 20)}
