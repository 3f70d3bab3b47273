"""Images: probing, decoding, and the bytes a shard stores of one.

JPEG is decoded and encoded by libjpeg-turbo (simplejpeg), everything else by PIL. Resizing is that of
``media.resizing``; what is stored as JPEG is resized to its planes of brightness and chroma at once. The decoder's own
scaling (by 2, 4 or 8) loses more than that gains unless four times the target is left, so it is used for photographs
of eight times the size and more.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from sharding.errors import BadData
from sharding.fingerprint import fingerprint
from sharding.media.colour import composited, is_srgb, to_srgb
from sharding.media.config import ImageConfig
from sharding.media.info import Encoded, MediaInfo
from sharding.media.plain import is_plain_jpeg
from sharding.media.png import opens_elsewhere
from sharding.media.resizing import resized_pixels, resized_planes
from sharding.media.stills import Still, open_still
from sharding.media.untrusted import MAX_PIXELS, decoding, refuse_large

MAX_WEBP_SIDE = 16_383
MAX_JPEG_SIDE = 65_500

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


@decoding()
def probe_image(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """Size (upright) and number of frames from the header alone, before any pixel is decoded.

    Raises:
        BadData: not an image of a known format, or ``too-many-pixels``.
    """
    size = _plain_size(data, max_pixels)
    if size is not None:
        return MediaInfo(*size)
    still = open_still(data, max_pixels)
    width, height = reversed(still.size) if still.orientation >= 5 else still.size
    return MediaInfo(width=width, height=height, frames=still.frames)


@decoding()
def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3]: sRGB, EXIF orientation applied, alpha composited on white, first frame of an animation.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels`` (known from the header).
    """
    picture = _decoded(data, None, max_pixels).finished()
    return picture if isinstance(picture, np.ndarray) else np.asarray(composited(picture, "white"))


@decoding()
def decode_cutout(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 4]: as ``decode_image``, with its alpha; an image without has 255 everywhere.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels`` (known from the header).
    """
    return np.asarray(_image_of(_decoded(data, None, max_pixels).finished()).convert("RGBA"))


def encode_image(data: bytes, config: ImageConfig | None = None) -> Encoded:
    """The image as a shard stores it: whole image decoded (so that a broken one is found), shrunk, oriented.

    Raises:
        BadData: as ``decode_image``.
    """
    config = config or ImageConfig()
    with decoding():
        decoded = _decoded(data, config.resize, config.max_pixels)
        picture, in_planes = decoded.picture, config.format == "jpg" and decoded.shrinks
        if not in_planes or isinstance(picture, Image.Image):
            upright = _image_of(decoded.finished())
            kept = config.alpha == "keep" and upright.mode == "RGBA"
            picture = upright if kept else composited(upright, _ground(config))
            as_it_is = config.format == "keep" and decoded.untouched and picture.mode == upright.mode
            if as_it_is and decoded.format == "PNG":
                as_it_is = opens_elsewhere(data)
    if not isinstance(picture, Image.Image):
        return _store_planes(picture, decoded.size, config)
    kind = config.format if config.format != "keep" else _OWN_FORMAT.get(decoded.format, "webp")
    return store_image(picture, kind, config, as_it_is=data if as_it_is else None)


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


def _store_planes(pixels: np.ndarray, size: tuple[int, int], config: ImageConfig) -> Encoded:
    """What is stored, as JPEG, of uint8 [H, W, 3] that is to be shrunk: never RGB of the size that is stored."""
    _refuse_long(*size, "jpg")
    planes = resized_planes(pixels, size, config.chroma)
    data = simplejpeg.encode_jpeg_yuv_planes(_with_edges(planes[0]), *planes[1:], quality=config.quality)
    return Encoded(data, "jpg", MediaInfo(*size), fingerprint([Image.fromarray(planes[0])], data))


def _with_edges(luma: np.ndarray) -> np.ndarray:
    """The same [H, W], as a view of memory with even sides: with halved chroma libjpeg-turbo reads that much.

    Without, it would read what lies behind: other bytes each time, in the last column and row of blocks.
    """
    height, width = luma.shape
    if not height % 2 and not width % 2:
        return luma
    even = np.empty((height + height % 2, width + width % 2), np.uint8)
    even[:height, :width] = luma
    even[:height, width:] = luma[:, -1:]
    even[height:] = even[height - 1]
    return even[:height, :width]


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic with antialiasing, to (width, height); alpha premultiplied."""
    if image.size == size:
        return image
    if image.mode in ("RGB", "L"):
        return _image_of(resized_pixels(np.atleast_3d(np.asarray(image)), size))
    # PIL knows about alpha. Shrunk by whole numbers first, where that cannot be seen.
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _image_of(picture: np.ndarray | Image.Image) -> Image.Image:
    """RGB or L of uint8 [H, W, 3 or 1]; an image as it is."""
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)


def shrunk(width: int, height: int, shorter: int | None) -> tuple[int, int]:
    """(width, height) with the shorter side brought down to ``shorter``; never enlarged."""
    short = min(width, height)
    if shorter is None or short <= shorter:
        return width, height
    return max(1, round(width * shorter / short)), max(1, round(height * shorter / short))


