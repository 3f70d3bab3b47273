"""Decoding what a shard stores, as training and evaluation read it: the same pixels as ``media``, sooner.

A JPEG without peculiarities goes straight to libjpeg-turbo; anything else, and any JPEG that it complains about,
is decided by ``media.decode_image``, which uses the same library behind PIL. So what is readable, and what its
pixels are, does not depend on the way.
"""

from __future__ import annotations

import numpy as np
import simplejpeg

from sharding import media
from sharding.media import MAX_PIXELS
from sharding.media.plain import is_plain_jpeg

_REDUCTIONS = (8, 4, 2)


def decode_image(data: bytes, at_least: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3], writable or not: EXIF orientation applied, alpha on white, first frame of an animation.

    Args:
        at_least: the decoder may leave detail out: a JPEG whose shorter side is 2, 4 or 8 times this length in
            pixels, or more, is decoded at a half, a quarter or an eighth of its size, which is far cheaper. Ask
            for twice the length that it is resampled to, and the resampling has all the detail it can show.
            ``None``: as it is.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels`` (known from the header).
    """
    if is_plain_jpeg(data):
        try:
            return _decode_jpeg(data, at_least, max_pixels)
        except _Peculiar:
            pass
    return media.decode_image(data, max_pixels)


class _Peculiar(Exception):
    """A JPEG for PIL to decide about."""


def _decode_jpeg(data: bytes, at_least: int | None, max_pixels: int) -> np.ndarray:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK") or height * width > max_pixels:
            raise _Peculiar
        reduction = 1
        if at_least is not None:
            reduction = next((by for by in _REDUCTIONS if min(height, width) >= by * at_least), 1)
        # The decoder takes its smallest scale that is not below these: exactly the one named.
        image: np.ndarray = simplejpeg.decode_jpeg(
            data, min_height=-(-height // reduction), min_width=-(-width // reduction)
        )
        return image
    except (ValueError, RuntimeError) as error:  # cut short, stray bytes, 12 bits: PIL passes some of it
        raise _Peculiar from error
