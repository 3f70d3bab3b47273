"""The job's file is checked as a whole; a fault is told with the field, the value and what would be right."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import GLSCLConfig
from pipeline.config import load_job, parse_job
from pipeline.training.config import PAPER_OBJECTIVES
from sharding.errors import UserError
from tests.fixtures.jobs import tiny_job, write_job

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return copy.deepcopy(tiny_job(tmp_path / "raw", tmp_path / "storage"))  # overrides change it in place


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.overrides.layer_norm_eps=small", "model.overrides.layer_norm_eps is 'small': it must be a number"),
        ("model.overrides.layer_norm_eps=", "layer_norm_eps is None: it must be a number"),
        ("model.overrides.initializer_range='0.02'", "initializer_range is '0.02': it must be a number, without"),
        ("model.overrides.temperature_init=true", "temperature_init is True: it must be a number"),
        ("model.overrides.temperature_init=0", "temperature_init is 0.0: it must be above 0"),
        ("model.overrides.mlm_ratio=x", "mlm_ratio is 'x': it must be a number"),
        ("model.overrides.hidden_dropout=[0.1]", "hidden_dropout is [0.1]: it must be a number"),
        ("model.overrides.hard_negatives='no'", "hard_negatives is 'no': it must be true or false, without quotes"),
        ("model.overrides.hard_negatives=yes", "hard_negatives is 'yes': it must be true or false"),
        ("model.overrides.hard_negatives=1", "hard_negatives is 1: it must be true or false"),
        ("model.overrides.vocab_size=8_192", "vocab_size is '8_192': it must be a whole number, without quotes"),
        ("model.overrides.vocab_size=1.5", "vocab_size is 1.5: it must be a whole number"),
        ("model.overrides.hidden_size=true", "hidden_size is True: it must be a whole number"),
        ("model.overrides.hidden_size=1e15", "hidden_size is 1000000000000000: it must be a whole number above 0"),
        ("model.overrides.image_mean=[1, 2]", "image_mean is [1, 2]: it must be a list of three numbers"),
        ("model.overrides.image_std=[1, x, 1]", "image_std is 'x': it must be a number"),
        ("model.overrides.image_std=[1, 0, 1]", "image_std is [1.0, 0.0, 1.0]: it must be above 0"),
        ("model.overrides.pad_token_id=-1", "pad_token_id -1 lies outside the vocabulary"),
        ("model.overrides.output_attentions=true", "unknown field 'output_attentions'"),
        ("model.overrides.dtype=float16", "unknown field 'dtype'"),
        ("train.stages.0.steps=true", "train.stages.0.steps: got true; must be a number"),
        ("train.learning_rate=true", "train.learning_rate: got true; must be a number"),
        ("train.betas=[true, 0.9]", "train.betas.0: got true; must be a number"),
        ("seed=1e30", "seed: got 1e+30; is beyond the whole numbers of 64 bits"),
        ("seed=99999999999999999999", "seed is beyond the whole numbers of 64 bits"),
        ("train.lanes=1e12", "train.lanes: got 1000000000000.0; must be less than or equal to"),
        ("train.learning_rate=.inf", "train.learning_rate is infinite or no number"),
        ("name=2024", "name: got 2024; must be text: put it in quotes"),
        ("name=1.10", "name: got 1.1; must be text: put it in quotes"),
        ("name=true", "name: got True; must be text: put it in quotes"),
        ("cluster.environment.env_vars={PORT: 8080}", "env_vars.PORT: got (hidden)"),
        ("datasets.emoji=[1, 2]", "datasets.emoji: got a list; must be a block of keys"),
        ("datasets.emoji.source.kind=tabel", "datasets.emoji.source.kind: got 'tabel'; did you mean 'table'?"),
        ("datasets.emoji.source={path: x}", "datasets.emoji.source.kind: is required"),
        ("evaluate.tasks.0.kind=retrival", "evaluate.tasks.0.kind: got 'retrival'; did you mean 'retrieval'?"),
        ("train={steps: 1, steps: 2}", "--set train: train.steps stands twice: characters 2 and 12"),
        ("train.stages.0.steps", "--set train.stages.0.steps: must be dotted.key=value"),
        ("storage.url.x=hunter2", "--set storage.url.x: storage.url is a single value"),
        ("train.stages.²=1", "the list has items 0 to 1"),
        ("train.deepspeed.zero_optimization.reduce_bucket_size=true", "reduce_bucket_size: got true; must be a number"),
        ("train.deepspeed.zero_optimization.offload_optimizer=cpu", "got 'cpu'; must be a block of keys"),
        ("train.deepspeed.prescale_gradients=no", "prescale_gradients: got 'no'; must be true or false"),
        ("train.deepspeed.steps_per_print=ten", "steps_per_print: got 'ten'; must be a whole number"),
        ("train.deepspeed.gradient_predivide_factor=true", "gradient_predivide_factor: got True; must be a number"),
    ],
)  # fmt: skip
def test_the_type_of_every_value_is_checked(tree: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_job(tree, "job.yaml", [override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "hunter2" not in str(caught.value)


def test_numbers_are_taken_as_people_write_them(tree: dict[str, Any]) -> None:
    text = (
        "model.overrides.layer_norm_eps=1e-05 model.overrides.hidden_dropout=1e-1 model.overrides.hidden_size=3.2e1 "
        "train.stages.0.steps=1e3 train.learning_rate=2E-4 train.deepspeed.zero_optimization.reduce_bucket_size=5e8 "
        "train.deepspeed.steps_per_print=1e2 train.deepspeed.gradient_predivide_factor=1e-1 checkpoints.every=1_000"
    )
    job = parse_job(tree, "job.yaml", text.split())
    config = GLSCLConfig.preset(job.model.preset, **job.model.overrides)
    assert (config.layer_norm_eps, config.hidden_dropout, config.hidden_size) == (1e-5, 0.1, 32)
    stage, block = job.train.stages[0], job.train.deepspeed
    whole = [stage.steps, block["zero_optimization"]["reduce_bucket_size"], block["steps_per_print"]]
    assert whole == [1000, 500_000_000, 100]
    assert {type(one) for one in (*whole, config.hidden_size)} == {int}
    assert block["gradient_predivide_factor"] == 0.1
    assert (job.train.learning_rate, job.checkpoints.every) == (2e-4, 1000)


def test_names_that_yaml_1_1_takes_for_something_else_are_names(tree: dict[str, Any], tmp_path: Path) -> None:
    text = write_job(tmp_path / "job.yaml", tree).read_text()
    text = text.replace("name: tiny", "name: 2024-01-01").replace("  emoji:", "  no:")
    (tmp_path / "job.yaml").write_text(text.replace("emoji: 1", "no: 1"))
    job = load_job(tmp_path / "job.yaml")
    assert job.name == "2024-01-01"
    assert job.train.stages[0].mixture == {"no": 1.0}


def test_a_key_of_the_file_that_stands_twice_is_told_with_both_lines(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    file = write_job(tmp_path / "job.yaml", tree)
    lines = file.read_text().splitlines()
    first = lines.index("checkpoints:") + 1
    file.write_text("\n".join([*lines, "checkpoints: {every: 2}"]))
    with pytest.raises(UserError) as caught:
        load_job(file)
    assert str(caught.value) == f"{file}: checkpoints stands twice: lines {first} and {len(lines) + 1}"
    assert load_job(write_job(file, tree), ["seed=1", "seed=2"]).seed == 2


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


def test_no_value_anywhere_ends_in_a_traceback(tree: dict[str, Any]) -> None:
    """A second or two: some thousand jobs."""
    tree["evaluate"]["tasks"].append(
        {
            **{
                "name": "questions",
                "kind": "vqa",
                "data": {"questions": "q", "images": "i", "annotations": "a"},
            },
            **{"train": [{"questions": "r", "images": "i", "annotations": "b"}], "fine_tune": {"steps": 3}},
        }
    )
    tree["train"]["deepspeed"] |= {"steps_per_print": 10}
    values = [
        None,
        True,
        -1,
        10**18,
        1e30,
        0.5,
        "",
        "x",
        "é" * 99,
        [],
        {},
        {"kind": "x"},
        [[None]],
        [{"kind": 1}],
    ]
    tried = 0
    for path in list(paths_of(tree)):
        *parents, last = path
        node: Any = tree
        for key in parents:
            node = node[key]
        before = node[last]
        for value in values:
            node[last] = value
            with suppress(UserError):
                parse_job(tree, "job.yaml")
            tried += 1
        node[last] = before
    assert parse_job(tree, "job.yaml").name == "tiny"
    assert tried > 1000


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
