"""Images: probing, decoding, and the bytes a shard stores of one.

JPEG is decoded and encoded by libjpeg-turbo (simplejpeg), everything else by PIL. Resizing is bicubic with
antialiasing, over all the pixels, by torch's kernel for bytes: PIL's filter to a level or two, in a seventh of its
time. It is closer to a floating-point reference than OpenCV's INTER_AREA (``python -m benchmarks.media`` prints both).
The decoder's own scaling (by 2, 4 or 8) loses more than that gains unless four times the target is left, so it is
used for photographs of eight times the size and more.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from sharding.errors import BadData
from sharding.fingerprint import fingerprint
from sharding.media.colour import composited, eight_bits, has_alpha, is_srgb, to_srgb
from sharding.media.config import ImageConfig
from sharding.media.info import Encoded, MediaInfo
from sharding.media.untrusted import MAX_PIXELS, decoding, refuse_large

MAX_WEBP_SIDE = 16_383
MAX_JPEG_SIDE = 65_500
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

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
# Pixels of the decoded image for each of the stored one, along a side, that the decoder's own scaling must leave.
_SCALED_LEAVES = 4
# Warnings of libjpeg that tell of lost pixels; the others (odd markers, stray bytes between them) do not.
_LOST_PIXELS = re.compile(r"Corrupt JPEG data(?!: \d+ extraneous)|Premature end|bad Huffman", re.IGNORECASE)
_OWN_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The header, read by PIL; pixels are not decoded yet.

    Raises:
        BadData: ``too-many-pixels``. Whatever PIL raises: see ``decoding``.
    """
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    refuse_large(image.width, image.height, max_pixels)
    return image


@decoding()
def probe_image(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """Size (upright) and number of frames from the header alone, before any pixel is decoded.

    Raises:
        BadData: not an image of a known format, or ``too-many-pixels``.
    """
    with open_image(data, max_pixels) as image:
        frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP", "AVIF") else 1
        turned = _orientation(image) >= 5
        width, height = (image.height, image.width) if turned else image.size
        return MediaInfo(width=width, height=height, frames=frames)


@decoding()
def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3]: sRGB, EXIF orientation applied, alpha composited on white, first frame of an animation.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels`` (known from the header).
    """
    return np.asarray(composited(_upright_srgb(data, None, max_pixels).image, "white"))


@decoding()
def decode_cutout(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 4]: as ``decode_image``, with its alpha; an image without has 255 everywhere.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels`` (known from the header).
    """
    return np.asarray(_upright_srgb(data, None, max_pixels).image.convert("RGBA"))


def encode_image(data: bytes, config: ImageConfig | None = None) -> Encoded:
    """The image as a shard stores it: whole image decoded (so that a broken one is found), shrunk, oriented.

    Raises:
        BadData: as ``decode_image``.
    """
    config = config or ImageConfig()
    with decoding():
        decoded = _upright_srgb(data, config.resize, config.max_pixels)
        kept = config.alpha == "keep" and decoded.image.mode == "RGBA"
        image = decoded.image if kept else composited(decoded.image, _ground(config))
    kind = config.format if config.format != "keep" else _OWN_FORMAT.get(decoded.format, "webp")
    fits = config.format == "keep" and decoded.untouched and (kept or decoded.image.mode == "RGB")
    return store_image(image, kind, config, as_it_is=data if fits else None)


def store_image(image: Image.Image, kind: str, config: ImageConfig, as_it_is: bytes | None = None) -> Encoded:
    """What is stored of an upright RGB or RGBA image.

    Args:
        kind: ``"webp"``, ``"jpg"`` or ``"png"``.
        as_it_is: the image's own bytes, where they are stored unchanged.

    Raises:
        BadData: ``too-many-pixels``, where the format cannot hold so many on a side.
    """
    info = MediaInfo(width=image.width, height=image.height)
    data = _bytes_of(image, kind, config) if as_it_is is None else as_it_is
    # With "keep", a file that is stored unchanged may have the pixels of another that is not.
    encoded = None if config.format == "keep" else data
    return Encoded(data, kind, info, fingerprint([image], encoded))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic with antialiasing, to (width, height); alpha premultiplied."""
    if image.size == size:
        return image
    if image.mode in ("RGB", "L"):
        return _image_of(resized_pixels(np.atleast_3d(np.asarray(image)), size))
    # PIL knows about alpha. Shrunk by whole numbers first, where that cannot be seen.
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def resized_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``resized`` of uint8 [H, W, C], C 1 or 3. Every channel by itself, one thread or many: the same bytes."""
    if pixels.shape[1::-1] == size:
        return pixels
    import torch  # slow to load, and needed where something is resized only
    from torch.nn.functional import interpolate

    # Channels stay side by side, by strides that torch knows (NumPy gives a new axis none, which halves the speed).
    batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    small = interpolate(batch, size=(size[1], size[0]), mode="bicubic", antialias=True)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())


