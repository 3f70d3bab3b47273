"""Every checkpoint is evaluated exactly once, over failures of evaluations, of their processes and of the
driver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.ledger import Ledger, Outcome
from sharding.errors import StorageFault
from tests.pipeline.evaluation_run import EvaluationRun, Script, make_run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def run(tmp_path: Path) -> EvaluationRun:
    return make_run(tmp_path, [10, 20, 30])


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Script]:
    return lambda steps=None: Script(tmp_path / "notes.txt", steps or {})


def dispatcher(run: EvaluationRun, script: Script, *names: str, **options: Any) -> Dispatcher:
    own = {k: options.pop(k) for k in ("on_result", "retry_failed") if k in options}
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
    assert [step for _, step in acting.attempts()] == [10, 10, 20, 20, 30]
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
    assert [step for _, step in acting.attempts()] == [10, 20, 30]
    assert [o.cause for o in one.outcomes() if o.cause] == [
        "sha256-mismatch: model.safetensors is not what was committed"
    ]


def test_what_ran_when_the_driver_died_is_run_again(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    hanging = script({10: "once-hang"})
    one = dispatcher(run, hanging)
    one.start()
    until(lambda: len(hanging.attempts()) == 1)
    assert one.pinned() == {10, 20, 30}
    one.stop()  # kills the actor, as the end of the driver does
    two = dispatcher(run, script())
    two.start()
    assert two.wait(60)
    two.stop()
    assert [step for _, step in script().attempts()] == [10, 10, 20, 30]
    assert two.counts() == (3, 0, 0, 0)


def test_evaluations_after_stages_or_at_the_end_are_for_those_checkpoints_alone(
    run: EvaluationRun, script: Callable[..., Script]
) -> None:
    stages = dispatcher(run, script(), after="stage")
    assert stages.pinned() == {20}
    stages.start()
    until(lambda: len(script().attempts()) == 1)
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
