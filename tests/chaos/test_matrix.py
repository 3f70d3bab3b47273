"""Whatever is killed, at whatever moment: the run ends as one that was never disturbed.

One job suffers every fault, one after the other, while it trains on a cluster of two raylets, with an S3 server and an
MLflow server; another, of the same steps, is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.training.verify_epoch import verify_epoch
from sharding.seeds import derive_seed, generator
from tests.chaos.faults import LONG, SHORT, Fault
from tests.chaos.matrix import Matrix, disturb, steps_for
from tests.chaos.scene import EVERY, Job, Site
from tests.end_to_end.command import Command
from tests.fixtures.s3 import running_s3_server
from tests.pipeline.mlflow_server import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.server]

RIVAL = "rival"  # log of a second command for the undisturbed run


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, raw_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("chaos")
    mlflow = MlflowServer(folder)
    mlflow.start()
    try:
        with (
            running_s3_server() as s3,
            pytest.MonkeyPatch.context() as patch,
        ):  # one of our own: it will be killed
            for name, value in s3.environment.items():
                patch.setenv(name, value)
            # Started now, as its workers inherit the environment.
            yield Site(folder, raw_corpus, s3, mlflow, request.getfixturevalue("ray_cluster"))
    finally:
        mlflow.kill()


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> tuple[Fault, ...]:
    return LONG if request.config.getoption("--chaos-rounds") else SHORT


@pytest.fixture(scope="module")
def undisturbed(site: Site, faults: tuple[Fault, ...]) -> Job:
    job = site.job("undisturbed", steps_for(faults))
    command = job.start()
    job.wait_until(lambda: job.step >= 1)
    rival = Command("run", str(job.file), log=job.file.with_name(RIVAL), environment=job.environment)
    assert rival.wait() == 2, rival.output
    command.succeed()
    return job


def test_an_undisturbed_run_trains_every_step_once_learns_and_is_proven(site: Site, undisturbed: Job) -> None:
    steps = undisturbed.steps
    assert [step for _, _, step in undisturbed.journal] == list(range(1, steps + 1))
    losses = dict(undisturbed.metrics()["loss/total"])
    first, last = range(1, 6), range(steps // 2 - 4, steps // 2 + 1)  # of the first stage: the second has
    assert sum(losses[step] for step in last) < sum(losses[step] for step in first)  # fewer objectives

    log = undisturbed.file.with_name("proof")
    output = Command("verify-epoch", undisturbed.run.url, "--json", log=log).succeed()
    proof = json.loads(output[output.index("{") :])  # progress, on the other stream, came before
    parts = len(undisturbed.checkpoints())
    assert (proof["proven"], proof["steps"], proof["parts"]) == (steps, steps, parts)
    emoji = [epoch for epoch in proof["epochs"] if epoch["dataset"] == "emoji"]
    assert [epoch["epoch"] for epoch in emoji] == list(range(len(emoji)))
    assert all(epoch["complete"] and epoch["trained"] == 40 for epoch in emoji[:-1])
    assert {stage for epoch in emoji for stage in epoch["stages"]} == {"images", "mixed"}


def test_a_second_driver_of_the_same_run_was_refused(undisturbed: Job) -> None:
    told = " ".join(undisturbed.file.with_name(RIVAL).read_text().split())
    assert f"{undisturbed.run.url} is being run by process " in told
    assert "Traceback" not in told


def test_mlflow_ranks_the_checkpoints_and_knows_no_secret(site: Site, undisturbed: Job) -> None:
    models = undisturbed.models()
    assert sorted(int(model.tags["step"]) for model in models) == sorted(undisturbed.weights())
    values = [next(m.value for m in model.metrics if m.key == "held-out/t2i_R10") for model in models]
    assert values == sorted(values, reverse=True)
    parent = MlflowClient(tracking_uri=site.mlflow.uri).get_run(undisturbed.run_id())
    shown = [
        *parent.data.params.values(),
        *parent.data.tags.values(),
        undisturbed.file.with_name("log-1").read_text(),
    ]
    assert not any(site.s3.secret_key in text for text in shown)


def test_a_finished_run_is_not_trained_again_and_a_changed_one_is_refused(
    site: Site, undisturbed: Job
) -> None:
    assert "training is complete" in undisturbed.start().succeed()
    changed = Command(
        *("run", str(undisturbed.file), "--set", "train.learning_rate=0.5"),
        log=undisturbed.file.with_name("changed"),
        environment=undisturbed.environment,
    )
    assert changed.wait() == 2
    assert "train.learning_rate was 0.001, now 0.5" in changed.output


def test_a_run_that_suffers_every_fault_equals_the_undisturbed_one(
    site: Site,
    undisturbed: Job,
    faults: tuple[Fault, ...],
    matrix: Matrix,
    request: pytest.FixtureRequest,
) -> None:
    rounds = int(request.config.getoption("--chaos-rounds"))
    for number in range(max(1, rounds)):
        draw = generator(derive_seed(int(request.config.getoption("--chaos-seed")), "kill-matrix", number))
        order = [faults[place] for place in draw.permutation(len(faults))] if rounds else list(faults)
        job = site.job(f"disturbed-{number}", undisturbed.steps)
        disturb(job, order, draw, matrix)
        assert_equal(job, undisturbed)
        said = " ".join(word for path in job.file.parent.glob("log-*") for word in path.read_text().split())
        assert "passed over for the one before" in said, (
            "the damaged checkpoint was used, or passed over in silence"
        )
        matrix.rounds += 1


def assert_equal(job: Job, undisturbed: Job) -> None:
    """Weights, series, ledger and evaluations of one are those of the other."""
    weights, expected = job.weights(), undisturbed.weights()
    differ = [step for step in expected if weights.get(step) != expected[step]]
    assert not differ, f"weights differ at {differ}"
    assert sorted(weights) == sorted(expected)
    assert max(expected) == undisturbed.steps
    assert len(expected) >= undisturbed.steps // EVERY
    assert job.consumed() == undisturbed.consumed()
    assert verify_epoch(job.run.url, Console()), "the ledger is not what the run had to be trained on"
    mine, reference = job.metrics(), undisturbed.metrics()
    assert [step for step, _ in mine["loss/total"]] == list(range(1, job.steps + 1)), (
        "each step once in MLflow"
    )
    assert mine == reference
    assert job.evaluations() == undisturbed.evaluations()
    assert {int(model.tags["step"]) for model in job.models()} == set(expected)
    assert job.finished_runs() == 1