def _image_of(pixels: np.ndarray) -> Image.Image:
    """RGB or L of uint8 [H, W, 3 or 1]."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def shrunk(width: int, height: int, shorter: int | None) -> tuple[int, int]:
    """(width, height) with the shorter side brought down to ``shorter``; never enlarged."""
    short = min(width, height)
    if shorter is None or short <= shorter:
        return width, height
    return max(1, round(width * shorter / short)), max(1, round(height * shorter / short))


@dataclass(frozen=True)
class _Decoded:
    """An upright sRGB image (RGB or RGBA), the file's format as PIL names it, and whether nothing was changed."""

    image: Image.Image
    format: str
    untouched: bool


def _upright_srgb(data: bytes, resize: int | None, max_pixels: int) -> _Decoded:
    # The costly steps come after the image was shrunk: orientation and colour commute with resizing.
    with open_image(data, max_pixels) as opened:
        size = shrunk(opened.width, opened.height, resize)
        orientation = _orientation(opened)
        profile = opened.info.get("icc_profile")
        plain = opened.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
        image = eight_bits(_pixels(data, opened, size))
        untouched = (
            plain
            and size == opened.size
            and orientation not in _UPRIGHT
            and is_srgb(profile, image.mode)
            and getattr(opened, "n_frames", 1) == 1
        )
        image = to_srgb(resized(image, size), profile)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        if image is opened:
            image = opened.copy()  # a file of several pages loads itself again, though it is closed by then
        image.info = {}  # or the profile that was just applied would be stored
        return _Decoded(image, opened.format or "", untouched)


def _pixels(data: bytes, opened: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The decoded image; by libjpeg-turbo itself where PIL would only add copies, and then of this size already."""
    if data[:2] != b"\xff\xd8" or opened.mode not in ("L", "RGB") or has_alpha(opened):
        opened.load()
        return opened
    try:
        least = _scaled(opened.size, size)
        colours = "GRAY" if opened.mode == "L" else "RGB"
        pixels = simplejpeg.decode_jpeg(data, colours, min_width=least[0], min_height=least[1])
    except ValueError as error:
        if _LOST_PIXELS.search(str(error)):
            raise BadData("decode-failed", str(error)) from None
        opened.load()  # odd, yet perhaps readable: PIL decides
        return opened
    return _image_of(resized_pixels(pixels, size))


def _scaled(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(width, height) to be decoded: by 8, 4 or 2 smaller than the source if enough is left; (0, 0): all."""
    for factor in (8, 4, 2):
        scaled = (-(-source[0] // factor), -(-source[1] // factor))
        if all(side >= _SCALED_LEAVES * wanted for side, wanted in zip(scaled, target, strict=True)):
            return scaled
    return 0, 0


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF numbers them; 1 where there is none, or EXIF that cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, EOFError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _ground(config: ImageConfig) -> str:
    return "white" if config.alpha == "keep" else config.alpha


def _bytes_of(image: Image.Image, kind: str, config: ImageConfig) -> bytes:
    longest = {"webp": MAX_WEBP_SIDE, "jpg": MAX_JPEG_SIDE}.get(kind)
    if longest is not None and max(image.size) > longest:
        raise BadData("too-many-pixels", f"{image.width}x{image.height} is more than {kind} can hold")
    if kind == "jpg":
        pixels = np.ascontiguousarray(np.asarray(image))
        return simplejpeg.encode_jpeg(pixels, config.quality, "RGB", config.chroma)
    sink = io.BytesIO()
    if kind == "webp":
        image.save(sink, "WEBP", quality=config.quality, method=4)
    else:
        image.save(sink, "PNG")
    return sink.getvalue()
