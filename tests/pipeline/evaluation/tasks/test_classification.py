"""Zero-shot classification: an image belongs to the class whose prompts it is nearest to, counted plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from model import GLSCLForPreTraining
from pipeline.evaluation.result import TaskResult
from pipeline.evaluation.tasks.classification import task as classification
from pipeline.evaluation.tasks.classification.config import ClassificationTask
from pipeline.evaluation.tasks.classification.data import load_classes
from pipeline.evaluation.tasks.pictures import ImageReader
from sharding.errors import BadDataLimit, UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.evaluation.tasks.small import context_of, picture, tiny_model

COUNTS = {"red_fox": 7, "cat": 2, "blue_whale": 12, "owl": 4, "sea_snail": 1, "ant": 9}
PROMPTS = ["a photo of a {}.", "{}, seen from afar"]


def write_classes(storage: Storage) -> None:
    number = 0
    for name, count in COUNTS.items():
        for one in range(count):
            storage.write_bytes(f"images/{name}/{one % 2}/{one}.png", picture(number))
            number += 1
        storage.write_bytes(f"images/{name}/notes.txt", b"no image")
    storage.write_bytes("images/README", b"no image")


def task_of(**options: Any) -> ClassificationTask:
    return ClassificationTask(**{"name": "zero-shot", "images": "images", "prompts": PROMPTS, **options})


@pytest.fixture
def here(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path)
    write_classes(storage)
    return storage


@pytest.fixture(scope="module")
def model() -> GLSCLForPreTraining:
    return tiny_model(GLSCLForPreTraining)


def evaluate(model: GLSCLForPreTraining, storage: Storage, **options: Any) -> TaskResult:
    return classification.evaluate(context_of(model, storage), task_of(**options))


@torch.inference_mode()
def plain_scores(
    model: GLSCLForPreTraining, storage: Storage, names: dict[str, str], prompts: list[str]
) -> dict[str, dict[str, float]]:
    """By path of an image and folder of a class; one text and one image at a time."""
    context, reader = context_of(model, storage), ImageReader(storage)
    classes = {}
    for folder, name in names.items():
        texts = [context.processor(text=prompt.replace("{}", name)) for prompt in prompts]
        embeddings = [model.get_text_features(text["input_ids"], text["attention_mask"])[0] for text in texts]
        classes[folder] = F.normalize(sum(embeddings) / len(embeddings), dim=0)  # type: ignore[arg-type]
    found = {}
    for one in load_classes(storage, task_of()).images:
        pixels = context.processor(images=reader.pixels(one.image))["pixel_values"]
        image = model.get_image_features(pixels)[0]
        found[one.image.path] = {folder: float(image @ vector) for folder, vector in classes.items()}
    return found


def expected(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    ranks = {}
    for path, own in scores.items():
        right = path.split("/")[0]
        ranks[path] = 1 + sum(score >= own[right] for folder, score in own.items() if folder != right)
    by_class = {
        name: np.mean([rank == 1 for path, rank in ranks.items() if path.startswith(f"{name}/")])
        for name in COUNTS
    }
    return {
        "top1": float(np.mean([rank == 1 for rank in ranks.values()])),
        "top5": float(np.mean([rank <= 5 for rank in ranks.values()])),
        "mean_per_class": float(np.mean(list(by_class.values()))),
    }


def test_accuracies_are_those_of_a_plain_count(model: GLSCLForPreTraining, here: Storage) -> None:
    names = {name: name.replace("_", " ") for name in COUNTS}
    want = expected(plain_scores(model, here, names, PROMPTS))
    assert 0 < want["top1"] < want["top5"] < 1
    assert want["mean_per_class"] != want["top1"]
    found = evaluate(model, here)
    assert {name: found.metrics[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert found.facts == {
        "chance_top1": 1 / 6, "chance_top5": 5 / 6, "classes": 6.0, "images": 35.0, "skipped": 0.0,
    }  # fmt: skip


def test_names_come_from_a_file_and_prompts_have_one_by_default(
    model: GLSCLForPreTraining, here: Storage
) -> None:
    names = {name: f"thing {number}" for number, name in enumerate(COUNTS)}
    here.write_json("names.json", {**names, "unused": "x"})
    want = expected(plain_scores(model, here, names, ["a photo of a {}."]))
    task = ClassificationTask(name="z", images="images", class_names="names.json")
    found = classification.evaluate(context_of(model, here), task)
    assert {name: found.metrics[name] for name in want} == pytest.approx(want, abs=1e-12)


@torch.inference_mode()
def test_a_class_is_the_mean_of_its_prompts_of_unit_length(model: GLSCLForPreTraining, here: Storage) -> None:
    context = context_of(model, here)
    prompts = [*PROMPTS, "the {} of a person who has never seen one before"]
    names = [f"thing {number}" for number in range(15)]  # more than a block of texts
    found = classification.class_embeddings(context, names, prompts)
    for name, vector in zip(names, found, strict=True):
        texts = [context.processor(text=prompt.replace("{}", name)) for prompt in prompts]
        alone = [model.get_text_features(text["input_ids"], text["attention_mask"])[0] for text in texts]
        mean = torch.stack(alone).mean(dim=0)
        assert float(mean.norm()) < 0.99999
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-6)
        assert min(float((vector - one).abs().max()) for one in alone) > 1e-3


def test_folders_are_read_from_any_storage(storage: Storage) -> None:
    write_classes(storage)
    classes = load_classes(storage, task_of(images=f"{storage.url}/images"))
    assert classes.names == ["ant", "blue whale", "cat", "owl", "red fox", "sea snail"]
    assert len(classes.images) == 35
    assert [classes.names[one.label] for one in classes.images[:10]] == ["ant"] * 9 + ["blue whale"]


def test_a_limit_takes_from_all_classes_in_turn(here: Storage) -> None:
    labels = [one.label for one in load_classes(here, task_of(limit=13)).images]
    assert labels == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1]


def test_the_batch_size_changes_nothing_to_the_last_digit(model: GLSCLForPreTraining, here: Storage) -> None:
    classes = load_classes(here, task_of())
    embedded = [
        classification._embedded_images(
            context_of(model, here),
            task_of(batch_size=size),
            classes.images,
            classification.Skipped("z", 35, 0),
        ).embeddings
        for size in (1, 6, 64)
    ]
    assert torch.equal(embedded[0], embedded[1])
    assert torch.equal(embedded[0], embedded[2])
    assert len(embedded[0]) == 35


def test_a_model_that_tells_nothing_apart_is_last_not_first(here: Storage) -> None:
    same = tiny_model(GLSCLForPreTraining)
    with torch.no_grad():
        same.text_projection.out.weight.zero_()
    metrics = evaluate(same, here).metrics
    assert (metrics["top1"], metrics["top5"], metrics["mean_per_class"]) == (0.0, 0.0, 0.0)


def test_unreadable_images_are_counted_and_passed_over(model: GLSCLForPreTraining, here: Storage) -> None:
    whole = evaluate(model, here)
    here.write_bytes("images/ant/0/0.png", b"no picture")
    found = evaluate(model, here, bad_limit=0.1)
    assert (found.facts["images"], found.facts["skipped"]) == (34.0, 1.0)
    values = dict(zip(whole.families[0].keys, whole.families[0].metrics["top1"].values, strict=True))
    values.pop("ant/0/0.png")
    assert dict(zip(found.families[0].keys, found.families[0].metrics["top1"].values, strict=True)) == values
    with pytest.raises(BadDataLimit, match="decode-failed: 1"):
        evaluate(model, here, bad_limit=0.01)
    for name in COUNTS:
        for one in range(COUNTS[name]):
            here.write_bytes(f"images/{name}/{one % 2}/{one}.png", b"no picture")
    with pytest.raises(UserError, match="none of the images of images can be read"):
        evaluate(model, here, bad_limit=1)


def test_folders_that_make_no_classes_are_named(here: Storage, tmp_path: Path) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            load_classes(here, task_of(**options))
        return str(caught.value)

    assert said(images="none").endswith("/none does not exist")
    here.write_bytes("one/a/x.png", picture(0))
    assert "one has 1 folders with images: two classes are needed at least" in said(images="one")
    here.write_bytes("one/b/notes.txt", b"x")
    assert "the folder of class 'b' below" in said(images="one")
    here.delete("one/b/notes.txt")
    assert (tmp_path / "one/b").is_dir()
    assert said(images="one").endswith("/one has no images")
    (tmp_path / "one/b").rmdir()
    here.write_bytes("one/c/x.png", picture(1))
    here.write_bytes("one/x.png", picture(1))
    assert "one/x.png is in no class" in said(images="one")
    for names, message in (
        ({"cat": "cat"}, "names.json has no name for the folder 'ant'"),
        (dict.fromkeys(COUNTS, "same"), "'ant' and 'blue_whale' have the same name, 'same'"),
        (dict.fromkeys(COUNTS, 3), "must be an object with a name, which is text"),
        (["cat"], "must be an object with a name, which is text"),
    ):
        here.write_json("names.json", names)
        assert message in said(class_names="names.json")
    assert said(class_names="none.json").startswith("class_names: there is no file")


@pytest.mark.parametrize("prompt", ["no class", "{} and {}", "{name}", "{0}", "{"])
def test_a_prompt_has_room_for_the_class_once(prompt: str) -> None:
    with pytest.raises(ValidationError, match="prompt"):
        task_of(prompts=[prompt])
    with pytest.raises(ValidationError):
        task_of(prompts=[])


def test_the_digest_is_of_images_and_names(here: Storage) -> None:
    first = task_of().data_digest(here, {})
    here.write_json("names.json", {name: name for name in COUNTS})
    named = task_of(class_names="names.json").data_digest(here, {})
    here.write_json("names.json", {name: name + "s" for name in COUNTS})
    assert task_of(class_names="names.json").data_digest(here, {}) != named != first
    here.write_bytes("images/ant/new.png", b"x")
    assert task_of().data_digest(here, {}) != first


def test_examples_name_the_nearest_classes(model: GLSCLForPreTraining, here: Storage) -> None:
    found = evaluate(model, here)
    assert found.examples == evaluate(model, here).examples
    wrong = [one for one in found.examples if not one.right]
    right = [one for one in found.examples if one.right]
    assert 1 <= len(right) <= 6
    assert len(wrong) == 6
    assert right[0].lines[0][1].startswith(right[0].title)
    assert not wrong[0].lines[0][1].startswith(wrong[0].title)
    assert wrong[0].pictures[0][0][:2] == b"\xff\xd8"
