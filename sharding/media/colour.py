"""From any colour mode to what is stored: 8 bits, sRGB, alpha composited or kept.

Profiles are applied with LittleCMS after resizing, and cost half as much again as all the rest of a small JPEG
(``python -m benchmarks.media``: 2.6 -> 4.0 ms). Files without a profile, or with one that is sRGB in all but name,
pay nothing.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageColor

# Modes a profile can describe, and the mode of the result.
_MANAGED = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "LAB": "RGB"}
# A step of 8 bits: what rounding makes of a profile that is sRGB.
_SAME = 1
_D50 = np.array([0.9642, 1.0, 0.8249])


def has_alpha(image: Image.Image) -> bool:
    """Whether any pixel may be transparent, by the mode and the header."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey of 16 or 32 bits, or of floating point."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: Image.Image, white: int | None = None) -> Image.Image:
    """The image in one of the modes L, LA, RGB, RGBA, CMYK, LAB: palettes resolved, deep grey scaled, not clipped.

    Args:
        white: the value of white of deep grey, where it is known.
    """
    mode = image.mode
    if is_deep(image):
        return shallow_grey(np.asarray(image), 65_535 if mode.startswith("I;16") else white)
    if mode in ("L", "1", "LA", "La"):
        wanted = "LA" if has_alpha(image) else "L"
    elif mode in ("CMYK", "LAB"):
        wanted = mode
    else:
        wanted = "RGBA" if has_alpha(image) else "RGB"
    return image if mode == wanted and "transparency" not in image.info else image.convert(wanted)


def shallow_grey(values: np.ndarray, white: int | None = None) -> Image.Image:
    """L of [H, W] numbers. Where ``white`` is not known, it is the least usual number that no value is above.

    Usual are 1 (of floating point), 255, 65 535, and the largest number of 31 or 32 bits.
    """
    floating = values.dtype.kind == "f"
    if floating:
        values = np.nan_to_num(values, posinf=0, neginf=0)
    top = float(values.max(initial=0))
    full: float | None = white
    if full is None:
        deepest = 2**32 - 1 if values.dtype == np.uint32 else 2**31 - 1
        usual = (1, 255, 65_535, deepest, top) if floating else (255, 65_535, deepest)
        full = next(value for value in usual if top <= value)
    wide = values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
    scaled = np.multiply(wide, wide.dtype.type(255 / full))
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB or RGBA in sRGB, of an image that ``eight_bits`` gave; without a profile it is taken for sRGB."""
    if image.mode == "LA":
        grey, alpha = image.split()
        rgb = to_srgb(grey, profile)
        rgb.putalpha(alpha)
        return rgb
    transform = _transform(profile or b"", image.mode)
    if transform is not None:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted
    return image if image.mode in ("RGB", "RGBA") else image.convert("RGB")


def is_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether pixels of this mode can be read as sRGB without their profile."""
    return mode in ("L", "LA", "RGB", "RGBA") and _transform(profile or b"", mode.removesuffix("A")) is None


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB; ``None`` where it would change nothing, or the profile is not one of this mode."""
    if mode not in _MANAGED or not (profile or mode == "LAB"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            _MANAGED[mode],
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError):
        # A broken profile, or one of another colour space: the pixels are there, and most files are sRGB.
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode not in ("L", "RGB", "RGBA"):
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        probe = Image.fromarray(steps[None])
    else:
        cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(cube).convert(mode)
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    before, after = (np.asarray(item.convert("RGB"), dtype=np.int16) for item in (probe, converted))
    return int(np.abs(before - after).max()) <= _SAME


def composited(image: Image.Image, colour: str) -> Image.Image:
    """RGB of an RGB or RGBA image, alpha composited on ``colour`` (a name or ``#rrggbb``)."""
    if image.mode == "RGB":
        return image
    ground = Image.new("RGBA", image.size, (*ImageColor.getrgb(colour)[:3], 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def curve_table(gamma: float, *, known_primaries: bool) -> np.ndarray | None:
    """uint8 [65536]: samples of 16 bits, made of light by the exponent ``gamma``, to sRGB; ``None``: they are sRGB.

    An exponent of 1 / 2.2 alone stands for the curve of sRGB, as libpng and browsers take it; with primaries beside it
    (``known_primaries``) it is meant as it is written.
    """
    if not known_primaries and abs(gamma * 2.2 - 1) < 0.05:
        return None
    light = (np.arange(65_536) / 65_535) ** (1 / gamma)
    code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(code * 255).astype(np.uint8)


def matrix_profile(chromaticities: Sequence[float], gamma: float) -> bytes | None:
    """An ICC profile of RGB whose light is samples to the power of ``gamma``; ``None``: there are no such colours.

    Args:
        chromaticities: x and y of white, red, green and blue, eight numbers.
    """
    if min(chromaticities[1::2]) <= 0 or not 0.05 < gamma < 20:
        return None
    white, *primaries = (
        np.array([x / y, 1.0, (1 - x - y) / y])
        for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)
    )
    columns = np.stack(primaries, axis=1)
    if abs(np.linalg.det(columns)) < 1e-6:
        return None
    # Whites are brought to that of ICC (D50) in the cone space of Bradford, as the specification has it.
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = np.diag(bradford @ _D50 / (bradford @ white))
    adapted = np.linalg.inv(bradford) @ scale @ bradford @ (columns * np.linalg.solve(columns, white))
    curve = b"para" + struct.pack(">IHHi", 0, 0, 0, round(gamma * 65_536))
    tags = {b"wtpt": _xyz(_D50), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {name: _xyz(adapted[:, place]) for place, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    places, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        places += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x04300000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + _xyz(_D50)[8:]
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + places + body


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65_536) for value in values))
