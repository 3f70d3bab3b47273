"""Trainings in which steps go wrong: what becomes of the weights, the ledger and the run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.workers import WorkerContext
from pipeline.errors import Unhealthy
from pipeline.tracking import TrackingConfig
from pipeline.training import loop
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.consumption import PartReference, StepRecord, read_ledger
from pipeline.training.data_order import DataOrder
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.windows import FORMAT, PATH
from pipeline.training.loop import TrainingPlan, train
from pipeline.training.proof import Proof, _Judge
from sharding.storage import Storage, open_storage
from tests.pipeline.health.small import Faults, Made, SmallSubject, run_group, small_course

STEPS, BATCH = 12, 8
_SPIKES = {"window": 4, "warmup": 0, "least_rise": 1.0, "skip_before": 1}
_NAN, _SPIKE = math.nan, 1e3


@dataclass(frozen=True)
class Case:
    """A run: what goes wrong, what is configured, which steps were left out before it began; started ``times``."""

    factors: dict[int, float]
    health: dict[str, Any]
    left_out: tuple[int, int] | None = None
    zero: int = 1
    times: int = 1


def _spikes(action: str, **changes: Any) -> dict[str, Any]:
    return {"spikes": {**_SPIKES, "action": action, **changes}}


CASES = {
    "undisturbed": Case({}, {}),
    "nan": Case({5: _NAN}, {}),
    "nan, ZeRO 3": Case({5: _NAN}, {}, zero=3),
    "without 5, ZeRO 3": Case({}, {}, left_out=(5, 5), zero=3),
    "without 5": Case({}, {}, left_out=(5, 5)),
    "limit": Case({3: _NAN, 4: _NAN, 5: _NAN}, {"max_consecutive_skips": 2}, times=2),
    "first": Case({3: _NAN}, {"max_consecutive_skips": 0}),
    "told": Case({10: _SPIKE}, _spikes("warn")),
    "skipped": Case({10: _SPIKE}, _spikes("skip")),
    "without 10": Case({}, {}, left_out=(10, 10)),
    "rolled back": Case({10: _SPIKE}, _spikes("rollback")),
    "without 9 and 10": Case({}, {}, left_out=(9, 10)),
    "rolled back once only": Case({7: _SPIKE, 10: _SPIKE}, _spikes("rollback", max_rollbacks=1)),
}


@dataclass(frozen=True)
class Notes:
    """Stands for the driver's board: keeps every note of worker 0."""

    file: Path

    def post(self, topic: str, note: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([topic, note]) + "\n")

    def of(self, topic: str) -> list[Any]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [note for name, note in map(json.loads, lines) if name == topic]


