"""Opening an image of any format: what its header says, and its pixels in 8 bits, as a browser shows them.

``open_still`` hides what formats differ in: where transparency, orientation and colour are written, how deep samples
are, which picture of several is shown, and which of a decoder's answers are not those of browsers. What is the same
for all (resizing, turning, profiles, compositing) is done by ``images``.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImagePalette, UnidentifiedImageError
from PIL.TiffImagePlugin import OPEN_INFO, TiffImageFile

from sharding.errors import BadData
from sharding.media.colour import curve_table, eight_bits, is_deep, matrix_profile, shallow_grey
from sharding.media.formats import is_avif, is_heic, is_raw_photograph, refused_format
from sharding.media.gif import Gif
from sharding.media.hdr import needs_mapping, to_sdr
from sharding.media.png import Png, is_png
from sharding.media.untrusted import refuse_large

if TYPE_CHECKING:
    from pillow_heif import HeifFile

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_ORIENTATION = 0x0112
_TAG_BITS, _TAG_PHOTOMETRIC, _TAG_PALETTE, _TAG_SAMPLES = 258, 262, 320, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
# What PIL's table of TIFF's kinds of samples leaves out, though it can read them.
OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
OPEN_INFO.setdefault((b"MM", 1, (1,), 1, (32,), ()), ("I", "I;32B"))
# Of a WebP's extended header: where its flags lie, and two of them.
_WEBP_FLAGS, _WEBP_ANIMATED, _WEBP_ALPHA = 20, 0x02, 0x10


@dataclass(frozen=True)
class Still:
    """What an image's header says; pixels are not decoded yet.

    Args:
        format: as PIL names it.
        size: (width, height), as ``pixels`` gives it: before it is turned upright.
        orientation: 1 to 8, as EXIF numbers them, of what ``pixels`` gives.
        frames: of an animation; 1 of an image.
        single: whether the file holds one picture.
        profile: the ICC profile of what ``pixels`` gives.
        as_it_lies: whether ``pixels`` gives the samples of the file, neither reduced nor in other colours.
        opened: by PIL, where it gives the pixels without more ado.
        pixels: decodes: the (first) picture in one of the modes of ``eight_bits``.
    """

    format: str
    size: tuple[int, int]
    pixels: Callable[[], Image.Image]
    orientation: int = 1
    frames: int = 1
    single: bool = True
    profile: bytes | None = None
    as_it_lies: bool = True
    opened: Image.Image | None = None


def open_still(data: bytes, max_pixels: int) -> Still:
    """The image, of which no pixel has been decoded.

    Raises:
        BadData: ``too-many-pixels``; ``unsupported-FORMAT``: a format that is known but not read, by its name. Whatever
            PIL raises: see ``decoding``.
    """
    if is_png(data):
        return _png(data, max_pixels)
    if is_heic(data):
        return _heic(data, max_pixels)
    if data[:4] == b"GIF8":
        return _gif(data, max_pixels)
    image = open_image(data, max_pixels)
    if image.format == "TIFF":
        return _tiff(data, image)
    if image.format == "AVIF":
        return _avif(data, image)
    white = 65_535 if image.format == "PPM" and image.mode == "I" else None  # PIL has scaled it
    animated = image.format == "WEBP"
    frames = getattr(image, "n_frames", 1)
    return Still(
        format=image.format or "",
        size=image.size,
        pixels=lambda: eight_bits(_loaded(image), white),
        orientation=orientation_of(image.info.get("exif")),
        frames=frames if animated else 1,
        single=frames == 1,
        profile=image.info.get("icc_profile"),
        as_it_lies=_is_shallow(image),
        opened=image,
    )


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The header, read by PIL; pixels are not decoded yet. For animated WebP; images: ``open_still``.

    Raises:
        BadData: as ``open_still``.
    """
    if data[8:16] == b"WEBPVP8X" and len(data) > _WEBP_FLAGS and data[_WEBP_FLAGS] & _WEBP_ANIMATED:
        # Without the flag PIL would show black where no frame has been drawn yet.
        data = data[:_WEBP_FLAGS] + bytes([data[_WEBP_FLAGS] | _WEBP_ALPHA]) + data[_WEBP_FLAGS + 1 :]
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        if is_avif(data):  # of a format that is read, but damaged
            raise
        name, reason = refused_format(data), _refused_tiff(data)
        if name is not None:
            raise BadData(
                f"unsupported-{name}", f"the file is of the format {name}, which is not read"
            ) from None
        if reason is not None:
            raise BadData("unsupported-tiff", f"a TIFF whose samples are not read: {reason}") from None
        raise
    refuse_large(image.width, image.height, max_pixels)
    return image


