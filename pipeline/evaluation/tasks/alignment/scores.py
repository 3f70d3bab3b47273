"""How much of an attention map lies on a region, GLSCL's global and local alignment.

Shape legend: gh and gw the rows and columns of patches; regions are [height, width] of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import WordMaps
from pipeline.evaluation.tasks.alignment.data import AnnotatedImage, Box, Phrase
from sharding.errors import BadData

#: A box of more than this share of the image is background, and left out of the global region.
BACKGROUND = 0.9

_AROUND_WORDS = ".,;:!?\"'()[]"


@dataclass(frozen=True)
class Share:
    """The share of a map's attention on a region, and what it would be were all patches attended to alike."""

    value: float
    uniform: float


@dataclass(frozen=True)
class PhraseScore:
    """Of one phrase: by boxes and by masks."""

    phrase: Phrase
    box: Share
    pixel: Share


@dataclass(frozen=True)
class ImageScore:
    """Of one image: the caption's, and of the phrases that stand in what the model read of the caption."""

    box: Share
    pixel: Share
    phrases: tuple[PhraseScore, ...]
    not_found: int


def score_image(annotated: AnnotatedImage, maps: WordMaps, height: int, width: int) -> ImageScore:
    """The scores of one image of ``height`` x ``width`` pixels.

    Global: the map of the text class token on the union of all phrases' regions, boxes of more than ``BACKGROUND``
    of the image left out, and their masks with them. Local: the sum of the maps of a phrase's words on the
    phrase's own region.

    Args:
        annotated: boxes and masks in the image's own pixels.
        maps: [W, gh, gw] over the whole image, brought to a square.

    Raises:
        BadData: ``mask-size``, a mask of another size than the image.
    """
    for phrase in annotated.phrases:
        for mask in phrase.masks:
            if mask.shape != (height, width):
                raise BadData(
                    "mask-size",
                    f"{annotated.key}, {phrase.text!r}: a mask of {mask.shape[1]} x {mask.shape[0]} for an image of "
                    f"{width} x {height}",
                )
    boxes, pixels = np.zeros((height, width), bool), np.zeros((height, width), bool)
    scored, not_found = [], 0
    for phrase in annotated.phrases:
        box, pixel = region(phrase, height, width)
        words = words_of(phrase, maps)
        if words:
            attention = maps.maps[words].sum(dim=0)
            scored.append(PhraseScore(phrase, share(attention, box), share(attention, pixel)))
        else:
            not_found += 1
        box, pixel = region(phrase, height, width, without_background=True)
        boxes |= box
        pixels |= pixel
    return ImageScore(share(maps.global_map, boxes), share(maps.global_map, pixels), tuple(scored), not_found)


def region(
    phrase: Phrase, height: int, width: int, *, without_background: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A phrase's boxes and its pixels, each bool [height, width]."""
    boxes, pixels = np.zeros((height, width), bool), np.zeros((height, width), bool)
    kept = [
        number
        for number, (x1, y1, x2, y2) in enumerate(phrase.boxes)
        if not without_background or (y2 - y1) * (x2 - x1) <= BACKGROUND * height * width
    ]
    for number in kept:
        boxes[_inside(phrase.boxes[number], height, width)] = True
    if len(phrase.masks) == len(phrase.boxes):
        for number in kept:
            pixels |= phrase.masks[number] != 0
    elif kept:
        (mask,) = phrase.masks
        pixels = (mask != 0) if len(kept) == len(phrase.boxes) else (mask != 0) & boxes
    return boxes, pixels


def _inside(box: Box, height: int, width: int) -> tuple[slice, slice]:
    x1, x2 = (min(max(x, 0), width) for x in box[::2])
    y1, y2 = (min(max(y, 0), height) for y in box[1::2])
    return slice(y1, y2), slice(x1, x2)


def share(attention: Tensor, where: np.ndarray) -> Share:
    """sum(map x region) / sum(map) of ``attention`` [gh, gw] and a region bool [height, width].

    The region is resized to the patches by bicubic interpolation at their centres, without antialiasing, and not
    clamped: what torchvision 0.12, which the benchmark's authors name, does to a tensor. Attention that is no number
    scores 0.
    """
    attention = attention.double()
    rows, columns = attention.shape
    fine = torch.from_numpy(where).double()[None, None]
    coarse = F.interpolate(fine, size=(rows, columns), mode="bicubic", align_corners=False)[0, 0]
    value = float((attention * coarse).sum() / attention.sum())
    return Share(value if math.isfinite(value) else 0.0, float(coarse.mean()))


def words_of(phrase: Phrase, maps: WordMaps) -> list[int]:
    """Numbers of the words of ``maps`` that make up a phrase; none where it does not stand in what was read.

    By the phrase's span, or else the first place where its words follow each other, whatever their case and the
    punctuation around them.
    """
    if phrase.span is not None:
        first, end = phrase.span
        return [number for number, (start, stop) in enumerate(maps.spans) if start < end and stop > first]
    wanted = _bare(phrase.text.split())
    words = _bare(maps.words)
    if not wanted:
        return []
    for start in range(len(words) - len(wanted) + 1):
        if words[start : start + len(wanted)] == wanted:
            return list(range(start, start + len(wanted)))
    return []


def _bare(words: Sequence[str]) -> list[str]:
    return [bare for word in words if (bare := word.strip(_AROUND_WORDS).lower())]
