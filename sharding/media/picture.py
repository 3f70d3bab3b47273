"""A decoded frame as a player shows it: upright, on square pixels, in sRGB."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sharding.errors import BadData
from sharding.media.colour import composited
from sharding.media.hdr import HLG, PQ, needs_mapping, to_sdr
from sharding.media.resizing import resized_pixels

if TYPE_CHECKING:
    import av
    from av.sidedata.sidedata import SideData

_UNSPECIFIED = 2
# Matrices of ITU-T H.273 that libswscale applies: RGB, BT.709, FCC, BT.601 (two), SMPTE 240M, BT.2020.
_MATRICES = frozenset({0, 1, _UNSPECIFIED, 4, 5, 6, 7, 9})
_BT709, _BT601, _BT2020 = "ITU709", "ITU601", "BT2020"
# Matrices of 0 to 3 quarter turns, counter-clockwise.
_ROTATIONS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
_SD = (1279, 576)  # width and height, at most, of what is taken for BT.601 where a file does not say


def shown(frame: av.VideoFrame, ratio: Fraction | None, shorter: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3]: ``upright``, with square pixels.

    Args:
        ratio: width of a stored pixel over its height.
        shorter: pixels of the shorter side that the picture will be shrunk to, if it has more: a large one in HDR is
            brought near to that before its costly colours are mapped.
    """
    pixels = upright(frame, shorter if ratio in (None, 0, 1) else None)
    if not ratio or ratio == 1 or not Fraction(1, 10) < ratio < 10:
        return pixels
    if turned(frame):
        ratio = 1 / ratio
    return resized_pixels(pixels, (max(1, round(pixels.shape[1] * ratio)), pixels.shape[0]))


def upright(frame: av.VideoFrame, shorter: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3]: sRGB, alpha composited on white, the display matrix of the container applied.

    Args:
        shorter: as for ``shown``.

    Raises:
        BadData: ``unsupported-colour``.
    """
    return np.ascontiguousarray(_oriented(_srgb(frame, shorter), _matrix(frame)))


def _srgb(frame: av.VideoFrame, shorter: int | None) -> np.ndarray:
    matrix, transfer, primaries = frame.colorspace, frame.color_trc, frame.color_primaries
    if matrix not in _MATRICES:
        raise BadData("unsupported-colour", f"matrix coefficients {matrix} (ITU-T H.273) are not known")
    if transfer == _UNSPECIFIED and any(data.type.name == "DOVI_METADATA" for data in _side_data(frame)):
        raise BadData("unsupported-colour", "Dolby Vision without a base layer that other decoders can show")
    source = _guessed_matrix(frame)
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", src_colorspace=source, threads=1)
        pixels = np.asarray(composited(Image.fromarray(rgba), "white"))
    elif needs_mapping(transfer, primaries):
        factor = _factor(frame.width, frame.height, shorter)
        width, height = frame.width // factor, frame.height // factor
        pixels = frame.to_ndarray(
            format="rgb48le",
            src_colorspace=source,
            width=width,
            height=height,
            interpolation="AREA" if factor > 1 else None,
            threads=1,
        )
    else:
        return frame.to_ndarray(format="rgb24", src_colorspace=source, threads=1)
    return to_sdr(pixels, transfer, primaries)


def _factor(width: int, height: int, shorter: int | None) -> int:
    """The largest by which both sides can be divided, and twice the wanted pixels are left."""
    most = 1 if shorter is None else min(width, height) // (2 * shorter)
    return next((factor for factor in range(most, 1, -1) if not width % factor and not height % factor), 1)


def _guessed_matrix(frame: av.VideoFrame) -> str | None:
    """What players take where the file does not say: BT.709 for HD, BT.601 for smaller frames, BT.2020 for HDR."""
    if frame.colorspace != _UNSPECIFIED or frame.format.is_rgb:
        return None
    hdr = frame.color_trc in (PQ, HLG) and frame.color_primaries == _UNSPECIFIED
    if frame.color_primaries == 9 or hdr:
        return _BT2020
    return _BT601 if frame.width <= _SD[0] and frame.height <= _SD[1] else _BT709


def turned(frame: av.VideoFrame) -> bool:
    """Whether width and height change places when the frame is shown upright."""
    a, b, c, d = _matrix(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def lies_upright(frame: av.VideoFrame) -> bool:
    """Whether the frame is shown as it is stored."""
    a, _, _, d = _matrix(frame)
    return not turned(frame) and a >= 0 and d >= 0


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the display matrix: the pixel at x, y is shown at (a x + c y, b x + d y)."""
    for data in _side_data(frame):
        if data.type.name == "DISPLAYMATRIX" and data.buffer_size >= 36:
            a, b, _, c, d = struct.unpack_from("=5i", data)
            return a, b, c, d
    return _ROTATIONS[round(frame.rotation / 90) % 4]


def _side_data(frame: av.VideoFrame) -> list[SideData]:
    try:
        return list(frame.side_data)
    except ValueError:
        # PyAV names all kinds or none: beside one that it does not know, only the rotation can be asked for.
        return []


def _oriented(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A view, in the one of the eight orientations that is nearest to the matrix."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    if across < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if down < 0 else pixels