def orientation_of(exif: bytes | None) -> int:
    """1 to 8, as EXIF numbers them; 1 where there is none, or EXIF that cannot be read. XMP is not asked."""
    if not exif:
        return 1
    found = Image.Exif()
    try:
        found.load(exif)
        value = found.get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, EOFError, IndexError, struct.error):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def _is_shallow(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


# ---------------------------------------------------------------- png


def _png(data: bytes, max_pixels: int) -> Still:
    png = Png(data)
    refuse_large(*png.size, max_pixels)
    profile, curve = png.profile, None
    if png.gamma is not None:
        if png.chromaticities is None or _are_of_srgb(png.chromaticities):
            curve = curve_table(png.gamma, known_primaries=png.chromaticities is not None)
        else:
            profile = matrix_profile(png.chromaticities, 1 / png.gamma)
    mapped = png.cicp is not None and needs_mapping(*png.cicp)
    return Still(
        format="PNG",
        size=png.size,
        pixels=lambda: _png_pixels(png, curve, mapped),
        orientation=orientation_of(png.exif),
        frames=png.frames,
        single=png.frames == 1,
        profile=profile,
        as_it_lies=png.shallow and curve is None and not mapped,
    )


def _png_pixels(png: Png, curve: np.ndarray | None, mapped: bool) -> Image.Image:
    image = png.image()
    shallow = eight_bits(image, 65_535)
    if curve is None and not mapped:
        return shallow
    rgb = png.deep()
    if rgb is None:
        rgb = np.asarray(shallow.convert("RGB"))
    if mapped:
        assert png.cicp is not None
        rgb = to_sdr(rgb, *png.cicp)
    else:
        assert curve is not None
        rgb = curve[rgb] if rgb.dtype == np.uint16 else curve[rgb.astype(np.uint16) * 257]
    return _with_alpha_of(shallow, rgb)


def _with_alpha_of(image: Image.Image, rgb: np.ndarray) -> Image.Image:
    changed = Image.fromarray(rgb)
    if image.mode in ("LA", "RGBA"):
        changed.putalpha(image.getchannel("A"))
    return changed


def _are_of_srgb(chromaticities: tuple[float, ...]) -> bool:
    srgb = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
    return all(abs(one - other) < 0.002 for one, other in zip(chromaticities, srgb, strict=True))


# ---------------------------------------------------------------- gif


def _gif(data: bytes, max_pixels: int) -> Still:
    gif = Gif(data, max_pixels)
    return Still("GIF", gif.size, gif.first, frames=len(gif), single=len(gif) == 1)


# ---------------------------------------------------------------- tiff


def _tiff(data: bytes, image: Image.Image) -> Still:
    assert isinstance(image, TiffImageFile)
    if is_raw_photograph(image, data):
        raise BadData("unsupported-raw", "a camera's raw photograph, of which TIFF shows a preview at most")
    return Still(
        format="TIFF",
        size=image.size,  # PIL turns it upright as it loads it, and gives the size after that
        pixels=lambda: _tiff_pixels(image),
        single=image.n_frames == 1,
        profile=image.info.get("icc_profile"),
        opened=image,
    )


def _tiff_pixels(image: TiffImageFile) -> Image.Image:
    tags = image.tag_v2
    bits, samples = tags.get(_TAG_BITS, (1,))[0], tags.get(_TAG_SAMPLES, (_UNSIGNED,))[0]
    inverted = tags.get(_TAG_PHOTOMETRIC) == _WHITE_IS_ZERO
    premultiplied = _read_planes_as_written(image, bits)
    colours = tags.get(_TAG_PALETTE, ())
    if image.mode in ("P", "PA") and max(colours, default=0) < 256:
        # 8 bits, against the specification; libtiff and what builds on it take them so.
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    image.load()
    if premultiplied:
        return Image.frombytes("RGBa", image.size, image.tobytes()).convert("RGBA")
    if not is_deep(image):
        return eight_bits(image)
    values, white = np.asarray(image), None
    if image.mode.startswith("I;16"):
        white = (1 << bits) - 1
    elif image.mode == "I" and samples == _UNSIGNED:
        values = values.view(np.uint32)
    grey = shallow_grey(values, white)
    # PIL inverts samples of 8 bits and fewer, and no others.
    return Image.fromarray(255 - np.asarray(grey)) if inverted else grey


def _read_planes_as_written(image: TiffImageFile, bits: int) -> bool:
    """PIL takes the samples of uncompressed planes for 8 bits, and knows no plane of alpha that they are multiplied by.

    Returns:
        whether the samples that will be loaded are multiplied by their alpha.
    """
    arguments = [tile.args for tile in image.tile if isinstance(tile.args, tuple)]
    planes = [given[0] for given in arguments]
    if len(arguments) < len(image.tile) or not set(planes) <= set("RGBAa"):
        return False
    deeper = "" if bits == 8 else ";16B" if image.tag_v2.prefix == b"MM" else ";16L"
    image.tile = [
        tile._replace(args=(given[0].upper() + deeper, *given[1:]))
        for tile, given in zip(image.tile, arguments, strict=True)
    ]
    return "a" in planes


def _refused_tiff(data: bytes) -> str | None:
    """Why PIL reads no samples of a TIFF of this kind; ``None``: it is damaged, or no TIFF."""
    if data[:4] == b"MM\0+":
        return "BigTIFF of the byte order that is less usual"
    try:
        TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:
        return str(error) if str(error) in ("unknown pixel mode", "unknown data organization") else None
    except (ValueError, OSError, EOFError, KeyError, TypeError, IndexError, OverflowError, struct.error):
        return None
    return None


# ---------------------------------------------------------------- avif and heic


def _avif(data: bytes, image: Image.Image) -> Still:
    profile = image.info.get("icc_profile")
    numbers = None if profile else _numbers(_heif_file(data, deep=False))
    frames = getattr(image, "n_frames", 1)
    return Still(
        format="AVIF",
        size=image.size,
        pixels=lambda: _mapped(eight_bits(_loaded(image)), numbers),
        orientation=orientation_of(image.info.get("exif")),  # where PIL writes how the container turns it
        frames=frames,
        single=frames == 1,
        profile=profile,
    )


def _heic(data: bytes, max_pixels: int) -> Still:
    file = _heif_file(data, deep=False)
    if file is None:
        raise BadData("decode-failed", "HEIC: its boxes cannot be read")
    width, height = file.size
    refuse_large(width, height, max_pixels)
    profile = file.info.get("icc_profile")
    numbers = None if profile else _numbers(file)
    return Still(
        format="HEIF",
        size=(width, height),  # libheif turns it upright; EXIF, which says the same once more, is not asked
        pixels=lambda: _heic_pixels(data, file, numbers),
        profile=profile,
    )


def _heic_pixels(data: bytes, file: HeifFile, numbers: tuple[int, int] | None) -> Image.Image:
    shallow = eight_bits(file.to_pillow())
    if numbers is None or file.info.get("bit_depth", 8) <= 8:
        return _mapped(shallow, numbers)
    again = _heif_file(data, deep=True)
    assert again is not None
    deep = np.asarray(again)
    if deep.dtype != np.uint16 or deep.ndim != 3 or deep.shape[2] < 3:
        return _mapped(shallow, numbers)
    return _with_alpha_of(shallow, to_sdr(np.ascontiguousarray(deep[:, :, :3]), *numbers))


def _heif_file(data: bytes, deep: bool) -> HeifFile | None:
    """The boxes of a HEIC or AVIF file; ``None``: they cannot be read.

    Args:
        deep: more than 8 bits are given as 16.
    """
    import pillow_heif  # here: few corpora hold such files, and its libraries are large

    pillow_heif.options.DECODE_THREADS = 1
    try:
        return pillow_heif.open_heif(data, convert_hdr_to_8bit=not deep)
    except (ValueError, SyntaxError, OSError, RuntimeError, EOFError, IndexError):
        return None


def _numbers(file: HeifFile | None) -> tuple[int, int] | None:
    """Transfer characteristics and primaries of H.273, where ``nclx`` names some that sRGB does not stand for."""
    named = None if file is None else file.info.get("nclx_profile")
    if not named:
        return None
    numbers = (int(named["transfer_characteristics"]), int(named["color_primaries"]))
    return numbers if needs_mapping(*numbers) else None


def _mapped(image: Image.Image, numbers: tuple[int, int] | None) -> Image.Image:
    if numbers is None:
        return image
    return _with_alpha_of(image, to_sdr(np.asarray(image.convert("RGB")), *numbers))
