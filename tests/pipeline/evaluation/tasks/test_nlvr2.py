"""NLVR2: published files are read as they are; accuracy and consistency are the data set's script's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model import GLSCLForNLVR2, GLSCLForPreTraining
from pipeline.evaluation.tasks.nlvr2 import task as nlvr2
from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
from pipeline.evaluation.tasks.nlvr2.data import NLVR2Data, Statement, load_statements
from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader, Skipped
from sharding.errors import BadDataLimit, UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.evaluation.tasks.small import context_of, picture, processor_of, tiny_model, write_lines


def write_split(storage: Storage, sets: int = 5) -> NLVR2Data:
    """Of each set of images four pairs, with each of two sentences: ``dev-SET-PAIR-SENTENCE``."""
    generator = np.random.default_rng(1)
    rows = []
    for group in range(sets):
        for pair in range(4):
            for side in range(2):
                path = f"images/dev-{group}-{pair}-img{side}.png"
                storage.write_bytes(path, picture(8 * group + 2 * pair + side))
            rows += [
                {
                    "identifier": f"dev-{group}-{pair}-{sentence}",
                    "sentence": f"there are {sentence + 1} of kind {group}",
                    "label": str(bool(generator.integers(2))),
                    "left_url": "http://example.org/a.jpg",
                    "writer": 3,
                }
                for sentence in range(2)
            ]
    write_lines(storage, "dev.json", rows)
    return NLVR2Data(statements="dev.json", images="images")


def task_of(data: NLVR2Data, **options: Any) -> NLVR2Task:
    train = NLVR2Data(statements="train.json", images="t")
    return NLVR2Task(**{"name": "nlvr2", "data": data, "train": [train], **options})


@pytest.fixture
def here(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def logits_one_by_one(
    model: GLSCLForNLVR2, storage: Storage, statements: list[Statement]
) -> Iterator[torch.Tensor]:
    processor, reader = processor_of(model), ImageReader(storage)
    for one in statements:
        pair = [reader.pixels(one.left), reader.pixels(one.right)]
        inputs = processor(images=[pair], text=one.sentence)
        with torch.inference_mode():
            yield model(**inputs).logits[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GLSCLForNLVR2:
    """One that judges differently: neither label is likelier by itself."""
    model = tiny_model(GLSCLForNLVR2)
    storage = open_storage(tmp_path_factory.mktemp("statements"))
    logits = torch.stack(
        list(logits_one_by_one(model, storage, load_statements(storage, write_split(storage))))
    )
    with torch.no_grad():
        model.nlvr2_classifier[3].bias.sub_(logits.median(dim=0).values)
    return model


def test_published_files_are_read_from_any_storage(storage: Storage) -> None:
    data = write_split(storage, 2)
    statements = load_statements(storage, data)
    assert len(statements) == 16
    third = statements[3]
    assert (third.identifier, third.sentence) == ("dev-0-1-1", "there are 2 of kind 0")
    assert third.left == ImageAddress("images", "dev-0-1-img0.png")
    assert third.right == ImageAddress("images", "dev-0-1-img1.png")
    assert third.sentence_key == "dev-0-1"
    assert third.set_key == "dev-0"
    assert {type(one.label) for one in statements} == {bool}
    absolute = NLVR2Data(statements=f"{storage.url}/dev.json", images=f"{storage.url}/images")
    again = load_statements(storage, absolute)
    reader = ImageReader(storage)
    assert np.array_equal(reader.pixels(again[0].right), reader.pixels(statements[0].right))
    first = data.digest(storage, "data")
    assert absolute.digest(storage, "data") == first
    storage.write_bytes("images/dev-9-0-img0.png", b"new")
    assert data.digest(storage, "data") != first


def test_training_statements_name_the_directory_of_their_images(here: Storage) -> None:
    row = {"identifier": "train-10171-2-0", "sentence": "x", "label": "False", "directory": 60}
    write_lines(here, "t.json", [row, {**row, "identifier": "train-1-0-0", "directory": "61"}])
    first, second = load_statements(here, NLVR2Data(statements="t.json", images="images/train"))
    assert first.left == ImageAddress("images/train", "60/train-10171-2-img0.png")
    assert second.right == ImageAddress("images/train", "61/train-1-0-img1.png")
    assert first.label is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identifier": "dev-1-2"}, "line 2: identifier 'dev-1-2' is not split-set-pair-sentence"),
        ({"identifier": "dev-1-../x-0"}, "is not split-set-pair-sentence"),
        ({"identifier": "dev-0-0-0"}, "line 2: identifier 'dev-0-0-0' stands there twice"),
        ({"identifier": 3}, "line 2: 'identifier' is not text but int"),
        ({"sentence": None}, "line 2: 'sentence' is not text but NoneType"),
        ({"label": "maybe"}, "line 2: 'label' is neither True nor False but 'maybe'"),
        ({"label": 1}, "line 2: 'label' is neither True nor False but '1'"),
        ({"directory": [1]}, "line 2: 'directory' is neither a number nor text but list"),
        ({"directory": "\ud83d"}, "line 2: 'directory' holds half a surrogate pair"),
    ],
)
def test_a_bad_statement_is_named(here: Storage, change: dict[str, Any], said: str) -> None:
    row = {"identifier": "dev-0-0-0", "sentence": "x", "label": "True"}
    write_lines(here, "dev.json", [row, {**row, "identifier": "dev-0-0-1", **change}])
    with pytest.raises(UserError, match=said):
        load_statements(here, NLVR2Data(statements="dev.json", images="i"))


def test_missing_and_empty_files_are_named(here: Storage) -> None:
    with pytest.raises(UserError, match=r"^data\.statements: there is no file .*none\.json"):
        load_statements(here, NLVR2Data(statements="none.json", images="i"))
    here.write_bytes("dev.json", b"\n")
    with pytest.raises(UserError, match=r"data\.statements: dev\.json has no statements"):
        load_statements(here, NLVR2Data(statements="dev.json", images="i"))
    data = NLVR2Data(statements="dev.json", images="i")
    with pytest.raises(ValidationError, match=r"train\.0\.statements: dev\.json is what 'data' asks"):
        task_of(data, train=[data])


def test_judgements_and_scores_are_those_of_one_statement_at_a_time(
    model: GLSCLForNLVR2, here: Storage
) -> None:
    statements = load_statements(here, data := write_split(here))
    said = {
        one.identifier: bool(logits.argmax())
        for one, logits in zip(statements, logits_one_by_one(model, here, statements), strict=True)
    }
    assert 5 < sum(said.values()) < 35
    found = nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data, batch_size=3), 1)
    assert found.files[nlvr2.PREDICTIONS_FILE].decode() == "".join(
        f"{name},{judgement}\n" for name, judgement in said.items()
    )
    # As the data set's script counts: the pair's number is taken out of the identifier.
    consistent: dict[str, bool] = {}
    right = 0
    for one in statements:
        parts = one.identifier.split("-")
        parts[2] = ""
        key = "-".join(parts)
        correct = str(said[one.identifier]).lower() == str(one.label).lower()
        right += correct
        consistent[key] = consistent.get(key, True) and correct
    assert found.metrics["accuracy"] == right / 40
    assert found.metrics["consistency"] == sum(consistent.values()) / 10
    true = sum(bool(one.label) for one in statements)
    assert found.facts == {"statements": 40, "skipped": 0, "best_constant": max(true, 40 - true) / 40}
    assert found.families[0].groups is not None
    assert sorted(set(found.families[0].groups)) == [f"dev-{group}" for group in range(5)]


def test_a_sentence_is_consistent_with_all_its_pairs_only(model: GLSCLForNLVR2, here: Storage) -> None:
    data = write_split(here, 1)
    found = nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data), 1)
    lines = found.files[nlvr2.PREDICTIONS_FILE].decode().splitlines()
    said = [line.split(",") for line in lines]
    rows = [{"identifier": name, "sentence": f"there are {int(name[-1]) + 1} of kind 0"} for name, _ in said]

    def relabelled(wrong: set[str]) -> dict[str, float]:
        labels = [(one == "True") != (name in wrong) for name, one in said]
        write_lines(
            here, "dev.json", [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
        )
        return nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data), 1).metrics

    def scores(wrong: set[str]) -> tuple[float, float]:
        metrics = relabelled(wrong)
        return metrics["accuracy"], metrics["consistency"]

    assert scores(set()) == (1.0, 1.0)
    assert scores({"dev-0-2-1"}) == (0.875, 0.5)
    assert scores({"dev-0-2-1", "dev-0-3-1"}) == (0.75, 0.5)
    assert scores({"dev-0-2-1", "dev-0-0-0"}) == (0.75, 0.0)


def test_the_batch_size_changes_nothing_to_the_last_digit(model: GLSCLForNLVR2, here: Storage) -> None:
    statements = load_statements(here, data := write_split(here))
    runs = [
        nlvr2._judged(
            model, processor_of(model), here, task_of(data, batch_size=size), statements, Skipped("n", 40, 0)
        )
        for size in (1, 7, 64)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert len({one.probability for one in runs[0]}) > 30


def test_unreadable_images_leave_out_their_statements_and_sentences(
    model: GLSCLForNLVR2, here: Storage
) -> None:
    data = write_split(here, 2)
    here.delete("images/dev-0-3-img1.png")
    found = nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data, bad_limit=0.2), 1)
    assert (found.facts["statements"], found.facts["skipped"]) == (14.0, 2.0)
    assert [family.name for family in found.families] == ["statements", "sentences"]
    assert found.families[1].keys == ["dev-1-0", "dev-1-1"]
    with pytest.raises(BadDataLimit, match="missing-image: 2"):
        nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data, bad_limit=0.1), 1)


def test_without_labels_there_are_predictions_alone(model: GLSCLForNLVR2, here: Storage) -> None:
    data = write_split(here, 1)
    rows = [{"identifier": f"dev-0-{pair}-0", "sentence": "x"} for pair in range(4)]
    write_lines(here, "dev.json", rows)
    found = nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data), 1)
    assert found.metrics == {"statements": 4.0, "skipped": 0.0}
    assert len(found.files[nlvr2.PREDICTIONS_FILE].splitlines()) == 4
    write_lines(here, "dev.json", [*rows[:3], {**rows[3], "label": "True"}])
    with pytest.raises(UserError, match=r"data\.statements: dev-0-0-0 has no label, others have"):
        nlvr2.evaluate_nlvr2(model, processor_of(model), here, task_of(data), 1)


def test_a_context_gives_the_model(model: GLSCLForNLVR2, here: Storage) -> None:
    task = task_of(write_split(here, 1))
    found = nlvr2.evaluate(context_of(model, here), task)
    assert found.metrics == nlvr2.evaluate_nlvr2(model, processor_of(model), here, task, 5).metrics
    assert len(found.examples[0].pictures) == 2
    with pytest.raises(UserError, match="the model was not fine-tuned on pairs of images"):
        nlvr2.evaluate(context_of(tiny_model(GLSCLForPreTraining), here), task)


def test_a_model_of_no_numbers_has_nothing_right(here: Storage) -> None:
    broken = tiny_model(GLSCLForNLVR2)
    with torch.no_grad():
        broken.nlvr2_classifier[3].bias.fill_(float("nan"))
    found = nlvr2.evaluate_nlvr2(broken, processor_of(broken), here, task_of(write_split(here, 1)), 1)
    assert (found.metrics["accuracy"], found.metrics["consistency"]) == (0.0, 0.0)
