"""Pictures as they are shown: what a PIL image holds beside its samples, applied to them.

The same rules as those by which training data are read (a test compares the two): orientation of EXIF, profiles and
curves, alpha on white, depths above 8 bits scaled, the first frame of an animation. Nothing is opened here; an image
that PIL has not loaded yet is loaded by PIL.

PIL does not tell all that a file says. Where it matters, give arrays made by a decoder that does: HDR and wide gamuts
named by numbers (cICP of PNG, nclx of AVIF), primaries without a profile (cHRM), planes of 16-bit TIFF.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Modes that a profile can describe, and the mode of the result.
_MANAGED = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "LAB": "RGB"}
_SPECIAL = (
    "exif",
    "icc_profile",
    "transparency",
    "gamma",
)  # keys of ``Image.info`` that change what is shown
_BITS_OF_RAW = {"1": 1, "L;2": 2, "L;4": 4, "I;16B": 16, "RGB;16B": 16}
# x and y of white, red, green and blue of sRGB.
_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_TAG_BITS, _TAG_PHOTOMETRIC, _TAG_SAMPLES = 258, 262, 339


def shown(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] in sRGB, upright, on white, of a PIL image of any mode. The image is not changed."""
    info = picture.info
    if (
        picture.mode == "RGB"
        and picture.format not in ("GIF", "TIFF")
        and not any(key in info for key in _SPECIAL)
    ):
        return np.asarray(picture)
    orientation, curve = _orientation(picture), _curve(picture)
    if not isinstance(info.get("transparency", 0), int | tuple | bytes):
        picture = picture.copy()  # PNG texts are in ``info`` too, whatever they are called
        del picture.info["transparency"]
        info = picture.info
    if curve is not None and picture.mode.startswith("I;16") and "transparency" not in info:
        image = Image.fromarray(curve[np.asarray(picture)]).convert("RGB")
    else:
        image = _to_srgb(_eight_bits(picture), info.get("icc_profile"))
        if curve is not None:
            image = image.point(curve[::257].tolist() * 3 + list(range(256)) * (image.mode == "RGBA"))
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image)


def _orientation(picture: Image.Image) -> int:
    """1 to 8, of EXIF alone; of what PIL turns itself as it loads (TIFF, HEIF) 1."""
    data = picture.info.get("exif")
    if not data or picture.format in ("TIFF", "HEIF"):
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, EOFError, IndexError, struct.error):
        return 1  # EXIF that cannot be read turns nothing
    return value if isinstance(value, int) else 1


def _curve(picture: Image.Image) -> np.ndarray | None:
    """uint8 [65536]: samples of 16 bits to sRGB, where a PNG says by gAMA, and nothing better, how they were made."""
    info = picture.info
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if not isinstance(gamma, float) or info.get("icc_profile") or "srgb" in info or not 0.01 <= gamma <= 100:
        return None
    if primaries is None and abs(gamma * 2.2 - 1) < 0.05:
        return None  # without primaries, the usual exponent stands for the curve of sRGB
    if primaries is not None and not np.allclose(primaries, _CHROMATICITIES, rtol=0, atol=0.002):
        return None
    light = (np.arange(65_536) / 65_535) ** (1 / gamma)
    code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(code * 255).astype(np.uint8)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """L, LA, RGB, RGBA, CMYK or LAB: palettes resolved, deep grey scaled, transparency in a channel."""
    if picture.format == "GIF":
        return _on_transparent(picture)
    key = picture.info.get("transparency")
    if isinstance(key, int | tuple) and picture.mode not in ("P", "PA"):
        return _keyed(picture, key)
    mode = picture.mode
    if _is_deep(picture):
        return _deep(picture)
    alpha = mode in ("RGBA", "LA", "PA", "RGBa", "La") or (mode == "P" and isinstance(key, int | bytes))
    if mode in ("L", "1", "LA", "La"):
        wanted = "LA" if alpha else "L"
    elif mode in ("CMYK", "LAB"):
        wanted = mode
    else:
        wanted = "RGBA" if alpha else "RGB"
    return picture if mode == wanted else picture.convert(wanted)


