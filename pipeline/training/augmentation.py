"""From a decoded picture, or the frames of a clip, to the square of pixels that a batch holds.

All on uint8 with the three channels of a pixel side by side, which is what the decoders give and where torch's
antialiasing resize is several times as fast as on planes or floats; no copy is made on the way.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from pipeline.training.config import AugmentationBlock

# The random resized crop of Inception, as torchvision has it.
_LOWEST_ASPECT = 3 / 4
_ATTEMPTS = 10


class Augmentation:
    """What a stage does to its pictures; every draw comes from the generator given with the picture.

    Args:
        block: the stage's choices.
        size: S, side of the square in pixels.
    """

    def __init__(self, block: AugmentationBlock, size: int) -> None:
        self._block, self._size = block, size
        self._rand_augment = v2.RandAugment(2, 9) if block.rand_augment else None

    @property
    def detail(self) -> int:
        """Length in pixels below which a picture's shorter side must not be reduced before :meth:`__call__`.

        Twice S in the smallest crop, so that the resampling still sees all the detail it can show.
        """
        share = self._block.crop * _LOWEST_ASPECT if self._block.crop < 1.0 else 1.0
        return math.ceil(2 * self._size / math.sqrt(share))

    def __call__(self, frames: np.ndarray, draws: np.random.Generator) -> Tensor:
        """uint8 [F, H, W, 3] -> uint8 [F, 3, S, S], channels last in memory; the same draw for all frames."""
        height, width = frames.shape[1:3]
        if self._block.crop < 1.0:
            top, left, bottom, right = random_crop(height, width, self._block.crop, draws)
            mode = "bilinear"
        else:
            # The middle square is cut out before it is resized: the rest would be thrown away.
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            bottom, right = top + side, left + side
            mode = "bicubic"
        pixels = _resized(frames[:, top:bottom, left:right], self._size, mode)
        if self._block.flip > 0.0 and draws.random() < self._block.flip:
            pixels = pixels.flip(-1)
        if self._rand_augment is not None:
            # torchvision draws from torch's global generator: a fork with a seed of its own keeps both apart.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(draws.integers(2**63)))
                pixels = self._rand_augment(pixels)
        return pixels.contiguous(memory_format=torch.channels_last)


def random_crop(
    height: int, width: int, scale: float, draws: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a part of the picture, in pixels.

    Its share of the area is uniform in [``scale``, 1] and the logarithm of its aspect in that of [3/4, 4/3]; after
    ten draws that do not fit, the largest part in the middle whose aspect is within these bounds.
    """
    low = math.log(_LOWEST_ASPECT)
    for share, tilt, down, across in draws.random((_ATTEMPTS, 4)).tolist():
        area = height * width * (scale + share * (1.0 - scale))
        aspect = math.exp(low - 2 * low * tilt)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
            return top, left, top + h, left + w
    h, w = min(height, round(width / _LOWEST_ASPECT)), min(width, round(height / _LOWEST_ASPECT))
    top, left = (height - h) // 2, (width - w) // 2
    return top, left, top + h, left + w


def _resized(frames: np.ndarray, size: int, mode: str) -> Tensor:
    frames = frames if frames.flags.writeable else frames.copy()  # torch takes no memory it may not write to
    # NumPy may give an axis of length 1 the stride 0, and torch does not take that for channels last.
    pixels = (torch.from_numpy(frames) if len(frames) > 1 else torch.from_numpy(frames[0])[None]).permute(
        0, 3, 1, 2
    )
    if pixels.shape[-2:] == (size, size):
        return pixels
    return interpolate(pixels, size=(size, size), mode=mode, antialias=True)
