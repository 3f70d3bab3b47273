"""VQAv2 as it is published: a JSON file of questions, one of annotations, and a folder of COCO's images."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator

from pipeline.evaluation.tasks.annotations import digest_of, number_of, read_rows, text_of
from pipeline.evaluation.tasks.pictures import ImageAddress
from sharding.errors import UserError
from sharding.given_path import GivenPath

if TYPE_CHECKING:
    from sharding.storage import Storage


class VQAData(BaseModel):
    """One split of VQAv2. Addresses are urls or paths; relative ones are below the job's storage.

    Attributes:
        questions: ``v2_OpenEnded_mscoco_*_questions.json``.
        annotations: ``v2_mscoco_*_annotations.json``; none for the splits of the test server.
        images: folder of the images.
        image_name: of a question's image in that folder, from ``{image_id}`` and ``{split}`` (the questions file's
            ``data_subtype``, ``test-dev2015`` taken as ``test2015``, whose images it has).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    questions: GivenPath
    annotations: GivenPath | None = None
    images: GivenPath
    image_name: str = "COCO_{split}_{image_id:012d}.jpg"

    @field_validator("image_name")
    @classmethod
    def _names_the_image(cls, pattern: str) -> str:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
        except ValueError as error:
            raise ValueError(f"{pattern!r} is no pattern: {error}") from None
        if "image_id" not in fields or not set(fields) <= {"image_id", "split"}:
            raise ValueError(
                f"{pattern!r} must hold {{image_id}}, and may hold {{split}}, nothing else in braces"
            )
        return pattern

    def digest(self, storage: Storage, field: str) -> str:
        """sha256 of the annotation files and of the images' names and sizes.

        Args:
            storage: the job's.
            field: where this block stands, for errors.

        Raises:
            UserError: see :func:`pipeline.evaluation.tasks.annotations.digest_of`.
        """
        files = {f"{field}.questions": self.questions}
        if self.annotations is not None:
            files[f"{field}.annotations"] = self.annotations
        return digest_of(storage, files, {f"{field}.images": self.images}, image_name=self.image_name)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image.

    Args:
        question_id: of the data set, unique in a split.
        image: the image asked about.
        question: the text.
        answers: of the annotators as the file has them, ten in VQAv2; None without annotations.
        answer: the one that most annotators gave (``multiple_choice_answer``).
        answer_type: ``"yes/no"``, ``"number"`` or ``"other"``; empty without annotations.
    """

    question_id: int
    image: ImageAddress
    question: str
    answers: tuple[str, ...] | None
    answer: str | None
    answer_type: str


class _Annotation(NamedTuple):
    answers: tuple[str, ...]
    answer: str
    answer_type: str


def load_questions(storage: Storage, data: VQAData, field: str = "data") -> list[Question]:
    """All questions of a split, in the order of the file.

    Memory: the texts and what is in a :class:`Question`, each different answer once; never a whole file.

    Args:
        storage: the job's.
        data: the split.
        field: where ``data`` stands in the task's block, for errors.

    Raises:
        UserError: a file that is not there, a row that is not as published (by its number), a question twice or
            without annotation.
    """
    rows, header = read_rows(storage, data.questions, f"{field}.questions", "questions", _question)
    if not rows:
        raise UserError(f"{field}.questions: {data.questions} has no questions")
    annotations = _annotations(storage, data, field)
    split = str(header.get("data_subtype", "")).replace("test-dev", "test")
    questions: list[Question] = []
    seen: set[int] = set()
    for number, (question_id, image_id, text) in enumerate(rows):
        place = f"{data.questions}, questions[{number}]"
        if question_id in seen:
            raise UserError(f"{place}: question_id {question_id} stands there twice")
        seen.add(question_id)
        try:
            path = data.image_name.format(split=split, image_id=image_id)
        except ValueError as error:
            raise UserError(
                f"{place}: image_id {image_id!r} does not fit {field}.image_name {data.image_name!r}: {error}"
            ) from None
        known = None
        if annotations is not None:
            known = annotations.get(question_id)
            if known is None:
                raise UserError(f"{place}: question {question_id} has no annotation in {data.annotations}")
        questions.append(
            Question(
                question_id=question_id,
                image=ImageAddress(data.images, path),
                question=text,
                answers=known.answers if known else None,
                answer=known.answer if known else None,
                answer_type=known.answer_type if known else "",
            )
        )
    return questions


def _question(row: dict[str, Any]) -> tuple[int, int | str, str]:
    image_id = row["image_id"]
    if not isinstance(image_id, int | str) or isinstance(image_id, bool):
        raise ValueError(f"'image_id' is neither a number nor text but {type(image_id).__name__}")
    if isinstance(image_id, str):
        image_id = text_of(row, "image_id")
    return number_of(row, "question_id"), image_id, text_of(row, "question")


def _annotations(storage: Storage, data: VQAData, field: str) -> dict[int, _Annotation] | None:
    if data.annotations is None:
        return None
    reader = _AnnotationRows()
    rows, _ = read_rows(storage, data.annotations, f"{field}.annotations", "annotations", reader.read)
    return dict(rows)


class _AnnotationRows:
    """Keeps each different text once: most of the millions of answers are the same few."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def read(self, row: dict[str, Any]) -> tuple[int, _Annotation]:
        given = row["answers"]
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise ValueError("'answers' is no list, or empty")
        answers = []
        for answer in given:
            if not isinstance(answer, dict):
                raise ValueError("'answers' must be objects with an 'answer'")
            answers.append(self._once(text_of(answer, "answer")))
        one = _Annotation(
            answers=tuple(answers),
            answer=self._once(text_of(row, "multiple_choice_answer")),
            answer_type=self._once(text_of(row, "answer_type")),
        )
        return number_of(row, "question_id"), one

    def _once(self, text: str) -> str:
        return self._texts.setdefault(text, text)
