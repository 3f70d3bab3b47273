"""Backgrounds: every colour that has a name, plain or in patterns of a lighter and a darker shade of it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sharding.scenes.plans import Background
from sharding.seeds import generator

# sRGB; shades between a little darker and a little lighter keep the name (see the tests).
_COLORS: dict[str, tuple[int, int, int]] = {
    "black": (38, 38, 42), "white": (244, 244, 242), "gray": (150, 151, 153), "red": (205, 50, 50),
    "orange": (240, 150, 60), "yellow": (242, 216, 80), "green": (112, 186, 106), "blue": (106, 160, 226),
    "purple": (158, 108, 206), "pink": (243, 160, 196), "brown": (140, 96, 60),
}  # fmt: skip
_SHADE = {"plain": 0.0, "shaded": 0.09, "cloudy": 0.09, "striped": 0.075, "dotted": 0.075, "checkered": 0.06}


def draw_background(background: Background, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]."""
    rng = generator(background.seed)
    base = np.array(_COLORS[background.color], np.float32) * np.float32(rng.uniform(0.96, 1.03))
    shade = _PATTERNS[background.pattern](width, height, rng) * np.float32(_SHADE[background.pattern])
    # White and black cannot be brighter or darker: their patterns go one way only.
    if background.color == "white":
        shade = -np.abs(shade - shade.max())
    shaded = base * (1 + shade[..., None])
    return np.clip(np.rint(shaded), 0, 255).astype(np.uint8)


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), each float32 [H, W], in shorter sides."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / np.float32(min(width, height))
    return x, y


def _plain(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((height, width), np.float32)


def _shaded(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    angle = rng.uniform(0, 2 * np.pi)
    slope = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    return 2 * (slope - slope.min()) / max(float(np.ptp(slope)), 1e-6) - 1


def _cloudy(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.uniform(-1, 1, (5, 5)).astype(np.float32))
    return np.clip(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)), -1, 1)


def _striped(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    along = (x, y, x + y, x - y)[int(rng.integers(4))]
    return np.sign(np.sin(2 * np.pi * along * np.float32(rng.uniform(4, 7)))).astype(np.float32)


def _dotted(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    dots = np.float32(rng.uniform(6, 9))
    off_x, off_y = x * dots % 1 - np.float32(0.5), y * dots % 1 - np.float32(0.5)
    return np.where(off_x**2 + off_y**2 < 0.08, np.float32(1.5), np.float32(-0.5))


def _checkered(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    squares = np.float32(rng.uniform(4, 7))
    return np.where((np.floor(x * squares) + np.floor(y * squares)) % 2 == 0, np.float32(1), np.float32(-1))


_PATTERNS = {
    "plain": _plain,
    "shaded": _shaded,
    "cloudy": _cloudy,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
}
