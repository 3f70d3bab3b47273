"""The job's file is checked as a whole; a fault is told with the field, the value and what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_job, parse_job
from pipeline.training.config import PAPER_OBJECTIVES
from sharding.errors import UserError
from tests.fixtures.jobs import tiny_job, write_job

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return tiny_job(tmp_path / "raw", tmp_path / "storage")


def test_the_paper_weights_are_the_default(tree: dict[str, Any]) -> None:
    job = parse_job(tree, "job")
    assert job.train.stages[0].objectives == PAPER_OBJECTIVES
    assert PAPER_OBJECTIVES == {"itc": 0.5, "itm": 1, "mlm": 1, "mgsc": 1, "mltc": 0.2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stages.0.stepz=3", "train.stages.0.stepz: unknown key; did you mean 'steps'?"),
        ("train.lanes=9", "train.lanes: got 9, which 2 workers do not divide; workers that do: [1, 3, 9]"),
        ("train.global_batch=18", "the nearest that is: 16"),
        ("train.micro_batch=6", "a worker 8 samples in groups of 4: choose from [4, 8]"),
        ("train.stages.0.mixture={emoij: 1}", "there is no dataset 'emoij'; did you mean 'emoji'?"),
        ("train.workers=0", "train.workers: got 0; must be greater than or equal to 1"),
        (
            "train.precision=bf32",
            "train.precision: got 'bf32'; must be 'fp32', 'bf16-autocast', 'bf16' or 'fp16'",
        ),
        ("train.deepspeed.optimizer={}", "train.deepspeed.optimizer is decided by train.learning_rate"),
        ("train.deepspeed.zero_optimization.stage=4", "stage: got 4; must be 0, 1, 2 or 3"),
        ("train.stages.0.resolution=30", "resolution: 30 is not a multiple of the model's patch_size 8"),
        ("train.stages.1.name=images", "two stages are named 'images'"),
        ("model.overrides.hiden_size=3", "unknown field 'hiden_size'; did you mean 'hidden_size'?"),
        ("evaluate.tasks.0.dataset=heldout", "there is no dataset 'heldout'; did you mean 'held-out'?"),
        ("checkpoints.keep_best=held-out", "must be TASK/METRIC"),
        ("storage.url=gs://bucket", "cannot open gs:// storage"),
        ("train.stages.7.steps=2", "the list has items 0 to 1"),
        ("name=a/b", "name: got 'a/b'"),
    ],
)
def test_a_fault_names_field_value_and_what_is_right(
    tree: dict[str, Any], tmp_path: Path, override: str, message: str
) -> None:
    file = write_job(tmp_path / "job.yaml", tree)
    with pytest.raises(UserError) as caught:
        load_job(file, [override])
    assert message in str(caught.value)


def test_all_faults_are_told_at_once(tree: dict[str, Any]) -> None:
    tree["train"]["workers"] = 0
    tree["train"]["precision"] = "half"
    tree["nmae"] = "x"
    with pytest.raises(UserError) as caught:
        parse_job(tree, "job.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("job.yaml: ") for line in lines)


def test_a_mistyped_secret_does_not_come_back_in_the_error(tree: dict[str, Any]) -> None:
    tree["storage"]["secret_key"] = ["hunter2"]
    with pytest.raises(UserError) as caught:
        parse_job(tree, "job.yaml")
    assert "hunter2" not in str(caught.value)


def test_an_override_reaches_into_lists_and_makes_missing_blocks(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    file = write_job(tmp_path / "job.yaml", tree)
    job = load_job(file, ["train.stages.1.steps=99", "train.schedule.decay=cosine", "cluster.evaluations=3"])
    assert job.train.stages[1].steps == 99
    assert job.train.schedule.decay == "cosine"
    assert job.cluster.evaluations == 3


def test_yaml_that_would_make_objects_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_job(file)


@pytest.mark.parametrize("name", ["demo.yaml", "s3.yaml", "web.yaml", "paper.yaml"])
def test_the_examples_are_valid(name: str) -> None:
    file = ROOT / "examples" / name
    assert load_job(file).name
    assert yaml.safe_load(file.read_text())
