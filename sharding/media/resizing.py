"""Resizing by libswscale (PyAV): bicubic with antialiasing, over all the pixels, the same bytes on every processor.

It is closer to a floating-point Lanczos reference than the filters of PIL, torch and OpenCV (``python -m
benchmarks.media`` prints it). Torch's kernel for bytes is quicker, by a third than that to planes; but importing torch
takes seconds of CPU and hundreds of megabytes, which every decoding process would spend anew.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

# The library's weights are whole numbers; of a filter over more pixels too many of them would be 0.
_MOST = 32


def resized_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, C] to ``size`` (width, height); C is 1 or 3, and every channel is resized by itself."""
    if pixels.shape[1::-1] == size:
        return pixels
    near = _brought_near(pixels, size)
    # Not as RGB, which the library would mix to YUV and unmix.
    channels = [near[:, :, channel].copy() for channel in range(near.shape[2])]
    return np.stack([_plane(_reformatted(channel, "gray", size, "gray"), 0) for channel in channels], axis=2)


def resized_planes(
    pixels: np.ndarray, size: tuple[int, int], chroma: Literal["420", "444"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [H, W, 3] RGB to ``size`` (width, height) in one pass to what JPEG stores: Y [H, W], Cb and Cr.

    ITU-R BT.601, full range. ``chroma`` "420": Cb and Cr have half the width and height, rounded up.
    """
    near = np.ascontiguousarray(_brought_near(pixels, size))
    planes = _reformatted(near, "rgb24", size, f"yuv{chroma}p")
    return _plane(planes, 0), _plane(planes, 1), _plane(planes, 2)


def _brought_near(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Averaged over whole numbers of pixels where ``size`` is smaller by more than the library can do well."""
    height, width = pixels.shape[:2]
    factors = (max(1, 2 * width // size[0] // _MOST), max(1, 2 * height // size[1] // _MOST))
    if factors == (1, 1):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.reduce(factors)).reshape(-1, -(-width // factors[0]), pixels.shape[2])


def _reformatted(pixels: np.ndarray, given: str, size: tuple[int, int], wanted: str) -> VideoFrame:
    import av  # where something is resized only
    from av.video.reformatter import ColorRange, Interpolation

    frame = av.VideoFrame.from_numpy_buffer(pixels, format=given)
    return _scaler(frame.width, frame.height, given, size, wanted).reformat(
        frame,
        *size,
        wanted,
        interpolation=(
            Interpolation.BICUBIC
            | Interpolation.FULL_CHR_H_INP  # every pixel counts for the chroma, not every other
            | Interpolation.ACCURATE_RND
            | Interpolation.BITEXACT
        ),
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )


@lru_cache(maxsize=64)  # each holds 0.4 MB, or 1 MB of a large picture
def _scaler(width: int, height: int, given: str, size: tuple[int, int], wanted: str) -> VideoReformatter:
    """One a pair of sizes: to prepare the library for another one takes a third as long as to resize by it."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _plane(frame: VideoFrame, number: int) -> np.ndarray:
    """uint8 [H, W], contiguous, in memory of its own."""
    plane = frame.planes[number]
    padded = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return padded[: plane.height, : plane.width].copy()
