"""Fine-tuning on VQAv2: each question's answers of the vocabulary, as right as their official accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from model import GLSCLForVisualQuestionAnswering
from pipeline.evaluation.tasks.pictures import ImageReader
from pipeline.evaluation.tasks.vqa.answers import (
    ANNOTATORS_OF_THE_METRIC,
    frequent_answers,
    read_answers,
    soft_scores,
)
from pipeline.evaluation.tasks.vqa.config import VQATask
from pipeline.evaluation.tasks.vqa.data import Question, load_questions
from pipeline.fine_tuning.examples import Example, ExampleDataset, ExampleTable, FineTuningBatch
from pipeline.fine_tuning.learner import Judged, Material, right_labels
from pipeline.training.config import Stage
from sharding.errors import UserError
from sharding.storage import Storage

logger = logging.getLogger(__name__)

#: What is trained, and evaluated.
MODEL = GLSCLForVisualQuestionAnswering


def open_training(task: VQATask, material: Material) -> VQATraining:
    """The questions of ``task.train``, without those that no answer of the vocabulary is right for.

    Raises:
        UserError: see ``load_questions`` and ``read_answers``; or no question is left.
    """
    splits = [
        load_questions(material.storage, split, f"train.{number}") for number, split in enumerate(task.train)
    ]
    if task.answer2id is not None:
        answers = read_answers(material.storage, task.answer2id, "answer2id")
    else:
        answers = frequent_answers((question for split in splits for question in split), task.answers)
    table = ExampleTable(question_examples(splits, answers))
    if not len(table):
        raise UserError(_without_answers(task, splits, answers))
    asked = sum(map(len, splits))
    logger.info("%s: %d answers, %d of %d questions have one", task.name, len(answers), len(table), asked)
    few = sum(
        len(question.answers or ()) < ANNOTATORS_OF_THE_METRIC for split in splits for question in split
    )
    if few:
        logger.info(
            "%s: %d questions have fewer than %d annotators: an answer of theirs is as right as the share that gave it",
            task.name,
            few,
            ANNOTATORS_OF_THE_METRIC,
        )
    return VQATraining(table, answers, material.storage)


def _without_answers(task: VQATask, splits: Sequence[Sequence[Question]], answers: Sequence[str]) -> str:
    """Why no question is left, by the first of them."""
    place, question = next((place, split[0]) for place, split in enumerate(splits) if split)
    said = ", ".join(sorted({repr(answer) for answer in question.answers or ()})[:3])
    known = ", ".join(map(repr, answers[:3]))
    return (
        f"evaluation task {task.name!r}: no answer of 'train' is in the vocabulary of {len(answers)} answers "
        f"({known}, ...; they are normal forms); e.g. train.{place}, question {question.question_id}: its annotators "
        f"said {said}"
    )


def question_examples(splits: Sequence[Sequence[Question]], answers: Sequence[str]) -> Iterator[Example]:
    """The questions that an answer of the vocabulary is right for, with how right each is."""
    numbers = {answer: number for number, answer in enumerate(answers)}
    for place, questions in enumerate(splits):
        for question in questions:
            assert question.answers is not None  # the block asks for annotations
            scores = soft_scores(question.answers).items()
            labels = [(numbers[answer], score) for answer, score in scores if answer in numbers]
            if labels:
                yield Example(f"{place}/{question.question_id}", question.question, [question.image], labels)


class VQATraining:
    """See :class:`pipeline.fine_tuning.learner.TaskTraining`."""

    weights: ClassVar[dict[str, float]] = {"vqa": 1.0}

    def __init__(self, data: ExampleTable, answers: Sequence[str], storage: Storage) -> None:
        self.data, self._answers, self._storage = data, answers, storage

    @property
    def labels(self) -> int:
        return len(self._answers)

    def load_model(self, folder: Path) -> GLSCLForVisualQuestionAnswering:
        names = dict(enumerate(self._answers))
        model: GLSCLForVisualQuestionAnswering
        model, loaded = MODEL.from_pretrained(
            folder,
            id2label=names,
            label2id={answer: number for number, answer in names.items()},
            output_loading_info=True,
        )
        if "vqa_classifier.3.bias" in loaded["missing_keys"]:
            model.begin_with_prior(torch.from_numpy(self.data.scores(self.labels)), len(self.data))
        return model

    def dataset(self, stage: Stage, seed: int) -> ExampleDataset:
        return ExampleDataset(self.data, ImageReader(self._storage), stage, images=1, seed=seed)

    def judge(self, engine: Any, batch: FineTuningBatch) -> Judged:
        assert batch.labels is not None
        output = engine(
            batch.input_ids, batch.attention_mask, batch.pixel_values, labels=batch.labels, valid=batch.valid
        )
        return Judged(output.loss, {"vqa": output.loss}, right_labels(output.logits, batch.labels))
