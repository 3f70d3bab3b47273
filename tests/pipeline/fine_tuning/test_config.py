"""The presets are the paper's recipes, and reach the optimizer; what changes a result changes the task's version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from model import GLSCLForImageTextRetrieval, GLSCLForNLVR2, GLSCLForVisualQuestionAnswering
from model.glscl import GLSCLPreTrainedModel
from pipeline.config import parse_job
from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.vqa.config import VQATask
from pipeline.fine_tuning.config import FineTuning, NLVR2FineTuning, RetrievalFineTuning, VQAFineTuning
from sharding.errors import UserError
from sharding.storage import open_storage
from tests.fixtures.jobs import tiny_job
from tests.pipeline.evaluation.tasks.small import tiny_model
from tests.pipeline.fine_tuning.material import retrieval_task, vqa_task

IMAGES = RetrievalFineTuning(dataset="pairs")
CLIPS = RetrievalFineTuning(dataset="clips", modality="video")


@pytest.mark.parametrize(
    ("recipe", "rate", "head", "fusion", "batch", "side", "warmup"),
    [
        (VQAFineTuning(), 5e-6, 50, 10, 512, 384, 0.1),
        (NLVR2FineTuning(), 1e-5, 10, 10, 256, 288, 0.1),
        (IMAGES, 5e-6, 5, 5, 512, 384, 0.1),
        (CLIPS, 5e-6, 5, 5, 256, 224, 0.05),
    ],
)
def test_the_presets_are_the_papers_numbers(
    recipe: FineTuning, rate: float, head: float, fusion: float, batch: int, side: int, warmup: float
) -> None:
    assert (recipe.learning_rate, recipe.head_multiplier, recipe.fusion_multiplier) == (rate, head, fusion)
    assert (recipe.global_batch, recipe.resolution, recipe.schedule.warmup) == (batch, side, warmup)
    assert (recipe.betas, recipe.eps, recipe.weight_decay) == ((0.9, 0.98), 1e-8, 0.01)
    assert (recipe.schedule.decay, recipe.clipping, recipe.epochs) == ("linear", None, 10)
    assert recipe.augmentation.rand_augment
    assert recipe.augmentation.crop == 1.0  # CLIP's resize and centre crop
    assert recipe.augmentation.flip == 0.0  # left and right mean something


def test_retrieval_ranks_against_15_random_texts_with_itc_beside() -> None:
    assert (IMAGES.negatives, IMAGES.itc_weight) == (15, 0.5)
    assert (CLIPS.negatives, CLIPS.itc_weight) == (15, 1.0)
    own = RetrievalFineTuning(dataset="clips", modality="video", global_batch=64, itc_weight=0.25)
    assert (own.global_batch, own.itc_weight, own.resolution) == (64, 0.25, 224)


@pytest.mark.parametrize(
    ("kind", "recipe", "head"),
    [
        (GLSCLForVisualQuestionAnswering, VQAFineTuning(), "vqa_classifier."),
        (GLSCLForNLVR2, NLVR2FineTuning(), "nlvr2_classifier."),
        (GLSCLForImageTextRetrieval, IMAGES, "rank_output."),
    ],
)
def test_every_parameter_trains_at_its_own_rate(
    kind: type[GLSCLPreTrainedModel], recipe: FineTuning, head: str
) -> None:
    model = tiny_model(kind)
    if isinstance(model, GLSCLForImageTextRetrieval):
        model.start_from_pretraining(set())
    groups = model.parameter_groups(
        recipe.learning_rate,
        recipe.weight_decay,
        fusion_multiplier=recipe.fusion_multiplier,
        head_multiplier=recipe.head_multiplier,
    )
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    fused = ("glscl.fusion.", "glscl.text_transform.", "glscl.vision_transform.")
    fused += ("glscl.text_pooler.", "glscl.vision_pooler.")
    seen = set()
    for name, parameter in model.named_parameters():
        if name.startswith("matching_head."):
            assert id(parameter) not in rates, "the ITM head is kept as it is"
            continue
        factor = recipe.head_multiplier if name.startswith(head) else 1.0
        factor = recipe.fusion_multiplier if name.startswith(fused) else factor
        assert rates[id(parameter)] == pytest.approx(recipe.learning_rate * factor), name
        seen.add(factor)
    assert seen == {1.0, recipe.head_multiplier, recipe.fusion_multiplier}


def test_epochs_become_steps_and_steps_stand_as_they_are() -> None:
    course = VQAFineTuning().course(samples=1000)  # 64 lanes of 16, 8 of each in a batch of 512
    assert course.total_steps == 10 * 2
    assert VQAFineTuning(steps=7).course(samples=1000).total_steps == 7
    [stage] = course.stages
    assert (stage.resolution, stage.checkpoint_every) == (384, 1000)
    assert (course.learning_rate, course.head_multiplier, course.zero_stage) == (5e-6, 50, 1)


def test_what_costs_only_leaves_the_version_and_the_rest_changes_it(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)

    def version(**recipe: Any) -> str:
        return vqa_task(storage, **recipe).version("0")

    same = [{"workers": 4}, {"loader_processes": 2}, {"checkpoint_every": 3}, {"max_failures": 9}]
    assert {version(**changes) for changes in same} == {version()}
    other = [{"learning_rate": 1e-4}, {"steps": 21}, {"resolution": 32}, {"precision": "bf16"}, {"lanes": 2}]
    assert len({version(**changes) for changes in [*other, {}]}) == 6
    assert retrieval_task(negatives=2).version("0") != retrieval_task().version("0")


def test_a_task_that_fine_tunes_runs_at_the_end_after_the_others_and_has_a_week(tmp_path: Path) -> None:
    task = vqa_task(open_storage(tmp_path))
    assert (task.after, task.priority, task.timeout_s) == ("end", -1, 7 * 86400)
    tuned = retrieval_task()
    assert (tuned.after, tuned.priority, tuned.timeout_s) == ("end", -1, 7 * 86400)
    plain = RetrievalTask(name="zero-shot", dataset="held-out")
    assert (plain.after, plain.priority, plain.timeout_s) == (None, 0, None)
    block = task.model_dump() | {"after": "checkpoint", "timeout_s": 60.0, "priority": 3}
    said = VQATask.model_validate(block)
    assert (said.after, said.timeout_s, said.priority) == ("checkpoint", 60, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset": "emoij"}, "fine_tune.dataset: there is no dataset 'emoij'; did you mean 'emoji'?"),
        ({"dataset": "clips"}, "fine_tune.modality: got image; the dataset 'clips' is of videos"),
        ({"resolution": 100}, "fine_tune.resolution: 100 is not a multiple of the model's patch_size 8"),
        ({"dataset": "held-out"}, "held-out is what is measured on: not held out"),
        ({"global_batch": 100}, "fine_tune.global_batch: a global batch of 100 is not a multiple of lanes"),
        ({"workers": 5}, "fine_tune.lanes: got 64, which 5 workers do not divide"),
        ({"deepspeed": {"optimizer": {}}}, "fine_tune.deepspeed.optimizer is decided by fine_tune.learning"),
        ({"epoch": 3}, "fine_tune.epoch: unknown key; did you mean 'epochs'?"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(changes: dict[str, Any], told: str) -> None:
    tree = tiny_job("/data/raw", "/data/storage")
    block = {"dataset": "emoji", "resolution": 32, **changes}
    tree["evaluate"]["tasks"] = [{"name": "held-out", "dataset": "held-out", "fine_tune": block}]
    with pytest.raises(UserError) as caught:
        parse_job(tree, "job.yaml")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nlvr2_needs_no_recipe() -> None:
    split = {"statements": "dev.json", "images": "images"}
    task = NLVR2Task.model_validate(
        {"name": "n", "data": split, "train": [{**split, "statements": "t.json"}]}
    )
    assert task.fine_tuning == NLVR2FineTuning()
    with pytest.raises(ValidationError, match=r"fine_tune\.epochs"):
        NLVR2Task.model_validate({**task.model_dump(), "fine_tune": {"epochs": 0}})


def test_the_documented_tasks_are_valid() -> None:
    text = (Path(__file__).parents[3] / "docs/fine-tuning.md").read_text("utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    tree = tiny_job("/data/raw", "/data/storage")
    for name, like in (("flickr30k", "emoji"), ("msrvtt", "clips")):
        for split in ("train", "test", "1ka"):
            tree["datasets"][f"{name}-{split}"] = tree["datasets"][like]
    tasks = parse_job(tree | yaml.safe_load(block), "docs").evaluate.tasks
    found = {task.name: task.fine_tuning for task in tasks}
    assert {name: type(recipe) for name, recipe in found.items()} == {
        "vqa": VQAFineTuning,
        "nlvr2": NLVR2FineTuning,
        "flickr30k": RetrievalFineTuning,
        "msrvtt": RetrievalFineTuning,
    }
    for name, recipe in found.items():
        assert recipe is not None
        assert recipe.workers == 8
        assert recipe.learning_rate == (1e-5 if name == "nlvr2" else 5e-6)