def _on_transparent(picture: Image.Image) -> Image.Image:
    """A frame of a GIF; PIL fills what the first one does not cover with a colour, where nothing is transparent."""
    place = getattr(picture, "dispose_extent", None)
    alpha = picture.mode == "RGBA" or isinstance(picture.info.get("transparency"), int)
    image = picture.convert("RGBA" if alpha else "RGB")
    if alpha or place is None or picture.tell() or tuple(place) == (0, 0, *picture.size):
        return image
    canvas = Image.new("RGBA", picture.size)
    canvas.paste(image.crop(place), tuple(place)[:2])
    return canvas


def _keyed(picture: Image.Image, key: int | tuple[int, ...]) -> Image.Image:
    """With an alpha channel, where PNG names one transparent value or colour, at the depth of the file.

    PIL gives samples of 1, 2 and 4 bits scaled to 8, and the higher half of 16 bits of colour. The depth is known until
    PIL has loaded the image; after that it is taken for 8, unless the key says otherwise.
    """
    tiles = getattr(picture, "tile", None)  # of files alone
    tile = tiles[0].args if tiles else None
    bits = _BITS_OF_RAW.get(tile[0] if isinstance(tile, tuple) else str(tile), 8)
    if isinstance(key, tuple):
        shift = 8 if bits == 16 or max(key) > 255 else 0
        values = np.asarray(picture.convert("RGB"))
        clear = (values == np.array([(value >> shift) & 255 for value in key], np.uint8)).all(axis=2)
        image = Image.fromarray(values)
    elif _is_deep(picture):
        clear, image = np.asarray(picture) == key, _deep(picture)
    else:
        top = (1 << (1 if picture.mode == "1" else bits)) - 1
        image = picture.convert("L")
        clear = np.asarray(image) == (key & top) * 255 // top
    image = image.copy()
    image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return image


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode.startswith("I") or picture.mode == "F"


def _deep(picture: Image.Image) -> Image.Image:
    """L of grey of 16 or 32 bits or floating point.

    Where white is not known, it is the least usual number that no value is above: 1 (of floating point), 255, 65 535,
    the largest of 31 or 32 bits.
    """
    tags: Any = getattr(picture, "tag_v2", {})
    bits, samples = tags.get(_TAG_BITS, (16,))[0], tags.get(_TAG_SAMPLES, (1,))[0]
    inverted = tags.get(_TAG_PHOTOMETRIC) == 0
    values, white = np.asarray(picture), None
    if picture.mode.startswith("I;16"):
        white = (1 << bits) - 1
    elif picture.format == "PPM" and picture.mode == "I":
        white = 65_535
    elif picture.mode == "I" and tags and samples == 1:
        values = values.view(np.uint32)
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
    grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey)


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """RGB or RGBA of an image that ``_eight_bits`` gave; without a profile it is taken for sRGB."""
    if image.mode == "LA":
        grey, alpha = image.split()
        rgb = _to_srgb(grey, profile)
        rgb.putalpha(alpha)
        return rgb
    transform = _transform(profile if isinstance(profile, bytes) else b"", image.mode)
    if transform is not None:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted
    return image if image.mode in ("RGB", "RGBA") else image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """``None`` where there is no profile, or it is not one of this mode."""
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
        return None if _is_srgb(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # a broken profile, or one of another colour space


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it changes no colour by more than a step of 8 bits: its profile is sRGB in all but name."""
    if mode not in ("L", "RGB", "RGBA"):
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(steps[None]) if mode == "L" else Image.fromarray(cube).convert(mode)
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    before, after = (np.asarray(item.convert("RGB"), dtype=np.int16) for item in (probe, converted))
    return int(np.abs(before - after).max()) <= 1
