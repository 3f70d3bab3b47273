"""Names of colours: told from pixels, and given to pixels by turning their hue."""

from __future__ import annotations

import numpy as np

#: The basic colour terms of English, as captions spell them.
NAMES = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
#: Names whose hue an object can be turned to, and that hue in degrees.
HUES = {
    "red": 2.0,
    "orange": 28.0,
    "yellow": 50.0,
    "green": 125.0,
    "blue": 218.0,
    "purple": 275.0,
    "pink": 322.0,
}
# An object is called by a colour that this share of it has, if no other has this part of that share.
_MOST, _RIVAL = 0.45, 0.5
_MOST_GRAY = 0.7  # shadows and highlights of all colours are grey
_OPAQUE = 128
_UNNAMED = -1  # between two names: cyan, olive


def hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hue in degrees, saturation 0..1, value 0..1), each float32 [...], of uint8 [..., 3]."""
    scaled = rgb.astype(np.float32) / np.float32(255)
    high, low = scaled.max(-1), scaled.min(-1)
    span = high - low
    red, green, blue = scaled[..., 0], scaled[..., 1], scaled[..., 2]
    safe = np.where(span > 0, span, np.float32(1))
    sixth = np.select(
        [span == 0, high == red, high == green],
        [np.zeros_like(high), (green - blue) / safe % np.float32(6), (blue - red) / safe + np.float32(2)],
        (red - green) / safe + np.float32(4),
    )
    saturation = np.where(high > 0, span / np.where(high > 0, high, np.float32(1)), np.float32(0))
    return sixth * np.float32(60), saturation, high


def from_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of float32 [...] each, as ``hsv`` gives them."""
    sixths = np.stack([(hue / 60 + shift) % 6 for shift in (5, 3, 1)], axis=-1)
    inside = np.clip(np.minimum(sixths, 4 - sixths), 0, 1)
    scaled = value[..., None] * (1 - saturation[..., None] * inside)
    return np.rint(scaled * 255).astype(np.uint8)


def named_pixels(rgb: np.ndarray) -> np.ndarray:
    """int8 [...]: the index in ``NAMES`` of each pixel's colour, -1 where no name fits, of uint8 [..., 3]."""
    hue, saturation, value = hsv(rgb)
    # Bounds were set by looking at 460 cut-outs: a name is given where nobody would choose another.
    colour = NAMES.index
    vivid, deep = saturation >= 0.5, value < 0.68
    reddish = np.where(
        deep & (saturation < 0.75),
        np.where(hue < 90, colour("brown"), _UNNAMED),
        np.where(saturation >= 0.6, colour("red"), np.where(saturation < 0.5, colour("pink"), _UNNAMED)),
    )
    rosy = np.where(
        saturation >= 0.76,
        np.where(deep, _UNNAMED, colour("red")),
        np.where(deep | (saturation >= 0.66), _UNNAMED, colour("pink")),
    )
    tawny = np.where(deep, colour("brown"), np.where(saturation >= 0.65, colour("orange"), _UNNAMED))
    chromatic = np.select(
        [
            (hue < 16) | (hue >= 348),
            hue < 38,
            hue >= 334,
            (hue >= 43) & (hue < 66),
            (hue >= 75) & (hue < 168),
            (hue >= 192) & (hue < 245),
            (hue >= 252) & (hue < 295),
            (hue >= 295) & (hue < 334),
        ],
        [
            reddish,
            tawny,
            rosy,
            np.where(vivid & (value >= 0.75), colour("yellow"), _UNNAMED),
            np.full(hue.shape, colour("green")),
            np.where(saturation >= 0.35, colour("blue"), _UNNAMED),
            np.where((saturation >= 0.4) & (value >= 0.45), colour("purple"), _UNNAMED),
            np.where(saturation >= 0.3, colour("pink"), _UNNAMED),
        ],
        _UNNAMED,
    )
    dull = np.select([value < 0.32, value > 0.85], [colour("black"), colour("white")], colour("gray"))
    grey = (saturation < 0.2) | (value < 0.28) | ((saturation < 0.45) & (value < 0.38))
    return np.where(grey, dull, chromatic).astype(np.int8)


def color_of(rgba: np.ndarray) -> str | None:
    """The colour that most of a cut-out has, or None where it has several or none that has a name.

    Args:
        rgba: uint8 [H, W, 4].
    """
    seen = named_pixels(rgba[rgba[..., 3] >= _OPAQUE][:, :3])
    if not seen.size:
        return None
    shares = np.bincount(seen[seen != _UNNAMED], minlength=len(NAMES)) / seen.size
    first, second = np.argsort(-shares, kind="stable")[:2]
    most = _MOST_GRAY if NAMES[first] == "gray" else _MOST
    return NAMES[first] if shares[first] >= most and shares[second] <= _RIVAL * shares[first] else None


def recolored(rgba: np.ndarray, name: str) -> np.ndarray:
    """The cut-out with its hues turned so that its own colour becomes ``name``; shades and alpha stay.

    Args:
        rgba: uint8 [H, W, 4], of a colour in ``HUES``.
    """
    hue, saturation, value = hsv(rgba[..., :3])
    vivid = (rgba[..., 3] >= _OPAQUE) & (saturation > 0.25)
    if not vivid.any():
        return rgba
    # The mean direction: hues lie on a circle.
    angles = np.deg2rad(hue[vivid].astype(np.float64))
    own = np.rad2deg(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))
    turned = (hue + np.float32(HUES[name] - own)) % np.float32(360)
    return np.concatenate([from_hsv(turned, saturation, value), rgba[..., 3:]], axis=-1)