@dataclass(frozen=True)
class _Decoded:
    """An image as its file holds it, and what is still to be done to it.

    Args:
        picture: uint8 [H, W, 3], upright and sRGB, where there is nothing to do but to shrink it; an image in one
            of the modes of ``eight_bits`` else.
        size: (width, height), as it lies in the file, that it is to be shrunk to.
        format: as PIL names it.
        untouched: whether what is stored is what the file holds, pixel for pixel.
    """

    picture: np.ndarray | Image.Image
    size: tuple[int, int]
    format: str
    untouched: bool
    orientation: int = 1
    profile: bytes | None = None

    @property
    def shrinks(self) -> bool:
        picture = self.picture
        return self.size != (picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1])

    def finished(self) -> np.ndarray | Image.Image:
        """Shrunk, upright and sRGB: uint8 [H, W, 3], or an image (RGB or RGBA)."""
        if isinstance(self.picture, np.ndarray):
            return resized_pixels(self.picture, self.size)
        # The costly steps come after the image was shrunk: orientation and colour commute with resizing.
        image = to_srgb(resized(self.picture, self.size), self.profile)
        if self.orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[self.orientation])
        if image is self.picture:
            image = image.copy()
        image.info = {}  # or the profile that was just applied would be stored
        return image


def _decoded(data: bytes, resize: int | None, max_pixels: int) -> _Decoded:
    plain = _plain_size(data, max_pixels)
    if plain is not None:
        size = shrunk(*plain, resize)
        pixels = _by_libjpeg(data, "RGB", plain, size)
        if pixels is not None:
            return _Decoded(pixels, size, "JPEG", untouched=size == plain)
    still = open_still(data, max_pixels)
    size = shrunk(*still.size, resize)
    image = _pixels(data, still, size)
    upright_srgb = still.orientation not in _UPRIGHT and is_srgb(still.profile, image.mode)
    untouched = still.as_it_lies and still.single and size == still.size and upright_srgb
    picture = np.asarray(image) if image.mode == "RGB" and upright_srgb else image
    return _Decoded(picture, size, still.format, untouched, still.orientation, still.profile)


def _plain_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(width, height) of a JPEG in colour that is as it lies, which libjpeg-turbo may read without PIL.

    Raises:
        BadData: ``too-many-pixels``.
    """
    if not is_plain_jpeg(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB"):
        return None
    refuse_large(width, height, max_pixels)
    return width, height


def _pixels(data: bytes, still: Still, size: tuple[int, int]) -> Image.Image:
    """The decoded image; by libjpeg-turbo itself where PIL would only add copies."""
    opened = still.opened
    if opened is not None and data[:2] == b"\xff\xd8" and opened.mode in ("L", "RGB"):
        pixels = _by_libjpeg(data, "GRAY" if opened.mode == "L" else "RGB", still.size, size)
        if pixels is not None:
            return _image_of(pixels)
    image = still.pixels()
    # A file of several pages loads itself again, though it is closed by then.
    return image.copy() if image is opened else image


def _by_libjpeg(
    data: bytes, colours: str, source: tuple[int, int], target: tuple[int, int]
) -> np.ndarray | None:
    """uint8 [H, W, C] of a JPEG, scaled where ``target`` is far smaller; ``None``: it is odd, PIL decides.

    Raises:
        BadData: ``decode-failed``: pixels are lost.
    """
    least = _scaled(source, target)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colours, min_width=least[0], min_height=least[1])
    except ValueError as error:
        if _LOST_PIXELS.search(str(error)):
            raise BadData("decode-failed", str(error)) from None
        return None
    return pixels


def _scaled(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(width, height) to be decoded: by 8, 4 or 2 smaller than the source if enough is left; (0, 0): all."""
    for factor in (8, 4, 2):
        scaled = (-(-source[0] // factor), -(-source[1] // factor))
        if all(side >= _SCALED_LEAVES * wanted for side, wanted in zip(scaled, target, strict=True)):
            return scaled
    return 0, 0


def _ground(config: ImageConfig) -> str:
    return "white" if config.alpha == "keep" else config.alpha


def _refuse_long(width: int, height: int, kind: str) -> None:
    longest = {"webp": MAX_WEBP_SIDE, "jpg": MAX_JPEG_SIDE}.get(kind)
    if longest is not None and max(width, height) > longest:
        raise BadData("too-many-pixels", f"{width}x{height} is more than {kind} can hold")


def _bytes_of(image: Image.Image, kind: str, config: ImageConfig) -> bytes:
    _refuse_long(*image.size, kind)
    if kind == "jpg":
        pixels = np.ascontiguousarray(np.asarray(image))
        return simplejpeg.encode_jpeg(pixels, config.quality, "RGB", config.chroma)
    sink = io.BytesIO()
    if kind == "webp":
        image.save(sink, "WEBP", quality=config.quality, method=4)
    else:
        image.save(sink, "PNG")
    return sink.getvalue()
