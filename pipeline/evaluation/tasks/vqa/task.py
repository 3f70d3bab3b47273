"""Visual question answering by a model that was fine-tuned for it (GLSCL, section 6; metric: :mod:`.answers`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model import GLSCLForVisualQuestionAnswering, GLSCLProcessor
from pipeline.evaluation.blocks import filled, in_blocks
from pipeline.evaluation.result import Example, Family, Measured, TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.examples import chosen, thumbnail
from pipeline.evaluation.tasks.pictures import ImageReader, ReadAhead, Skipped
from pipeline.evaluation.tasks.vqa.answers import ANNOTATORS_OF_THE_METRIC, accuracy, soft_scores
from pipeline.evaluation.tasks.vqa.data import Question, load_questions
from sharding.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.vqa.config import VQATask
    from sharding.storage import Storage

#: The file for the test server, in the form that it asks for.
RESULTS_FILE = "vqa_results.json"

_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls labels without names


def evaluate(context: TaskContext, task: VQATask) -> TaskResult:
    """:func:`evaluate_vqa` of the context's model, whose answers are the names of its labels.

    Raises:
        UserError: a model that was not fine-tuned on questions, or without names of its answers.
    """
    model = context.model
    if not isinstance(model, GLSCLForVisualQuestionAnswering):
        raise UserError(f"evaluation {task.name!r}: the model was not fine-tuned to answer questions")
    answers = named_answers(model)
    if answers is None:
        raise UserError(
            f"evaluation {task.name!r}: the model does not name its {model.config.num_labels} answers"
        )
    return evaluate_vqa(model, context.processor, context.storage, task, answers, context.seed)


def evaluate_vqa(
    model: GLSCLForVisualQuestionAnswering,
    processor: GLSCLProcessor,
    storage: Storage,
    task: VQATask,
    answers: Sequence[str],
    seed: int,
) -> TaskResult:
    """Answers the questions of ``task.data``.

    Args:
        model: fine-tuned, in evaluation mode, on the device to use.
        processor: at the resolution to use.
        storage: the job's.
        task: see :class:`VQATask`.
        answers: the vocabulary, in the order of the model's labels.
        seed: of the run, for the choice of examples.

    Returns:
        where there are annotations: family ``questions`` (questions about one image belong together) with the
        official ``accuracy``, and one for each type of answer with ``accuracy_yes_no``, ``accuracy_number``,
        ``accuracy_other``; ``ceiling``, the mean of the best that an answer of the vocabulary can have, and
        ``best_constant``, the accuracy of the one answer that does best everywhere; where there are any,
        ``few_annotators``, how many questions have fewer than four and are scored by the share that gave the answer.
        Always ``questions``, ``answers``, ``skipped``, and the file ``RESULTS_FILE`` for the test server; it answers a
        question whose image cannot be read with the first of the vocabulary, as the server refuses one with questions
        left out.

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the questions have an image that cannot be read.
        UserError: a vocabulary that is not the model's; see :func:`pipeline.evaluation.tasks.vqa.data.load_questions`.
    """
    check_answers(model, answers, f"evaluation {task.name!r}")
    questions = load_questions(storage, task.data)[: task.limit]
    skipped = Skipped(task.name, len(questions), task.bad_limit)
    given = _answered(model, processor, storage, task, questions, answers, skipped)
    if not given:
        raise UserError(f"evaluation {task.name!r}: none of the images of {task.data.images} can be read")
    by_question = {one.question.question_id: one.answer for one in given}
    results = [
        {"question_id": question.question_id, "answer": by_question.get(question.question_id, answers[0])}
        for question in questions
    ]
    facts = {
        "questions": float(len(given)),
        "answers": float(len(answers)),
        "skipped": float(skipped.count),
    }
    families: list[Family] = []
    right: list[bool] | list[None] = [None] * len(given)
    if task.data.annotations is not None:
        scores = np.array([accuracy(one.answer, _known(one.question)) for one in given], dtype=np.float64)
        families = _families([one.question for one in given], scores)
        facts |= _references([one.question for one in given], set(answers))
        few = sum(len(_known(one.question)) < ANNOTATORS_OF_THE_METRIC for one in given)
        if few:
            facts["few_annotators"] = float(few)
        right = (scores > 0).tolist()
    return TaskResult(
        families=families,
        facts=facts,
        examples=[
            _example(storage, given[number], right[number]) for number in chosen(right, seed, task.name)
        ],
        files={RESULTS_FILE: json.dumps(results, ensure_ascii=False).encode()},
    )


def named_answers(model: GLSCLForVisualQuestionAnswering) -> list[str] | None:
    """The vocabulary that the model's configuration names; None where it has none."""
    names = model.config.id2label
    answers = [str(names.get(number, "")) for number in range(model.config.num_labels)]
    return None if all(_UNNAMED.fullmatch(answer) for answer in answers) else answers


