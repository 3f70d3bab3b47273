"""Choosing and showing a few items for the report."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sharding.seeds import derive_seed, generator

#: Items of each sort: of those that the model has right, and of those that it has wrong.
EXAMPLES = 6

_SIDE = 256  # pixels of the longer side
_QUALITY = 80


def chosen(right: Sequence[bool] | Sequence[None], seed: int, task: str, count: int = EXAMPLES) -> list[int]:
    """Numbers of the items to show: the first ``count`` right and the first ``count`` wrong ones of an order drawn
    from the seed, which is the same for every checkpoint; of items that are neither as many as of both sorts.

    Args:
        right: of each item.
        seed: of the run.
        task: its name.
    """
    order = generator(derive_seed(seed, "evaluation.examples", task)).permutation(len(right)).tolist()
    yes = [number for number in order if right[number]][:count]
    no = [number for number in order if right[number] is False][:count]
    neither = [number for number in order if right[number] is None][: 2 * count]
    return yes + no + neither


def thumbnail(pixels: np.ndarray) -> bytes:
    """A small JPEG of uint8 [height, width, 3]."""
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return jpeg(image)


def jpeg(image: Image.Image) -> bytes:
    """The image's bytes."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=_QUALITY)
    return sink.getvalue()
