"""A running job's configuration: what is still to come may change, what was trained may not; both are recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.changes import RULES, compare, rule_of, trained_datasets
from pipeline.config import JobConfig, parse_job
from pipeline.job import _tracked_run
from pipeline.runs import ConfigurationRefused, plain_job, read_record
from pipeline.tracking.connection import connect
from pipeline.training.config import TrainBlock
from sharding.manifest import load_manifest
from sharding.prepare import PreparedDataset
from sharding.storage import open_storage
from tests.fixtures.jobs import tiny_job
from tests.pipeline.test_checkpoints import commit
from tests.pipeline.trained_run import make_trained_run

# The job has the stages "images" (steps 1 to 8) and "mixed" (9 to 12).
IN_FIRST, AT_BORDER, IN_SECOND, AT_END = 4, 8, 10, 12
ALWAYS = (0, IN_FIRST, AT_BORDER, IN_SECOND, AT_END)


def job_with(*overrides: str) -> JobConfig:
    tree = tiny_job("/data/raw", "/data/storage")
    return parse_job(json.loads(json.dumps(tree)), "job.yaml", overrides)


def judged(step: int, *overrides: str, before: tuple[str, ...] = ()) -> Any:
    paths = {"emoji": "datasets/emoji-0", "clips": "datasets/clips-0", "held-out": "datasets/held-out-0"}
    was, now = (json.loads(json.dumps(plain_job(job_with(*one), paths))) for one in (before, overrides))
    return compare(was, now, step)


APPENDED = yaml.safe_dump(
    [
        {"name": "images", "steps": 8, "mixture": {"emoji": 1}, "checkpoint_every": 4}
        | {"augmentation": {"crop": 0.6, "flip": 0.5}},
        {
            "name": "mixed",
            "steps": 4,
            "mixture": {"emoji": 1, "clips": 1},
            "frames": 2,
            "checkpoint_every": 4,
        },
        {"name": "more", "steps": 4, "mixture": {"clips": 1}, "learning_rate": 1e-4, "global_batch": 32},
    ],
    default_flow_style=True,
    width=10**6,
)


@pytest.mark.parametrize(
    ("override", "allowed_after"),
    [
        # what changes cost alone, or nothing of the training
        ("train.workers=1", ALWAYS),
        ("train.deepspeed.zero_optimization.stage=3", ALWAYS),
        ("train.deepspeed.zero_optimization.overlap_comm=true", ALWAYS),
        ("train.micro_batch=4", ALWAYS),
        ("train.loader_processes=3", ALWAYS),
        ("train.stages.0.checkpoint_every=2", ALWAYS),
        ("checkpoints.every=7", ALWAYS),
        ("checkpoints.keep_last=1", ALWAYS),
        ("evaluate.tasks.0.rerank=2", ALWAYS),
        ("cluster.evaluations=5", ALWAYS),
        ("tracking.experiment=other", ALWAYS),
        # the beginning
        ("seed=8", ()),
        ("model.overrides.fusion_layers=2", ()),
        # what every step depends on
        ("train.lanes=2", (0,)),
        ("train.shuffle_window=9", (0,)),
        ("train.precision=bf16", (0,)),
        ("train.weight_decay=0.5", (0,)),
        ("train.clipping=7", (0,)),
        ("train.deepspeed.communication_data_type=fp32", (0,)),
        # defaults of stages that have none of their own
        ("train.learning_rate=0.5", (0,)),
        ("train.global_batch=32", (0,)),
        ("train.schedule.decay=cosine", (0,)),
        # stages to come
        ("train.stages.1.learning_rate=0.5", (0, IN_FIRST, AT_BORDER)),
        ("train.stages.1.objectives={itc: 1}", (0, IN_FIRST, AT_BORDER)),
        ("train.stages.1.mixture={clips: 1}", (0, IN_FIRST, AT_BORDER)),
        ("train.stages.1.global_batch=32", (0, IN_FIRST, AT_BORDER)),
        ("train.stages.1.schedule={decay: constant}", (0, IN_FIRST, AT_BORDER)),
        ("train.stages.0.objectives={itc: 1}", (0,)),
        # lengths: not below what was trained, and not before a stage that has begun
        ("train.stages.0.steps=4", (0, IN_FIRST)),
        ("train.stages.0.steps=20", (0, IN_FIRST, AT_BORDER)),
        ("train.stages.1.steps=2", (0, IN_FIRST, AT_BORDER, IN_SECOND)),
        ("train.stages.1.steps=40", ALWAYS),
        (f"train.stages={APPENDED}", ALWAYS),
    ],
)
def test_what_was_trained_stays_and_the_rest_may_change(
    override: str, allowed_after: tuple[int, ...]
) -> None:
    field = "train.stages" if "train.stages=" in override else override.partition("=")[0]
    for step in ALWAYS:
        changes = judged(step, override)
        found = changes.allowed if step in allowed_after else changes.refused
        assert changes.allowed == [] or changes.refused == []
        assert found
        assert all(one.field.startswith(field) for one in found)
        if changes.refused:
            assert f"{found[0].field} was " in changes.refusal
            assert f"after {step} steps" in changes.refusal


def test_a_default_may_change_where_no_begun_stage_goes_by_it() -> None:
    own = "train.stages.0.learning_rate=0.001"
    assert judged(IN_FIRST, own, "train.learning_rate=0.5", before=(own,)).allowed
    assert judged(IN_SECOND, own, "train.learning_rate=0.5", before=(own,)).refused


def test_a_stage_that_was_trained_cannot_go_and_one_to_come_can() -> None:
    first = "train.stages=" + yaml.safe_dump(
        yaml.safe_load(APPENDED)[:1], default_flow_style=True, width=10**6
    )
    assert judged(AT_BORDER, first).allowed
    assert "put stage 'mixed' back: it was trained" in judged(IN_SECOND, first).refusal


def test_a_refusal_says_what_to_do() -> None:
    told = judged(IN_FIRST, "train.stages.0.learning_rate=0.5").refusal
    assert "from step 4 on it may differ in a stage of its own" in told
    assert "choose 4 or more: so many are trained" in judged(IN_FIRST, "train.stages.0.steps=3").refusal
    assert "give the job another name" in judged(IN_FIRST, "seed=9").refusal


def test_every_field_of_the_training_is_under_a_rule_that_was_meant_for_it() -> None:
    assert (
        RULES[-1].pattern == "*"
    )  # what no rule is meant for is free: nothing of the training may come to that
    for name in TrainBlock.model_fields:
        assert rule_of(f"train.{name}").pattern != "*"


def test_datasets_of_stages_that_have_not_begun_are_not_trained_on() -> None:
    train = job_with().train.model_dump(mode="json")
    assert trained_datasets(train, 0) == set()
    assert trained_datasets(train, AT_BORDER) == {"emoji"}
    assert trained_datasets(train, 9) == {"emoji", "clips"}


def test_changes_and_refusals_are_in_the_runs_record_and_in_mlflow(tmp_path: Path) -> None:
    made = make_trained_run(tmp_path)
    begun = read_record(made.run)
    assert begun is not None
    prepared = {
        name: PreparedDataset(path, load_manifest(made.root.at(path)))
        for name, path in begun["datasets"].items()
    }

    def start(*overrides: str) -> Any:
        tree = tiny_job("/data/raw", tmp_path / "storage")
        job = parse_job(tree, "job.yaml", overrides)
        with _tracked_run(job, open_storage(job.storage), prepared) as (run, tracker):
            return run, tracker.config

    run, config = start()
    commit(made.run, 8)
    with pytest.raises(ConfigurationRefused, match=r"train\.stages\.0\.frames was 4, now 2"):
        start("train.stages.0.frames=2")
    client = connect(config)
    refused = client.get_run(run.tracking_run)
    assert refused.info.status == "FINISHED"  # a start that was refused is none
    assert refused.data.tags["configuration.refused"] == "after step 8: train.stages.0.frames: 4 -> 2"
    kept = read_record(made.run)
    assert kept is not None
    assert kept["job"]["train"]["stages"][0]["frames"] == 4

    start("train.stages.1.steps=8", "train.workers=1", "checkpoints.keep_last=3")
    record = read_record(made.run)
    assert record is not None
    assert [(one["step"], one["allowed"]) for one in record["changes"]] == [(8, False), (8, True)]
    assert set(record["changes"][1]["changed"]) == {
        *("train.stages.1.steps", "train.workers", "checkpoints.keep_last"),
    }
    rates = record["changes"][1]["learning_rate_of_next_step"]
    assert rates["was"] == pytest.approx(1e-3 * 4 / 11)  # warm-up over 1 of 12 steps
    assert rates["now"] == pytest.approx(1e-3 * 8 / 14)  # over 2 of 16
    assert [one["from_step"] for one in record["configurations"]] == [0, 8]
    assert record["configurations"][0]["configuration"]["train"]["stages"][1]["steps"] == 4
    assert record["configuration"]["train"]["stages"][1]["steps"] == 8

    start("train.stages.1.steps=8", "train.workers=1", "checkpoints.keep_last=3")  # as it is: no change
    tags = client.get_run(run.tracking_run).data.tags
    assert "train.stages.1.steps: 4 -> 8" in tags["configuration.changed"]
    files = sorted(file.path for file in client.list_artifacts(run.tracking_run, "configuration"))
    assert files == [
        "configuration/001-step-00000008-refused.json",
        "configuration/002-step-00000008-changed.json",
    ]
    text = Path(client.download_artifacts(run.tracking_run, files[1])).read_text()
    assert json.loads(text) == record["changes"][1]
