"""VQAv2: ``vqa/v2_OpenEnded_mscoco_*_questions.json``, ``v2_mscoco_*_annotations.json``, images as COCO names them.

The splits are called ``train2014``, ``val2014`` and ``test2015``; unlike the official one, the test has annotations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.scenes.request import Request
from pipeline.scenes.sets import Part
from pipeline.scenes.sink import Sink
from sharding.scenes.config import Split
from sharding.scenes.questions import Question

#: Questions asked of an image, where it has as many.
QUESTIONS = 5

_SPLITS: dict[Split, tuple[str, int]] = {
    "train": ("train2014", 0),
    "val": ("val2014", 1_000_000_000),
    "test": ("test2015", 2_000_000_000),
}


def write(parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None:
    """Ten annotators a question, of whom at least seven say what is true."""
    for part in parts:
        split, first = _SPLITS[part.split]
        asked: list[dict[str, Any]] = []
        annotated: list[dict[str, Any]] = []
        for number in range(part.count):
            scene = part.scenes.scene(number)
            image = first + number + 1
            sink.write_jpeg(f"vqa/{split}/COCO_{split}_{image:012d}.jpg", scene.image())
            for place, question in enumerate(part.scenes.questions(scene)[:QUESTIONS]):
                key = image * 1000 + place
                given = part.scenes.annotations(scene, question, request.dissent)
                asked.append({"image_id": image, "question": question.text, "question_id": key})
                annotated.append(_annotation(question, given, image, key))
            step()
        header = {
            "info": {"description": "VQAv2 format, of scenes", "version": "2.0"},
            "license": {"name": "of the cut-outs"},
            "data_type": "mscoco",
            "data_subtype": split,
        }
        questions = {**header, "task_type": "Open-Ended", "questions": asked}
        sink.write_json(f"vqa/v2_OpenEnded_mscoco_{split}_questions.json", questions)
        sink.write_json(f"vqa/v2_mscoco_{split}_annotations.json", {**header, "annotations": annotated})


def _annotation(question: Question, given: list[str], image: int, key: int) -> dict[str, Any]:
    return {
        "question_type": question.question_type,
        "multiple_choice_answer": normal_form(question.answer),
        "answers": [
            {
                "answer": normal_form(answer),
                "answer_confidence": "yes" if answer == question.answer else "maybe",
                "answer_id": number,
            }
            for number, answer in enumerate(given, start=1)
        ],
        "image_id": image,
        "answer_type": question.answer_type,
        "question_id": key,
    }


def normal_form(answer: str) -> str:
    """As the data set writes answers, in the normal form of its evaluator: "T-shirt" -> "t shirt"."""
    return answer.lower().replace("-", " ")
