"""NLVR2 by a model that was fine-tuned for it (GLSCL, section 6).

Accuracy and consistency are those of the data set's evaluation script: a sentence is shown with up to four pairs of
images, and is judged consistently where it is judged rightly with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model import GLSCLForNLVR2, GLSCLProcessor
from pipeline.evaluation.blocks import filled, in_blocks
from pipeline.evaluation.result import Example, Family, Measured, TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.examples import chosen, thumbnail
from pipeline.evaluation.tasks.nlvr2.data import Statement, load_statements
from pipeline.evaluation.tasks.pictures import ImageReader, ReadAhead, Skipped
from sharding.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
    from sharding.storage import Storage

#: Identifiers and judgements, as the data set's evaluation script reads them.
PREDICTIONS_FILE = "nlvr2_predictions.csv"


def evaluate(context: TaskContext, task: NLVR2Task) -> TaskResult:
    """:func:`evaluate_nlvr2` of the context's model.

    Raises:
        UserError: a model that was not fine-tuned on statements.
    """
    if not isinstance(context.model, GLSCLForNLVR2):
        raise UserError(f"evaluation {task.name!r}: the model was not fine-tuned on pairs of images (NLVR2)")
    return evaluate_nlvr2(context.model, context.processor, context.storage, task, context.seed)


def evaluate_nlvr2(
    model: GLSCLForNLVR2, processor: GLSCLProcessor, storage: Storage, task: NLVR2Task, seed: int
) -> TaskResult:
    """Judges the statements of ``task.data``.

    Args:
        model: fine-tuned, in evaluation mode, on the device to use.
        processor: at the resolution to use.
        storage: the job's.
        task: see :class:`NLVR2Task`.
        seed: of the run, for the choice of examples.

    Returns:
        where the statements have labels: family ``statements`` with ``accuracy``, and ``sentences`` with
        ``consistency`` (sentences of which a statement cannot be read are left out); statements about the same
        set of images belong together; ``best_constant``, the accuracy of always saying the same. Always
        ``statements``, ``skipped`` and the file ``PREDICTIONS_FILE``.

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the statements have an image that cannot be read.
        UserError: labels for some statements only; see
            :func:`pipeline.evaluation.tasks.nlvr2.data.load_statements`.
    """
    statements = load_statements(storage, task.data)[: task.limit]
    labelled = [one.label is not None for one in statements]
    if any(labelled) and not all(labelled):
        raise UserError(
            f"data.statements: {statements[labelled.index(False)].identifier} has no label, others have"
        )
    skipped = Skipped(task.name, len(statements), task.bad_limit)
    judged = _judged(model, processor, storage, task, statements, skipped)
    if not judged:
        raise UserError(f"evaluation {task.name!r}: none of the images of {task.data.images} can be read")
    facts = {"statements": float(len(judged)), "skipped": float(skipped.count)}
    families: list[Family] = []
    right: list[bool] | list[None] = [None] * len(judged)
    if all(labelled):
        right = [one.said is one.statement.label for one in judged]
        families = _families(judged, right, statements)
        share = float(np.mean([one.statement.label for one in judged]))
        facts["best_constant"] = max(share, 1 - share)
    return TaskResult(
        families=families,
        facts=facts,
        examples=[
            _example(storage, judged[number], right[number]) for number in chosen(right, seed, task.name)
        ],
        files={
            PREDICTIONS_FILE: "".join(f"{one.statement.identifier},{one.said}\n" for one in judged).encode()
        },
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    statement: Statement
    said: bool | None  # None where the logits are no numbers: wrong in any case
    probability: float  # that it is true


def _judged(
    model: GLSCLForNLVR2,
    processor: GLSCLProcessor,
    storage: Storage,
    task: NLVR2Task,
    statements: list[Statement],
    skipped: Skipped,
) -> list[_Judged]:
    reader = ImageReader(storage)
    ahead = ReadAhead[Statement, Tensor](
        fit=lambda address: processor.video(reader.pixels(address)[None]),
        addresses=lambda statement: [statement.left, statement.right],
        ahead=task.batch_size,
        skipped=skipped,
    )
    device = next(model.parameters()).device
    judged = []
    with torch.inference_mode():
        for block in in_blocks(ahead.over(statements)):
            tokens = processor.tokenize([statement.sentence for statement, _ in block])
            pixels = torch.stack([torch.cat(pair) for _, pair in block])
            ids, mask, pixels = filled(tokens["input_ids"], tokens["attention_mask"], pixels)
            logits = model(ids.to(device), mask.to(device), pixels.to(device)).logits.float().cpu()
            for (statement, _), (no, yes) in zip(block, logits, strict=False):
                odds = yes - no
                said = bool(odds > 0) if odds.isfinite() else None
                judged.append(_Judged(statement, said, float(odds.sigmoid())))
    return judged


def _families(judged: list[_Judged], right: Sequence[bool], statements: Sequence[Statement]) -> list[Family]:
    sentences: dict[str, list[bool]] = {}
    for one, correct in zip(judged, right, strict=True):
        sentences.setdefault(one.statement.sentence_key, []).append(correct)
    shown: dict[str, int] = {}
    image_set: dict[str, str] = {}
    for statement in statements:
        key = statement.sentence_key
        shown[key] = shown.get(key, 0) + 1
        image_set[key] = statement.set_key
    whole = [key for key, results in sentences.items() if len(results) == shown[key]]
    families = [
        Family(
            "statements",
            [one.statement.identifier for one in judged],
            {"accuracy": Measured(np.array(right, dtype=np.float64))},
            [one.statement.set_key for one in judged],
        )
    ]
    if whole:
        consistent = np.array([all(sentences[key]) for key in whole], dtype=np.float64)
        groups = [image_set[key] for key in whole]
        families.append(Family("sentences", whole, {"consistency": Measured(consistent)}, groups))
    return families


def _example(storage: Storage, judged: _Judged, right: bool | None) -> Example:
    statement, reader = judged.statement, ImageReader(storage)
    lines = [("says", f"{judged.said} ({judged.probability:.2f})")]
    if statement.label is not None:
        lines.append(("is", str(statement.label)))
    pictures = [(thumbnail(reader.pixels(image)), image.path) for image in (statement.left, statement.right)]
    return Example(statement.sentence, right, pictures, lines)
