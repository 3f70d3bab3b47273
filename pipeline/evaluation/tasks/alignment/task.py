"""Alignment of words and regions on ALIGN-BENCH, without training (GLSCL, "Cross-modal alignment").

The map of a word is what model/alignment.py says: the last fusion layer's cross-attention from text to vision,
maximum over heads, the vision class token dropped, the BPE pieces of a word summed, punctuation left out.

The image is brought to the model's square whole, as the benchmark's authors do, not cropped as for the other tasks:
map and region are of the same pixels, and no region falls outside of what the model sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import WordMaps, text_grids, words_on_grid
from pipeline.alignment.picture import draw_region
from pipeline.evaluation.blocks import filled, in_blocks
from pipeline.evaluation.result import Example, Family, Measured, TaskResult
from pipeline.evaluation.tasks.alignment.data import AlignmentData, AnnotatedImage
from pipeline.evaluation.tasks.alignment.scores import ImageScore, Share, region, score_image, words_of
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.examples import chosen, jpeg
from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader, ReadAhead, Skipped
from sharding.errors import BadData, UserError

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.alignment.config import AlignmentTask

_PHRASES_SHOWN = 3


def evaluate(context: TaskContext, task: AlignmentTask) -> TaskResult:
    """Global and local scores, by boxes and by pixels.

    Args:
        context: its model and storage are used.
        task: see :class:`AlignmentTask`.

    Returns:
        families ``global`` with ``global_box`` and ``global_pixel`` (an item is an image) and ``local`` with
        ``local_box`` and ``local_pixel`` (an image, by the mean over its phrases); ``chance_`` and each of these
        names, which is what attention to all patches alike would score; ``images``, ``phrases``,
        ``phrases_not_found`` (in no part of the caption that the model reads) and ``skipped``. Examples show maps
        with the regions outlined.

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the images cannot be used.
        UserError: see :class:`pipeline.evaluation.tasks.alignment.data.AlignmentData`.
    """
    data = AlignmentData(context.storage, task)
    skipped = Skipped(task.name, len(data), task.bad_limit)
    shown = set(chosen([None] * len(data), context.seed, task.name))
    table = _Table()
    for number, seen in enumerate(_seen(context, task, data, skipped)):
        try:
            maps = _maps(context, seen)
            score = score_image(seen.annotated, maps, seen.height, seen.width)
        except BadData as error:
            skipped.note(error)
            continue
        table.add(seen.annotated.key, score)
        if number in shown:
            table.examples.append(_example(seen, maps, score))
    if not table.keys:
        raise UserError(f"evaluation {task.name!r}: none of the images of {task.images} can be used")
    return table.result(float(skipped.count))


class _Seen(NamedTuple):
    """An image as the model sees it, what it is annotated with, and the maps of its caption's tokens."""

    annotated: AnnotatedImage
    height: int
    width: int
    pixels: Tensor  # uint8 [3, S, S]
    grids: Tensor  # [T, gh, gw]


class _Fitted(NamedTuple):
    height: int
    width: int
    pixels: Tensor  # uint8 [3, S, S]


def _seen(
    context: TaskContext, task: AlignmentTask, data: AlignmentData, skipped: Skipped
) -> Iterator[_Seen]:
    reader = ImageReader(context.storage)
    side = context.processor.image_processor.size["height"]
    device = next(context.model.parameters()).device

    def fit(address: ImageAddress) -> _Fitted:
        pixels = reader.pixels(address)
        square = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        fitted = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
        return _Fitted(pixels.shape[0], pixels.shape[1], fitted)

    ahead = ReadAhead[AnnotatedImage, _Fitted](fit, lambda one: [one.image], task.batch_size, skipped)
    for block in in_blocks(ahead.over(data)):
        tokens = context.processor.tokenize([annotated.caption for annotated, _ in block])
        pixels = torch.stack([fitted.pixels for _, (fitted,) in block])[:, None]
        ids, mask, pixels = filled(tokens["input_ids"], tokens["attention_mask"], pixels)
        grids = text_grids(context.model, ids.to(device), mask.to(device), pixels.to(device))
        for (annotated, (fitted,)), grid in zip(block, grids[:, :, 0], strict=False):
            yield _Seen(annotated, fitted.height, fitted.width, fitted.pixels, grid)


def _maps(context: TaskContext, seen: _Seen) -> WordMaps:
    try:
        return words_on_grid(context.processor, seen.annotated.caption, seen.grids)
    except ValueError as error:
        raise BadData("no-words", f"{seen.annotated.key}: {error}") from None


@dataclass
class _Table:
    """The scores of all images."""

    keys: list[str] = field(default_factory=list)
    scores: list[ImageScore] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def add(self, key: str, score: ImageScore) -> None:
        self.keys.append(key)
        self.scores.append(score)

    def result(self, skipped: float) -> TaskResult:
        whole = {
            "global_box": [score.box for score in self.scores],
            "global_pixel": [score.pixel for score in self.scores],
        }
        found = [
            (key, score.phrases) for key, score in zip(self.keys, self.scores, strict=True) if score.phrases
        ]
        parts = {
            "local_box": [_mean([one.box for one in phrases]) for _, phrases in found],
            "local_pixel": [_mean([one.pixel for one in phrases]) for _, phrases in found],
        }
        families = [Family("global", self.keys, _measured(whole))]
        if found:
            families.append(Family("local", [key for key, _ in found], _measured(parts)))
        facts = {
            f"chance_{name}": float(np.mean([one.uniform for one in shares]))
            for name, shares in (whole | parts).items()
            if shares
        }
        facts |= {
            "images": float(len(self.keys)),
            "phrases": float(sum(len(phrases) for _, phrases in found)),
            "phrases_not_found": float(sum(score.not_found for score in self.scores)),
            "skipped": skipped,
        }
        return TaskResult(families, facts, self.examples)


def _mean(shares: list[Share]) -> Share:
    return Share(
        float(np.mean([one.value for one in shares])), float(np.mean([one.uniform for one in shares]))
    )


def _measured(metrics: dict[str, list[Share]]) -> dict[str, Measured]:
    return {
        name: Measured(np.array([one.value for one in shares], dtype=np.float64))
        for name, shares in metrics.items()
    }


def _example(seen: _Seen, maps: WordMaps, score: ImageScore) -> Example:
    picture = seen.pixels.permute(1, 2, 0).numpy()
    everything = np.zeros((seen.height, seen.width), bool)
    for phrase in seen.annotated.phrases:
        everything |= region(phrase, seen.height, seen.width, without_background=True)[1]
    whole = draw_region(picture, maps.global_map.double().numpy(), everything)
    pictures = [(jpeg(whole), f"whole caption: {_said(score.box, score.pixel)}")]
    for one in score.phrases[:_PHRASES_SHOWN]:
        attention = maps.maps[words_of(one.phrase, maps)].sum(dim=0).double().numpy()
        drawn = draw_region(picture, attention, region(one.phrase, seen.height, seen.width)[1])
        pictures.append((jpeg(drawn), f"{one.phrase.text}: {_said(one.box, one.pixel)}"))
    return Example(
        title=seen.annotated.caption,
        right=None,
        pictures=pictures,
        lines=[
            (
                "attended alike, whole caption",
                f"box {score.box.uniform:.2f}, pixels {score.pixel.uniform:.2f}",
            )
        ],
    )


def _said(box: Share, pixel: Share) -> str:
    return f"box {box.value:.2f}, pixels {pixel.value:.2f}"
