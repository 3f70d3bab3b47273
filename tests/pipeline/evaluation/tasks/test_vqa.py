"""VQAv2: published files are read as they are, and the answers scored as one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model import GLSCLForPreTraining, GLSCLForVisualQuestionAnswering
from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader, Skipped
from pipeline.evaluation.tasks.vqa import task as vqa
from pipeline.evaluation.tasks.vqa.answers import accuracy, normalised
from pipeline.evaluation.tasks.vqa.config import VQATask
from pipeline.evaluation.tasks.vqa.data import Question, VQAData, load_questions
from sharding.errors import BadDataLimit, UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.evaluation.tasks.small import context_of, picture, processor_of, tiny_model

ANSWERS = ["yes", "no", "2", "red", "cat"]
KINDS = ["yes/no", "number", "other"]


def write_split(storage: Storage, count: int = 40, split: str = "val2014") -> VQAData:
    """``count`` questions, three about an image, with answers of ten annotators; file names of the data set."""
    generator = np.random.default_rng(3)
    questions, annotations = [], []
    for number in range(count):
        image = 100 + number // 3
        question_id = image * 1000 + number % 3
        storage.write_bytes(f"images/COCO_{split}_{image:012d}.jpg", picture(image, "JPEG"))
        text = f"is the {ANSWERS[number % 5]} thing {number} here?"
        questions.append({"image_id": image, "question": text, "question_id": question_id})
        pool = [*ANSWERS, "The Cat", "two", "unknown"]
        given = [str(generator.choice(pool)) for _ in range(10)]
        annotations.append(
            {
                "question_type": "is the",
                "multiple_choice_answer": max(given, key=given.count),
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": 1 + n}
                    for n, answer in enumerate(given)
                ],
                "image_id": image,
                "answer_type": KINDS[number % 3],
                "question_id": question_id,
            }
        )
    head = {"info": {"version": "2.0"}, "license": {"name": "x"}, "data_type": "mscoco"}
    storage.write_json("questions.json", {**head, "data_subtype": split, "questions": questions})
    storage.write_json("annotations.json", {**head, "data_subtype": split, "annotations": annotations})
    return VQAData(questions="questions.json", annotations="annotations.json", images="images")


def task_of(data: VQAData, **options: Any) -> VQATask:
    train = VQAData(questions="t.json", annotations="u.json", images="v")
    return VQATask(**{"name": "vqa", "data": data, "train": [train], **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GLSCLForVisualQuestionAnswering:
    """One that gives different answers: no answer is likelier than another by itself."""
    model = tiny_model(GLSCLForVisualQuestionAnswering, id2label=dict(enumerate(ANSWERS)))
    storage = open_storage(tmp_path_factory.mktemp("questions"))
    logits = torch.stack(
        list(logits_one_by_one(model, storage, load_questions(storage, write_split(storage))))
    )
    with torch.no_grad():
        model.vqa_classifier[3].bias.sub_(logits.mean(dim=0))
    return model


def logits_one_by_one(
    model: GLSCLForVisualQuestionAnswering, storage: Storage, questions: list[Question]
) -> Iterator[torch.Tensor]:
    """Of one forward pass for each question."""
    processor, reader = processor_of(model), ImageReader(storage)
    for question in questions:
        inputs = processor(images=reader.pixels(question.image), text=question.question)
        with torch.inference_mode():
            yield model(**inputs).logits[0]


def test_published_files_are_read_from_any_storage(storage: Storage) -> None:
    data = write_split(storage, 7)
    questions = load_questions(storage, data)
    assert [one.question_id for one in questions] == [
        100000, 100001, 100002, 101000, 101001, 101002, 102000,
    ]  # fmt: skip
    third = questions[2]
    assert third.image == ImageAddress("images", "COCO_val2014_000000000100.jpg")
    assert third.question == "is the 2 thing 2 here?"
    assert third.answer_type == "other"
    assert third.answers is not None
    assert len(third.answers) == 10
    assert third.answer == max(third.answers, key=third.answers.count)
    absolute = VQAData(
        questions=f"{storage.url}/questions.json",
        annotations=f"{storage.url}/annotations.json",
        images=f"{storage.url}/images",
    )
    again = load_questions(storage, absolute)
    assert [one.answers for one in again] == [one.answers for one in questions]
    reader = ImageReader(storage)
    assert np.array_equal(reader.pixels(again[3].image), reader.pixels(questions[3].image))
    assert absolute.digest(storage, "data") == data.digest(storage, "data")


@pytest.mark.parametrize(
    ("subtype", "pattern", "expected"),
    [
        ("train2014", "COCO_{split}_{image_id:012d}.jpg", "COCO_train2014_000000000007.jpg"),
        ("test-dev2015", "COCO_{split}_{image_id:012d}.jpg", "COCO_test2015_000000000007.jpg"),
        ("test2015", "{split}/{image_id:06}.png", "test2015/000007.png"),
        ("x", "{image_id}.webp", "7.webp"),
    ],
)
def test_an_images_name_follows_its_pattern(
    storage_of_one: Storage, subtype: str, pattern: str, expected: str
) -> None:
    rows = [{"image_id": 7, "question_id": 1, "question": "?"}]
    storage_of_one.write_json("q.json", {"questions": rows, "data_subtype": subtype})
    data = VQAData(questions="q.json", images="i", image_name=pattern)
    (question,) = load_questions(storage_of_one, data)
    assert question.image.path == expected
    assert question.answers is None


@pytest.fixture
def storage_of_one(tmp_path: Any) -> Storage:
    return open_storage(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("image.jpg", "must hold {image_id}"),
        ("{split}.jpg", "must hold {image_id}"),
        ("{image_id.__class__}.jpg", "must hold {image_id}"),
        ("{image_id}{name}", "must hold {image_id}"),
        ("{image_id", "is no pattern"),
    ],
)
def test_a_bad_pattern_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VQAData(questions="q", images="i", image_name=pattern)


def test_bad_annotations_are_named(storage_of_one: Storage) -> None:
    good = {"image_id": 7, "question_id": 1, "question": "?"}
    answer = {"question_id": 1, "answers": [{"answer": "x"}], "multiple_choice_answer": "x"}
    answer["answer_type"] = "other"

    def said(questions: list[Any], annotations: list[Any] | None = None) -> str:
        storage_of_one.write_json("q.json", {"questions": questions, "data_subtype": "s"})
        storage_of_one.write_json("a.json", {"annotations": annotations})
        name = None if annotations is None else "a.json"
        with pytest.raises(UserError) as caught:
            load_questions(storage_of_one, VQAData(questions="q.json", annotations=name, images="i"))
        return str(caught.value)

    assert said([]) == "data.questions: q.json has no questions"
    assert said([good, good]) == "q.json, questions[1]: question_id 1 stands there twice"
    assert said([{**good, "question_id": "1"}]).endswith(
        "questions[0]: 'question_id' is not a whole number but '1'"
    )
    assert said([{"question_id": 1, "question": "?"}]).endswith("questions[0] has no 'image_id'")
    assert said([{**good, "image_id": "x"}]).startswith(
        "q.json, questions[0]: image_id 'x' does not fit data.image_name"
    )
    assert said([good], []) == "q.json, questions[0]: question 1 has no annotation in a.json"
    assert "annotations[0]: 'answers' is no list" in said([good], [{**answer, "answers": "yes"}])
    assert "annotations[0]: 'answers' is no list, or empty" in said([good], [{**answer, "answers": []}])
    assert "annotations[0]: 'answers' must be objects" in said([good], [{**answer, "answers": ["yes"]}])
    assert "annotations[1] has no 'answer_type'" in said(
        [good], [answer, {k: v for k, v in answer.items() if k != "answer_type"}]
    )
    with pytest.raises(UserError, match=r"^train\.1\.annotations: there is no file .*/none\.json"):
        load_questions(
            storage_of_one, VQAData(questions="q.json", annotations="none.json", images="i"), "train.1"
        )


def test_what_is_trained_on_is_not_asked() -> None:
    data = VQAData(questions="q.json", annotations="a.json", images="i")
    with pytest.raises(ValidationError, match=r"train.0.questions: q.json is what 'data' asks: not held out"):
        task_of(data, train=[data])
    with pytest.raises(ValidationError, match=r"train\.0\.annotations: is required"):
        task_of(data, train=[VQAData(questions="t.json", images="i")])


def test_answers_and_scores_are_those_of_one_question_at_a_time(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    data = write_split(storage_of_one)
    questions = load_questions(storage_of_one, data)
    expected = {
        question.question_id: ANSWERS[int(logits.argmax())]
        for question, logits in zip(
            questions, logits_one_by_one(model, storage_of_one, questions), strict=True
        )
    }
    assert len(set(expected.values())) > 1
    found = vqa.evaluate_vqa(
        model, processor_of(model), storage_of_one, task_of(data, batch_size=5), ANSWERS, 1
    )
    results = json.loads(found.files[vqa.RESULTS_FILE])
    assert results == [
        {"question_id": one.question_id, "answer": expected[one.question_id]} for one in questions
    ]
    scores = {
        one.question_id: accuracy(expected[one.question_id], list(one.answers or ())) for one in questions
    }
    assert 0.1 < found.metrics["accuracy"] < 0.9
    assert found.metrics["accuracy"] == pytest.approx(np.mean(list(scores.values())), abs=1e-12)
    for name, kind in (("yes_no", "yes/no"), ("number", "number"), ("other", "other")):
        own = [scores[one.question_id] for one in questions if one.answer_type == kind]
        assert found.metrics[f"accuracy_{name}"] == pytest.approx(np.mean(own), abs=1e-12)
    best = [max(accuracy(answer, list(one.answers or ())) for answer in ANSWERS) for one in questions]
    constant = max(
        np.mean([accuracy(answer, list(one.answers or ())) for one in questions]) for answer in ANSWERS
    )
    assert found.facts["ceiling"] == pytest.approx(np.mean(best), abs=1e-12)
    assert found.facts["best_constant"] == pytest.approx(constant, abs=1e-12)
    assert {key: found.facts[key] for key in ("questions", "answers", "skipped")} == {
        "questions": 40.0, "answers": 5.0, "skipped": 0.0,
    }  # fmt: skip
    family = found.families[0]
    assert family.keys == [str(one.question_id) for one in questions]
    assert family.groups == [one.image.path for one in questions]


def test_the_batch_size_changes_nothing_to_the_last_digit(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    questions = load_questions(storage_of_one, data := write_split(storage_of_one))
    runs = [
        vqa._answered(
            model, processor_of(model), storage_of_one, task_of(data, batch_size=size), questions, ANSWERS,
            Skipped("vqa", 40, 0.0),
        )
        for size in (1, 7, 64)
    ]  # fmt: skip
    assert runs[0] == runs[1] == runs[2]
    assert len({given.confidence for given in runs[0]}) > 30


def test_without_annotations_there_is_the_servers_file_alone(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    data = write_split(storage_of_one, 9, "test-dev2015")
    for number in range(100, 103):  # the images are called as those of test2015
        name = f"images/COCO_{{}}_{number:012d}.jpg"
        storage_of_one.write_bytes(name.format("test2015"), picture(number, "JPEG"))
    data = data.model_copy(update={"annotations": None})
    found = vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data), ANSWERS, 1)
    assert found.families == []
    assert found.metrics == {"questions": 9.0, "answers": 5.0, "skipped": 0.0}
    assert [set(one) for one in json.loads(found.files[vqa.RESULTS_FILE])] == [{"question_id", "answer"}] * 9
    assert all(example.right is None for example in found.examples)
    assert len(found.examples) == 9


def test_questions_with_one_annotator_are_scored_by_exact_match_and_counted(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    data = write_split(storage_of_one, 9)
    annotations = storage_of_one.read_json("annotations.json")
    for number, one in enumerate(annotations["annotations"]):
        if number < 6:
            one["answers"] = one["answers"][:1]
    storage_of_one.write_json("annotations.json", annotations)
    found = vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data), ANSWERS, 1)
    assert found.facts["few_annotators"] == 6.0
    scores = found.families[0].metrics["accuracy"].values.tolist()
    results = [one["answer"] for one in json.loads(found.files[vqa.RESULTS_FILE])]
    for number, (score, answer) in enumerate(zip(scores[:6], results[:6], strict=True)):
        said = normalised(annotations["annotations"][number]["answers"][0]["answer"])
        assert score == float(said == answer)
    possible = [normalised(one["answers"][0]["answer"]) in ANSWERS for one in annotations["annotations"][:6]]
    rest = [
        max(accuracy(answer, [each["answer"] for each in one["answers"]]) for answer in ANSWERS)
        for one in annotations["annotations"][6:]
    ]
    assert found.facts["ceiling"] == pytest.approx((sum(possible) + sum(rest)) / 9)


def test_unreadable_images_are_counted_and_answered_for_the_server(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    data = write_split(storage_of_one, 12)
    whole = vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data), ANSWERS, 1)
    storage_of_one.write_bytes("images/COCO_val2014_000000000101.jpg", b"no picture")
    storage_of_one.delete("images/COCO_val2014_000000000103.jpg")
    task = task_of(data, bad_limit=0.5)
    found = vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task, ANSWERS, 1)
    assert (found.facts["questions"], found.facts["skipped"]) == (6.0, 6.0)
    values = dict(
        zip(whole.families[0].keys, whole.families[0].metrics["accuracy"].values.tolist(), strict=True)
    )
    left = [key for key in values if not key.startswith(("101", "103"))]
    assert found.families[0].keys == left
    assert found.families[0].metrics["accuracy"].values.tolist() == [values[key] for key in left]
    results = {one["question_id"]: one["answer"] for one in json.loads(found.files[vqa.RESULTS_FILE])}
    assert len(results) == 12
    assert {results[number] for number in results if number // 1000 in (101, 103)} == {ANSWERS[0]}
    with pytest.raises(BadDataLimit, match=r"decode-failed: 3, missing-image: \d"):
        vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data, bad_limit=0.3), ANSWERS, 1)
    for number in (100, 102):
        storage_of_one.delete(f"images/COCO_val2014_{number:012d}.jpg")
    with pytest.raises(UserError, match="none of the images of images can be read"):
        vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data, bad_limit=1), ANSWERS, 1)


def test_a_vocabulary_that_is_not_the_models_is_refused(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    data = write_split(storage_of_one, 3)

    def said(answers: list[str]) -> str:
        with pytest.raises(UserError) as caught:
            vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data), answers, 1)
        return str(caught.value)

    assert said(ANSWERS[:4]) == ("evaluation 'vqa': the vocabulary has 4 answers, the model 5 (num_labels)")
    assert said(["yes", "no", "red", "2", "cat"]) == (
        "evaluation 'vqa': answer 2 is 'red' in the vocabulary, '2' in the model (id2label)"
    )


def test_a_context_gives_model_and_vocabulary(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    task = task_of(write_split(storage_of_one, 6))
    found = vqa.evaluate(context_of(model, storage_of_one), task)
    assert found.files == vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task, ANSWERS, 5).files
    with pytest.raises(UserError, match="the model was not fine-tuned to answer questions"):
        vqa.evaluate(context_of(tiny_model(GLSCLForPreTraining), storage_of_one), task)
    unnamed = tiny_model(GLSCLForVisualQuestionAnswering, id2label={n: f"LABEL_{n}" for n in range(5)})
    with pytest.raises(UserError, match="the model does not name its 5 answers"):
        vqa.evaluate(context_of(unnamed, storage_of_one), task)
    assert vqa.named_answers(unnamed) is None
    vqa.check_answers(unnamed, ANSWERS, "x")


def test_a_model_of_no_numbers_answers_nothing(storage_of_one: Storage) -> None:
    broken = tiny_model(GLSCLForVisualQuestionAnswering, id2label={n: f"LABEL_{n}" for n in range(5)})
    with torch.no_grad():
        broken.vqa_classifier[3].bias.fill_(float("nan"))
    task = task_of(write_split(storage_of_one, 6))
    found = vqa.evaluate_vqa(broken, processor_of(broken), storage_of_one, task, ANSWERS, 1)
    assert found.metrics["accuracy"] == 0.0


def test_examples_show_right_and_wrong_ones_by_the_seed(
    model: GLSCLForVisualQuestionAnswering, storage_of_one: Storage
) -> None:
    data = write_split(storage_of_one)
    found = [
        vqa.evaluate_vqa(model, processor_of(model), storage_of_one, task_of(data), ANSWERS, seed).examples
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert [one.title for one in found[0]] != [one.title for one in found[2]]
    assert [one.right for one in found[0]] == [True] * 6 + [False] * 6
    first = found[0][0]
    assert first.title.startswith("is the")
    assert first.pictures[0][0][:2] == b"\xff\xd8"
    assert first.pictures[0][1].startswith("COCO_val2014_")
    assert [label for label, _ in first.lines] == ["answer", "people"]
