"""Official files become batches that are a function of the files, the seed and the step alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import GLSCLConfig, GLSCLProcessor
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.pictures import ImageAddress
from pipeline.fine_tuning.config import DATA
from pipeline.fine_tuning.examples import Collator, Example, ExampleTable, FineTuningBatch, Sample, blank
from pipeline.fine_tuning.learner import Material, TaskTraining, open_training
from pipeline.training.loading import Slot, StageSampler, batch_loader
from sharding.errors import UserError
from sharding.storage import Storage
from tests.pipeline.fine_tuning.material import NAMES, Run, make_run, nlvr2_task, vqa_task

CONFIG = GLSCLConfig.preset("tiny", vocab_size=400)
AUGMENTED = {"crop": 0.5, "rand_augment": True}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def opened(run: Run, task: TaskConfig) -> TaskTraining:
    return open_training(task, Material(run.storage, {}, run.run.at("fine-tuning/test")))


def batches(
    run: Run, task: TaskConfig, *, start: int = 0, worker: int = 0, workers: int = 1, processes: int = 0
) -> list[FineTuningBatch]:
    training = opened(run, task)
    assert task.fine_tuning is not None
    course = task.fine_tuning.course(sum(shard.samples for shard in training.data.shards))
    [stage] = course.stages
    data = {DATA: training.data}
    sampler = StageSampler(stage, course, data, seed=3, start_step=start, worker=worker, workers=workers)
    collate = Collator(GLSCLProcessor.from_config(CONFIG), training.labels, None)
    return list(batch_loader(training.dataset(stage, 3), sampler, collate, processes))  # type: ignore[arg-type]


def assert_same(first: FineTuningBatch, second: FineTuningBatch) -> None:
    assert (first.keys, first.slots, first.causes) == (second.keys, second.slots, second.causes)
    for name in ("valid", "input_ids", "attention_mask", "pixel_values", "labels"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_two_workers_together_hold_the_batch_of_one_and_a_resume_gives_the_rest(run: Run) -> None:
    task = vqa_task(run.storage, steps=5, augmentation=AUGMENTED)
    whole = batches(run, task)
    assert len(whole) == 5
    parts = [batches(run, task, worker=worker, workers=2) for worker in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.keys == first.keys + second.keys
        for name in ("pixel_values", "labels", "valid", "input_ids"):
            both = torch.cat([getattr(first, name), getattr(second, name)])
            assert torch.equal(getattr(batch, name), both), name
    for start in (1, 4):
        for batch, rest in zip(whole[start:], batches(run, task, start=start), strict=True):
            assert_same(batch, rest)
    again = whole[3].keys[0]  # of the second epoch
    [(first, row)] = [(batch, batch.keys.index(again)) for batch in whole[:3] if again in batch.keys]
    assert not torch.equal(whole[3].pixel_values[0], first.pixel_values[row]), "augmented anew"


def test_an_epoch_asks_each_question_once_and_the_next_in_another_order(run: Run) -> None:
    task = vqa_task(run.storage, count=50, steps=8)  # 4 batches of 16 for 50 questions in 4 lanes
    asked = batches(run, task)
    for epoch in (asked[:4], asked[4:]):
        keys = Counter(
            key for batch in epoch for key, valid in zip(batch.keys, batch.valid, strict=True) if valid
        )
        assert keys == {f"0/{question}": 1 for question in range(50)}
        assert not any(batch.bad for batch in epoch)
    assert [batch.keys for batch in asked[:4]] != [batch.keys for batch in asked[4:]]
    assert not torch.equal(asked[0].pixel_values, asked[4].pixel_values)


@pytest.mark.slow
def test_loader_processes_give_the_same_batches(run: Run) -> None:
    task = nlvr2_task(run.storage, steps=3, augmentation=AUGMENTED)
    for alone, beside in zip(batches(run, task), batches(run, task, processes=2), strict=True):
        assert_same(alone, beside)


def test_an_image_that_cannot_be_read_keeps_its_slots_masked_and_counted(run: Run) -> None:
    task = vqa_task(run.storage, steps=3)
    good = batches(run, task)
    run.storage.delete("images/2-0.png")
    run.storage.write_bytes("images/1-1.png", b"no picture")
    found = batches(run, task)
    causes: Counter[str] = Counter()
    for batch, before in zip(found, good, strict=True):
        assert batch.slots == before.slots
        assert batch.keys == before.keys
        causes.update(batch.bad)
        assert int(before.valid.sum() - batch.valid.sum()) == batch.bad.total()
        assert batch.labels is not None
        assert not batch.labels[~batch.valid].any()
    assert causes == {"missing-image": 6, "decode-failed": 6}


def test_labels_are_the_soft_scores_of_answers_in_the_vocabulary(run: Run) -> None:
    task = vqa_task(run.storage)
    annotations = run.storage.read_json("vqa/train-a.json")
    given = ["fist"] * 4 + ["heart"] * 2 + ["a Man", "lamp", "sofa", "sofa"]
    annotations["annotations"][0]["answers"] = [{"answer": answer} for answer in given]
    annotations["annotations"][1]["answers"] = [{"answer": "nothing of this"}] * 10
    run.storage.write_json("vqa/train-a.json", annotations)
    training = opened(run, task)
    assert isinstance(training.data, ExampleTable)
    assert len(training.data) == 47, "a question without an answer of the vocabulary cannot be learnt from"
    assert training.labels == 4
    named: Any = training
    answers = named._answers
    assert sorted(answers) == sorted(NAMES)
    scores = {answers[label]: score for label, score in training.data.example(0, 0).labels}
    assert scores == pytest.approx({"fist": 1.0, "heart": 0.6, "man": 0.3})
    sample = Sample(
        Slot(DATA, 0, 0, 0), "key", blank(1, 8), ["text"], training.data.example(0, 0).labels, True
    )
    collate = Collator(GLSCLProcessor.from_config(CONFIG), training.labels, None)
    spread = collate([sample]).labels
    assert spread is not None
    assert dict(zip(answers, spread[0].tolist(), strict=True)) == pytest.approx(scores | {"tongue": 0.0})
    table = run.storage.read_json("vqa/train-q.json")
    assert training.data.example(0, 0).text == table["questions"][0]["question"]


def test_a_vocabulary_of_a_file_is_taken_in_its_order(run: Run) -> None:
    task = vqa_task(run.storage).model_copy(update={"answer2id": "answers.json"})
    with pytest.raises(UserError, match="answer2id: there is no file"):
        opened(run, task)
    run.storage.write_json("answers.json", {"lamp": 1, "heart": 0})
    training = opened(run, task)
    assert isinstance(training.data, ExampleTable)
    assert training.labels == 2
    assert len(training.data) == 12  # the questions about the heart
    run.storage.write_json("answers.json", ["lamp", "sofa"])
    with pytest.raises(UserError, match="no answer of 'train' is in the vocabulary of 2 answers") as caught:
        opened(run, task)
    assert "e.g. train.0, question " in str(caught.value)


def test_answers_of_one_annotator_each_are_learnt_from(run: Run) -> None:
    task = vqa_task(run.storage)
    annotations = run.storage.read_json("vqa/train-a.json")
    for one in annotations["annotations"]:
        one["answers"] = [{"answer": f"The {one['multiple_choice_answer'].title()}."}]
    run.storage.write_json("vqa/train-a.json", annotations)
    training = opened(run, task)
    assert isinstance(training.data, ExampleTable)
    assert len(training.data) == len(annotations["annotations"])
    assert {
        score for number in range(len(training.data)) for _, score in training.data.example(number, 0).labels
    } == {1.0}


def test_a_pair_comes_left_image_first_with_its_label(run: Run) -> None:
    task = nlvr2_task(run.storage, steps=3)
    training = opened(run, task)
    assert isinstance(training.data, ExampleTable)
    for batch in batches(run, task):
        assert batch.pixel_values.shape == (16, 2, 3, 24, 24)
        assert batch.labels is not None
        assert torch.equal(batch.labels.sum(dim=1), torch.ones(16))
        blue = batch.pixel_values[:, 0].float().mean(dim=(2, 3))
        for row, key in enumerate(batch.keys):
            pair = int(key.split("-")[1])
            example = training.data.example(0, pair)
            assert [image.path[-8:] for image in example.images] == ["img0.png", "img1.png"]
            assert batch.labels[row, example.labels[0][0]] == 1
            is_fist = blue[row].max() < 200  # the others are bright
            assert is_fist == bool(batch.labels[row, 1]), key


def test_statements_without_a_label_are_refused(run: Run) -> None:
    task = nlvr2_task(run.storage)
    lines = run.storage.read_bytes("nlvr2/train.json").replace(b', "label": "True"', b"", 1)
    run.storage.write_bytes("nlvr2/train.json", lines)
    with pytest.raises(UserError, match=r"train\.0\.statements: .* has no label to train on"):
        opened(run, task)


def _table(count: int, changed: int | None = None) -> ExampleTable:
    return ExampleTable(
        Example(
            key=f"k{number}",
            text="other" if number == changed else f"text {number}",
            images=[ImageAddress(f"folder{number % 2}", f"{number}.jpg")],
            labels=[(number, 0.5)],
        )
        for number in range(count)
    )


def test_a_table_gives_back_its_examples_and_its_digest_tells_others_apart() -> None:
    table = _table(2500)
    assert [shard.samples for shard in table.shards] == [1000, 1000, 500]
    example = table.example(2, 499)
    assert example == Example("k2499", "text 2499", [ImageAddress("folder1", "2499.jpg")], [(2499, 0.5)])
    assert table.shards_digest == _table(2500).shards_digest
    digests = {_table(2500).shards_digest, _table(2499).shards_digest, _table(2500, 1200).shards_digest}
    assert len(digests) == 3
    assert np.isclose(table.example(0, 7).labels[0][1], 0.5)


def test_nothing_of_the_storage_is_listed_or_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task = vqa_task(run.storage, steps=1)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("annotations and images are read, nothing else is touched")

    for name in ("list", "write_bytes", "upload", "delete"):
        monkeypatch.setattr(Storage, name, refused)
    assert len(batches(run, task)) == 1