class _NoMetrics:
    """In place of the connection to MLflow."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def flush(self, timeout_s: float) -> None: ...
    def close(self) -> None: ...


def plan_of(case: Case, folder: Path, workers: int) -> TrainingPlan:
    course = small_course(workers, zero=case.zero, steps=STEPS)
    return TrainingPlan(
        subject=SmallSubject(course, 5, Faults(case.factors, rank=workers - 1)),
        course=course,
        seed=5,
        run=open_storage(folder / "run"),
        checkpoint_every=4,
        tracking=TrackingConfig(),
        tracking_key="test",
        tracking_run=None,
        scratch=folder / "scratch",
        board=Notes(folder / "board.jsonl"),  # type: ignore[arg-type]
        health=HealthBlock(hang_s=None, **case.health),
    )


def _train_all(context: WorkerContext, root: str) -> None:
    loop.MetricLogger = _NoMetrics  # type: ignore[assignment, misc]
    for name, case in CASES.items():
        folder = Path(root, name)
        for number in range(case.times):
            try:
                train(context, plan_of(case, folder, context.world_size))
            except Unhealthy as error:
                (folder / f"error-{number}-{context.rank}").write_text(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Outcome:
    folder: Path

    @property
    def run(self) -> Storage:
        return open_storage(self.folder / "run")

    @property
    def errors(self) -> list[str]:
        return [file.read_text() for file in sorted(self.folder.glob("error-*"))]

    @property
    def weights(self) -> str:
        last = list_checkpoints(self.run)[-1]
        assert last.step == STEPS
        return str(last.files["model/model.safetensors"]["sha256"])

    @property
    def warnings(self) -> list[str]:
        return Notes(self.folder / "board.jsonl").of("warning")

    @property
    def last_metrics(self) -> dict[str, float]:
        found: dict[str, float] = Notes(self.folder / "board.jsonl").of("training")[-1]
        return found

    def event(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.run.read_json(f"health/{name}.json")
        return found

    def ledger(self) -> dict[int, StepRecord]:
        vouched = [PartReference(**one.record["consumption"]) for one in list_checkpoints(self.run)[::-1]]
        return {one.step: one for one in read_ledger(self.run, vouched).records()}

    def untrained(self) -> dict[int, str]:
        """The steps of which nothing was trained on, with the cause."""
        causes = {number: {one.cause for one in record.masked} for number, record in self.ledger().items()}
        return {
            number: cause.pop()
            for number, cause in causes.items()
            if cause and not self.ledger()[number].trained
        }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("trainings")
    for name, case in CASES.items():
        (root / name).mkdir()
        if case.left_out is not None:
            window = dict(zip(("first", "last"), case.left_out, strict=True))
            open_storage(root / name / "run").write_json(PATH, {"format": FORMAT, "windows": [window]})
    run_group(_train_all, 2, str(root))
    return {name: Outcome(root / name) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["", ", ZeRO 3"])
def test_a_loss_that_is_not_finite_on_one_worker_is_skipped_by_all_and_kept_with_its_samples(
    outcomes: dict[str, Outcome], zero: str
) -> None:
    found = outcomes[f"nan{zero}"]
    assert found.errors == []
    assert found.weights == outcomes[f"without 5{zero}"].weights
    assert found.weights != outcomes["undisturbed"].weights
    event = found.event("step-00000005-non-finite-loss")
    assert (event["step"], event["action"], event["objectives"]) == (5, "skipped", ["first", "second"])
    assert event["losses"] == {"first": None, "second": None}
    assert len(event["keys"]) == len(set(event["keys"])) == BATCH
    assert found.last_metrics["health/skipped_steps"] == 1.0
    assert f"samples of the batch: {event['keys'][0]}" in found.warnings[0]


@pytest.mark.slow
def test_the_ledger_says_what_was_not_trained_on_and_its_proof_holds(outcomes: dict[str, Outcome]) -> None:
    wanted = {
        "undisturbed": {},
        "nan": {5: "non-finite-loss"},
        "skipped": {10: "loss-spike"},
        "told": {},
        "rolled back": {9: "rolled-back", 10: "rolled-back"},
    }
    course = small_course(2, steps=STEPS)
    for name, untrained in wanted.items():
        found = outcomes[name]
        assert found.untrained() == untrained, name
        judge = _Judge(Proof(list_checkpoints(found.run)[-1], 1, []), _order(), {"made": Made()})  # type: ignore[dict-item]
        for number, step in enumerate(_order().stage(course.stages[0]), start=1):
            judge.step(number, "all", step, found.ledger()[number])
        proof = judge.close()
        assert proof.holds, proof.mismatches
        assert proof.epochs[0].complete
        masked = sum((epoch.masked for epoch in proof.epochs), start=type(proof.epochs[0].masked)())
        assert masked.total() == BATCH * len(untrained)


def _order() -> DataOrder:
    return DataOrder(small_course(2, steps=STEPS), {"made": Made()}, seed=5)


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_on_every_worker_also_after_a_restart_in_between(
    outcomes: dict[str, Outcome],
) -> None:
    found = outcomes["limit"]
    assert (
        len(found.errors) == 4
    )  # of two workers, started twice; the second time from the checkpoint of step 4
    assert len(set(found.errors)) == 1
    assert found.errors[0].startswith(
        "NonFiniteLoss: step 5: the loss of first, second is not finite; samples of"
    )
    assert "3 in a row, health.max_consecutive_skips is 2" in found.errors[0]
    assert [one.step for one in list_checkpoints(found.run)] == [4]
    assert found.event("step-00000005-non-finite-loss")["action"] == "ended the run"


@pytest.mark.slow
def test_a_limit_of_0_ends_the_run_at_the_first(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes["first"].errors) == 2
    assert "step 3: the loss of first, second is not finite" in outcomes["first"].errors[0]


@pytest.mark.slow
def test_a_spike_is_told_and_trained_on_or_skipped_as_configured(outcomes: dict[str, Outcome]) -> None:
    assert "step 10: the loss is" in outcomes["told"].warnings[0]
    assert outcomes["told"].event("step-00000010-loss-spike")["action"] == "told"
    assert outcomes["skipped"].event("step-00000010-loss-spike")["action"] == "skipped"
    assert outcomes["skipped"].weights == outcomes["without 10"].weights
    assert len({outcomes[name].weights for name in ("undisturbed", "told", "skipped")}) == 3


@pytest.mark.slow
def test_a_rollback_trains_again_from_the_checkpoint_without_the_batches_around_the_spike(
    outcomes: dict[str, Outcome],
) -> None:
    found = outcomes["rolled back"]
    assert found.errors == []
    assert found.run.read_json(PATH)["windows"] == [{"first": 9, "last": 10}]
    assert found.weights == outcomes["without 9 and 10"].weights
    assert "going back to the newest checkpoint, without steps 9 to 10" in found.warnings[0]
    steps = [note["step"] for note in Notes(found.folder / "board.jsonl").of("training")]
    assert steps == [*range(1, 10), *range(9, STEPS + 1)]


@pytest.mark.slow
def test_more_rollbacks_than_allowed_end_the_run(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["rolled back once only"]
    assert len(found.errors) == 2
    assert found.errors[0].startswith("LossSpike: step 10: the loss is")
    assert "went back 1 times" in found.errors[0]
    assert found.run.read_json(PATH)["windows"] == [{"first": 6, "last": 7}]
