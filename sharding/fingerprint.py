"""Fingerprints of images and clips: a digest that those of equal pixels share, and a hash that similar ones share.

The perceptual hash is the DCT hash of 32 x 32 grey values::

    frame -> grey -> 32 x 32 (antialiased) -> DCT-II -> the 64 lowest frequencies but the mean
          -> one bit each: above their median

Bit 0 (the least significant) is the lowest frequency. Of a clip the grey image is a 2 x 2 montage of its four
quarters' middle frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from sharding.media.info import Fingerprint

_SIDE = 32
_BITS = 64
_DIGITS = 32


def _dct(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix [size, size]."""
    rows, columns = np.arange(size)[:, None], np.arange(size)
    matrix = np.cos(np.pi * rows * (2 * columns + 1) / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def _lowest(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the lowest frequencies but (0, 0), by the sum of both, lowest first."""
    places = [(row, column) for row in range(_SIDE) for column in range(_SIDE) if row or column]
    places.sort(key=lambda place: (sum(place), place))
    rows, columns = zip(*places[:count], strict=True)
    return np.asarray(rows), np.asarray(columns)


_ROWS, _COLUMNS = _lowest(_BITS)
_LOW = _dct(_SIDE)[: max(*_ROWS, *_COLUMNS) + 1]


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of grey values [32, 32] in 0..255.

    Coefficients are rounded to whole numbers first, so that what is flat or symmetric up to rounding errors has
    zeros, the same on every processor. An image of one colour has the hash 0.
    """
    coefficients = np.rint((_LOW @ grey.astype(np.float64) @ _LOW.T)[_ROWS, _COLUMNS])
    ranked = np.sort(coefficients)
    above = coefficients > (ranked[_BITS // 2 - 1] + ranked[_BITS // 2]) / 2
    return int(np.packbits(above, bitorder="little").view("<u8")[0])


class Fingerprinter:
    """Takes the frames of one sample in order, then gives its fingerprint. Holds 1 KiB a frame.

    Args:
        encoded: what an encoder made of the frames, where they decide its bytes: it is digested in their stead,
            since it is several times smaller.
    """

    def __init__(self, encoded: bytes | None = None) -> None:
        self._digest = hashlib.sha256(encoded or b"")  # which processors do by themselves
        self._of_pixels = encoded is None
        self._grey: list[Image.Image] = []

    def add(self, frame: Image.Image | np.ndarray) -> None:
        """One frame: an image, or uint8 [H, W, 3]. Upright, of the stored size, not yet encoded.

        Where its pixels are not digested, its brightness alone (an image of mode L) will do.
        """
        image = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
        if self._of_pixels:
            self._digest.update(f"{image.mode} {image.width} {image.height} ".encode())
            self._digest.update(image.tobytes())
        opaque = _on_white(image) if image.mode == "RGBA" else image
        # Antialiased; the gap lets all but small images shrink by a cheap average first.
        grey = opaque.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
        self._grey.append(grey)

    def result(self) -> Fingerprint:
        """The fingerprint of the frames so far; at least one."""
        if not self._grey:
            raise ValueError("a fingerprint needs a frame")
        return Fingerprint(perceptual_hash(np.asarray(self._picture())), self._digest.hexdigest()[:_DIGITS])

    def _picture(self) -> Image.Image:
        frames, half = self._grey, _SIDE // 2
        if len(frames) == 1:
            return frames[0]
        montage = Image.new("L", (_SIDE, _SIDE))
        for quarter in range(4):
            frame = frames[(2 * quarter + 1) * len(frames) // 8]
            small = frame.resize((half, half), Image.Resampling.BOX)
            montage.paste(small, (quarter % 2 * half, quarter // 2 * half))
        return montage


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def fingerprint(frames: Iterable[Image.Image | np.ndarray], encoded: bytes | None = None) -> Fingerprint:
    """The fingerprint of an image (one frame) or a clip (all its frames), as it is to be stored.

    Frames are upright, RGB (or RGBA), of the stored size, before any lossy encoding. For ``encoded`` see
    ``Fingerprinter``.

    Raises:
        ValueError: there is no frame.
    """
    taken = Fingerprinter(encoded)
    for frame in frames:
        taken.add(frame)
    return taken.result()
