"""Zero-shot classification: the class whose prompts are nearest to the image, by ITC embeddings.

A class's embedding is the mean of those of its prompts (each of unit length), of unit length again, as CLIP's
zero-shot classifiers are made (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", section 3.1.4).

Shape legend: N images, C classes, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.blocks import filled, in_blocks
from pipeline.evaluation.result import Example, Family, Measured, TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.classification.data import Labelled, load_classes
from pipeline.evaluation.tasks.examples import chosen, thumbnail
from pipeline.evaluation.tasks.pictures import ImageReader, ReadAhead, Skipped
from pipeline.evaluation.tasks.retrieval.ranking import ITC_TIE, ranks_of
from sharding.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.classification.config import ClassificationTask

_TOP = 5
_SHOWN = 3  # classes of an example


def evaluate(context: TaskContext, task: ClassificationTask) -> TaskResult:
    """Accuracy of the nearest class.

    Args:
        context: its model and storage are used.
        task: see :class:`ClassificationTask`.

    Returns:
        a family ``images`` with ``top1``, ``top5`` (shares of 1; a class as near as the right one, to within
        rounding, is ahead of it) and ``mean_per_class`` (the mean of the classes' own ``top1``: an image counts by
        N / (C x images of its class)); ``chance_top1``, ``chance_top5``, ``classes``, ``images`` and ``skipped``.

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the images cannot be read.
        UserError: see :func:`pipeline.evaluation.tasks.classification.data.load_classes`.
    """
    classes = load_classes(context.storage, task)
    skipped = Skipped(task.name, len(classes.images), task.bad_limit)
    with torch.inference_mode():
        nearest = _embedded_images(context, task, classes.images, skipped)
        if not nearest.images:
            raise UserError(f"evaluation {task.name!r}: none of the images of {task.images} can be read")
        scores = nearest.embeddings @ class_embeddings(context, classes.names, task.prompts).T
    labels = torch.tensor([one.label for one in nearest.images])
    right = F.one_hot(labels, len(classes.names)).bool()
    ranks = ranks_of(scores, right, ITC_TIE).numpy()
    first = (ranks == 1).astype(np.float64)
    metrics = {
        "top1": Measured(first),
        "top5": Measured((ranks <= _TOP).astype(np.float64)),
        "mean_per_class": Measured(first * _class_weights(labels.numpy())),
    }
    return TaskResult(
        families=[Family("images", [one.image.path for one in nearest.images], metrics)],
        facts={
            "chance_top1": 1 / len(classes.names),
            "chance_top5": min(_TOP, len(classes.names)) / len(classes.names),
            "classes": float(len(classes.names)),
            "images": float(len(nearest.images)),
            "skipped": float(skipped.count),
        },
        examples=_examples(context, task, nearest.images, scores, ranks == 1, classes.names),
    )


class _Embedded(NamedTuple):
    images: list[Labelled]  # those that could be read
    embeddings: Tensor  # [N, E] fp32, CPU


def _embedded_images(
    context: TaskContext, task: ClassificationTask, images: list[Labelled], skipped: Skipped
) -> _Embedded:
    reader = ImageReader(context.storage)
    ahead = ReadAhead[Labelled, Tensor](
        fit=lambda address: context.processor.video(reader.pixels(address)[None]),
        addresses=lambda one: [one.image],
        ahead=task.batch_size,
        skipped=skipped,
    )
    device = next(context.model.parameters()).device
    read: list[Labelled] = []
    vectors = []
    for block in in_blocks(ahead.over(images)):
        (pixels,) = filled(torch.stack([fitted for _, (fitted,) in block]))
        embedding = context.model.encode_vision(pixels.to(device)).embedding
        vectors.append(embedding[: len(block)].float().cpu())
        read += [one for one, _ in block]
    return _Embedded(read, torch.cat(vectors) if vectors else torch.empty(0))


@torch.inference_mode()
def class_embeddings(context: TaskContext, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """[C, E] of unit length, fp32, CPU: the mean over the prompts with a class's name in them."""
    device = next(context.model.parameters()).device
    vectors = []
    for block in in_blocks(prompt.format(name) for name in names for prompt in prompts):
        tokens = context.processor.tokenize(block)
        ids, mask = filled(tokens["input_ids"], tokens["attention_mask"])
        embedding = context.model.encode_text(ids.to(device), mask.to(device)).embedding
        vectors.append(embedding[: len(block)].float().cpu())
    return F.normalize(torch.cat(vectors).unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)


def _class_weights(labels: np.ndarray) -> np.ndarray:
    """[N]: with them the mean over images is the mean over the classes that have any."""
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: np.ndarray = len(labels) / (len(counts) * counts[which])
    return weights


def _examples(
    context: TaskContext,
    task: ClassificationTask,
    images: list[Labelled],
    scores: Tensor,
    right: np.ndarray,
    names: list[str],
) -> list[Example]:
    reader = ImageReader(context.storage)
    examples = []
    for number in chosen(right.tolist(), context.seed, task.name):
        one, similar = images[number], scores[number]
        best = similar.argsort(descending=True, stable=True)[:_SHOWN].tolist()
        lines = [
            (f"{place}.", f"{names[label]} ({similar[label]:.3f})") for place, label in enumerate(best, 1)
        ]
        picture = (thumbnail(reader.pixels(one.image)), one.image.path)
        examples.append(Example(names[one.label], bool(right[number]), [picture], lines))
    return examples
