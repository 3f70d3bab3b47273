"""Which checkpoints are due for which task, and what goes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.ledger import EvaluationKey, EvaluationState
from pipeline.evaluation.schedule import Due, Schedule
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.versions import TaskVersions
from sharding.errors import BadData, StorageFault, UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.evaluation_run import EvaluationRun, make_run, task


@pytest.fixture
def run(tmp_path: Path) -> EvaluationRun:
    return make_run(tmp_path, [10, 20, 30])


def due(run: EvaluationRun, schedule: Schedule, one: TaskConfig, step: int, failures: int = 0) -> Due:
    checkpoint = run.checkpoint(step)
    key = EvaluationKey(checkpoint.digest[:16], one.name, "1-0123abcd")
    return Due(key, checkpoint, one, schedule.limits(one), EvaluationState(failures=failures))


def test_a_task_says_for_itself_or_the_block_does() -> None:
    own = task("own", after="end", attempts=5, timeout_s=7.0, gpus=0)
    block = {"after": "stage", "attempts": 3, "timeout_s": 60.0, "gpus": 1}
    schedule = Schedule(EvaluateConfig.model_validate({"tasks": [own, task("none")], **block}))
    limits = schedule.limits(own)
    assert (limits.after, limits.attempts, limits.timeout_s, limits.gpus) == ("end", 5, 7.0, 0)
    limits = schedule.limits(task("none"))
    assert (limits.after, limits.attempts, limits.timeout_s, limits.gpus) == ("stage", 3, 60.0, 1)


@pytest.mark.parametrize(
    ("after", "running", "over"),
    [("checkpoint", [10, 20, 30], [10, 20, 30]), ("stage", [20], [20, 30]), ("end", [], [30])],
)
def test_due_is_every_checkpoint_or_the_ends_of_stages_or_the_last(
    run: EvaluationRun, after: str, running: list[int], over: list[int]
) -> None:
    one = task("one", after=after)
    schedule, checkpoints = Schedule(run.config(one)), run.checkpoints(run.run)
    assert [c.step for c in schedule.due(one, checkpoints, over=False)] == running
    assert [c.step for c in schedule.due(one, checkpoints, over=True)] == over
    everything = Schedule(run.config(one), every_checkpoint=True)
    assert [c.step for c in everything.due(one, checkpoints, over=False)] == [10, 20, 30]
    assert Schedule(run.config(one), only=["other"]).tasks == []
    # One that was written on leaving, between two that were due, is nobody's to evaluate, also where it is the last.
    left = replace(run.checkpoint(30), step=35, record={**run.checkpoint(30).record, "interim": True})
    assert [c.step for c in schedule.due(one, [*checkpoints, left], over=True)] == over


def test_first_goes_priority_then_what_has_not_failed_then_the_newest_checkpoint_task_by_task(
    run: EvaluationRun,
) -> None:
    urgent, b, a, last = task("urgent", priority=1), task("b"), task("a"), task("last", priority=-1)
    schedule = Schedule(run.config(b, a, last, urgent))
    waiting = [due(run, schedule, one, step) for one in (last, a, b, urgent) for step in (10, 20, 30)]
    waiting = [w for w in waiting if (w.task.name, w.checkpoint.step) != ("b", 30)]
    waiting.append(due(run, schedule, b, 30, failures=1))
    found = [(one.task.name, one.checkpoint.step) for one in schedule.ordered(waiting)]
    assert found == [
        *(("urgent", step) for step in (30, 20, 10)),
        *(("a", 30), ("b", 20), ("a", 20), ("b", 10), ("a", 10), ("b", 30)),
        *(("last", step) for step in (30, 20, 10)),
    ]


class Faulty(RetrievalTask):
    """Its data cannot be used."""

    fault: str

    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        raise {
            "user": UserError("evaluate task 'faulty', annotations: there is no a.json"),
            "data": BadData("not-json", "a.json is no JSON"),
            "missing": FileNotFoundError("a.json"),
            "bug": RuntimeError("a\nbug"),
            "away": StorageFault("s3://bucket: timed out"),
        }[self.fault]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("user", "evaluate task 'faulty', annotations: there is no a.json"),
        ("data", "not-json: a.json is no JSON"),
        ("missing", "a.json"),
        ("bug", "RuntimeError: a bug"),
    ],
)
def test_data_that_cannot_be_used_are_a_version_of_their_own_with_the_cause_in_one_line(
    run: EvaluationRun, fault: str, line: str
) -> None:
    faulty, sound = Faulty(name="faulty", dataset="pairs", fault=fault), task("sound")
    versions = TaskVersions([faulty, sound], run.root, {"pairs": run.dataset})
    assert versions.get(faulty) is None
    assert [versions.learn(), versions.complete, versions.learn(), versions.complete] == [
        True,
        False,
        True,
        True,
    ]
    assert not versions.learn()
    known = versions.get(faulty)
    assert known is not None
    assert (known.fault, known.data_digest) == (line, "")
    assert known.version == faulty.version("")
    whole = versions.get(sound)
    assert whole is not None
    assert (whole.fault, len(whole.data_digest)) == (None, 64)
    assert versions.present() == {("faulty", known.version), ("sound", whole.version)}


def test_a_storage_that_is_away_is_no_fault_of_the_data(tmp_path: Path) -> None:
    away = Faulty(name="faulty", dataset="pairs", fault="away")
    versions = TaskVersions([away], open_storage(tmp_path), {})
    with pytest.raises(StorageFault):
        versions.learn()
    assert not versions.complete
    assert versions.get(away) is None