def check_answers(model: GLSCLForVisualQuestionAnswering, answers: Sequence[str], what: str) -> None:
    """That the vocabulary is the model's.

    Args:
        what: does the asking, for the message.

    Raises:
        UserError: it has more or fewer answers, or another where the model names its own.
    """
    count = model.config.num_labels
    if len(answers) != count:
        raise UserError(f"{what}: the vocabulary has {len(answers)} answers, the model {count} (num_labels)")
    for number, (own, other) in enumerate(zip(named_answers(model) or answers, answers, strict=True)):
        if own != other:
            raise UserError(
                f"{what}: answer {number} is {other!r} in the vocabulary, {own!r} in the model (id2label)"
            )


@dataclass(frozen=True, slots=True)
class _Given:
    question: Question
    answer: str
    confidence: float  # the answer's own probability


def _answered(
    model: GLSCLForVisualQuestionAnswering,
    processor: GLSCLProcessor,
    storage: Storage,
    task: VQATask,
    questions: list[Question],
    answers: Sequence[str],
    skipped: Skipped,
) -> list[_Given]:
    """The model's answers to the questions whose images can be read; an empty one where its logits are no numbers."""
    reader = ImageReader(storage)
    ahead = ReadAhead[Question, Tensor](
        fit=lambda address: processor.video(reader.pixels(address)[None]),
        addresses=lambda question: [question.image],
        ahead=task.batch_size,
        skipped=skipped,
    )
    device = next(model.parameters()).device
    given = []
    with torch.inference_mode():
        for block in in_blocks(ahead.over(questions)):
            tokens = processor.tokenize([question.question for question, _ in block])
            pixels = torch.stack([fitted for _, (fitted,) in block])
            ids, mask, pixels = filled(tokens["input_ids"], tokens["attention_mask"], pixels)
            logits = model(ids.to(device), mask.to(device), pixels.to(device)).logits.float().cpu()
            for (question, _), row in zip(block, logits, strict=False):
                best = int(row.argmax())
                number = bool(row[best].isfinite())
                confidence = float(row[best].sigmoid()) if number else 0.0
                given.append(_Given(question, answers[best] if number else "", confidence))
    return given


def _known(question: Question) -> tuple[str, ...]:
    assert question.answers is not None  # the split has annotations, and then each question has
    return question.answers


def _families(questions: list[Question], scores: np.ndarray) -> list[Family]:
    kinds = ["", *sorted({question.answer_type for question in questions} - {""})]
    families = []
    for kind in kinds:
        chosen_ones = [number for number, one in enumerate(questions) if kind in ("", one.answer_type)]
        suffix = re.sub(r"\W+", "_", kind)
        families.append(
            Family(
                name=suffix or "questions",
                keys=[str(questions[number].question_id) for number in chosen_ones],
                metrics={f"accuracy_{suffix}" if suffix else "accuracy": Measured(scores[chosen_ones])},
                groups=[questions[number].image.path for number in chosen_ones],
            )
        )
    return families


def _references(questions: list[Question], vocabulary: set[str]) -> dict[str, float]:
    """What the numbers are to be seen beside."""
    best, of_answer = 0.0, Counter[str]()
    for question in questions:
        scores = {one: score for one, score in soft_scores(_known(question)).items() if one in vocabulary}
        best += max(scores.values(), default=0.0)
        of_answer.update(scores)
    constant = max(of_answer.values(), default=0.0)
    return {"ceiling": best / len(questions), "best_constant": constant / len(questions)}


def _example(storage: Storage, given: _Given, right: bool | None) -> Example:
    question = given.question
    lines = [("answer", f"{given.answer} ({given.confidence:.2f})")]
    if question.answers is not None:
        counts = Counter(question.answers).most_common()
        lines.append(("people", ", ".join(f"{answer} ({count})" for answer, count in counts)))
    picture = thumbnail(ImageReader(storage).pixels(question.image))
    return Example(question.question, right, [(picture, question.image.path)], lines)
