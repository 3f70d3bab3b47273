"""From any colour mode to what is stored: 8 bits, sRGB, alpha composited or kept.

Profiles are applied with LittleCMS after resizing, and cost half as much again as all the rest of a small JPEG
(``python -m benchmarks.media``: 2.6 -> 4.0 ms). Files without a profile, or with one that is sRGB in all but name,
pay nothing.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageColor

# Modes a profile can describe, and the mode of the result.
_MANAGED = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "LAB": "RGB"}
# A step of 8 bits: what rounding makes of a profile that is sRGB.
_SAME = 1


def has_alpha(image: Image.Image) -> bool:
    """Whether any pixel may be transparent, by the mode and the header."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def eight_bits(image: Image.Image) -> Image.Image:
    """The image in one of the modes L, LA, RGB, RGBA, CMYK, LAB: palettes resolved, deep grey scaled, not clipped."""
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _shallow(image)
    if mode in ("L", "1", "LA", "La"):
        wanted = "LA" if has_alpha(image) else "L"
    elif mode in ("CMYK", "LAB"):
        wanted = mode
    else:
        wanted = "RGBA" if has_alpha(image) else "RGB"
    return image if mode == wanted and "transparency" not in image.info else image.convert(wanted)


def _shallow(image: Image.Image) -> Image.Image:
    """L (LA where a grey value is transparent) of 16-bit, 32-bit and floating-point grey."""
    grey = np.asarray(image)
    values = grey.astype(np.float32)
    top = float(values.max(initial=0))
    if image.mode == "F":
        values = values * np.float32(255) if top <= 1 else values
    elif image.mode != "I" or top > 255:  # mode I also holds 8-bit values
        values = values / np.float32(257)
    shallow = Image.fromarray(np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shallow.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return shallow


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
