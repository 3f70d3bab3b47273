"""Images and clips: from untrusted bytes to arrays, and to the bytes a shard stores.

Everything here is bounded by what the header says before pixels are decoded, opens only the formats named
below (a playlist or a PostScript file never reaches a decoder), and raises ``BadData`` for whatever a decoder
cannot read. The same input gives the same output bytes: one encoder thread, no time stamps.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from sharding.errors import BadData
from sharding.fingerprint import Fingerprint, fingerprint

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_PIXELS = 178_956_970 // 2
MAX_WEBP_SIDE = 16_383
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class MediaInfo:
    """Pixels of one frame; number of frames (1 for an image); duration in seconds (0 for an image).

    ``animated``: of a source only, whether an image file holds more than one picture to be shown in turn.
    """

    width: int
    height: int
    frames: int = 1
    duration: float = 0.0
    animated: bool = False


@dataclass(frozen=True)
class Encoded:
    """What a shard stores of one image or clip; ``extension`` without the dot."""

    data: bytes
    extension: str
    info: MediaInfo
    fingerprint: Fingerprint | None = None


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever a decoder raises over untrusted bytes becomes ``BadData("decode-failed")``."""
    try:
        yield
    except (BadData, MemoryError, ImportError):
        raise
    except Image.DecompressionBombError as error:
        raise BadData("too-many-pixels", str(error)) from None
    except Exception as error:  # decoders raise nearly every type over broken bytes
        # Addresses of objects would make the records of two runs differ.
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")
        raise BadData("decode-failed", text) from error


# ---------------------------------------------------------------- images


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > max_pixels:
        raise BadData("too-many-pixels", f"{image.width}x{image.height} is more than {max_pixels} pixels")
    return image


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, alpha composited on white; 16-bit grey is scaled to 8 bits rather than clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float64)
        grey = grey / 257 if image.mode.startswith("I") and grey.max(initial=0) > 255 else grey
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if not _has_alpha(image):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


@decoding()
def probe_image(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """Size from the header alone, before any pixel is decoded (EXIF orientation not applied).

    Raises:
        BadData: not an image of a known format, or ``too-many-pixels``.
    """
    with _open_image(data, max_pixels) as image:
        # Pages of a TIFF are no animation.
        animated = image.format != "TIFF" and bool(getattr(image, "is_animated", False))
        return MediaInfo(width=image.width, height=image.height, animated=animated)


@decoding()
def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3]: EXIF orientation applied, alpha composited on white, first frame of an animation.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels`` (known from the header).
    """
    with _open_image(data, max_pixels) as image:
        return np.asarray(_on_white(ImageOps.exif_transpose(image)))


def encode_image(
    data: bytes,
    *,
    resize: int | None = None,
    image_format: Literal["webp", "jpg", "png"] = "webp",
    quality: int = 85,
    alpha: Literal["white", "keep"] = "white",
    max_pixels: int = MAX_PIXELS,
) -> Encoded:
    """The image as a shard stores it: whole image decoded (so that a broken one is found), oriented, shrunk.

    Args:
        resize: length in pixels of the shorter side; smaller images keep their size. ``None``: as it is.
        quality: 1-100, of JPEG and WebP.
        alpha: ``"keep"`` stores the alpha channel of images that have one (not with ``"jpg"``).

    Raises:
        BadData: as ``decode_image``.
    """
    with decoding():
        image = _prepared_image(data, resize, alpha, max_pixels)
    if image_format == "webp" and max(image.size) > MAX_WEBP_SIDE:
        raise BadData("too-many-pixels", f"{image.width}x{image.height} is more than WebP can hold")
    sink = io.BytesIO()
    if image_format == "webp":
        image.save(sink, "WEBP", quality=quality, method=4)
    elif image_format == "jpg":
        image.save(sink, "JPEG", quality=quality)
    else:
        image.save(sink, "PNG")
    info = MediaInfo(width=image.width, height=image.height)
    return Encoded(sink.getvalue(), image_format, info, fingerprint([image]))


def _prepared_image(data: bytes, resize: int | None, alpha: str, max_pixels: int) -> Image.Image:
    with _open_image(data, max_pixels) as opened:
        if resize is not None and opened.format == "JPEG":
            # Let the decoder shrink by 2, 4 or 8 first; twice the target leaves the resampling its detail.
            opened.draft(None, (2 * resize, 2 * resize))
        image = ImageOps.exif_transpose(opened)
        keep = alpha == "keep" and _has_alpha(image)
        image = image.convert("RGBA") if keep else _on_white(image)
        size = shrunk(image.width, image.height, resize)
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def shrunk(width: int, height: int, shorter: int | None) -> tuple[int, int]:
    """(width, height) with the shorter side brought down to ``shorter``; never enlarged."""
    short = min(width, height)
    if shorter is None or short <= shorter:
        return width, height
    return max(1, round(width * shorter / short)), max(1, round(height * shorter / short))


# ---------------------------------------------------------------- clips


def container_format(data: bytes) -> str:
    """The demuxer for these bytes, named from their first ones.

    Not left to FFmpeg's probing, which would also accept playlists, and those make it open other files and
    addresses.
    """
    head = data[:16]
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"GIF8":
        return "gif"
    if head[:4] == b"OggS":
        return "ogg"
    if head[:3] == b"FLV":
        return "flv"
    if head[:1] == b"G":
        return "mpegts"
    raise BadData(
        "decode-failed", "not a clip of a known container (mp4, webm, mkv, avi, ogg, flv, ts, gif, webp)"
    )


def is_animation(data: bytes) -> bool:
    return container_format(data) in ("webp", "gif")


def open_clip(data: bytes) -> InputContainer:
    import av

    return av.open(io.BytesIO(data), mode="r", format=container_format(data))


def video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    if not container.streams.video:
        raise BadData("decode-failed", "the file has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context.width * context.height > max_pixels:
        raise BadData("too-many-pixels", f"{context.width}x{context.height} is more than {max_pixels} pixels")
    # One thread: loader processes and tasks already fill the cores, and threaded decoders have dead-locked.
    context.thread_count = 1
    return stream


@dataclass(frozen=True)
class Packets:
    """Presentation times (in the stream's time base, sorted) of all frames and of the keyframes."""

    times: list[int]
    keys: list[int]

    @property
    def longest_gap(self) -> int:
        """Frames between two keyframes, at most."""
        if not self.keys or self.keys[0] != self.times[0]:
            return len(self.times)
        places = [*np.searchsorted(self.times, self.keys).tolist(), len(self.times)]
        return max(after - before for before, after in pairwise(places))


def clip_packets(container: InputContainer, stream: VideoStream) -> Packets:
    """Reads the clip's packets without decoding them, then rewinds. Only compressed bytes are touched."""
    times, keys = [], []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            raise BadData("decode-failed", "the clip has packets without a time")
        times.append(time)
        if packet.is_keyframe:
            keys.append(time)
    if not times:
        raise BadData("decode-failed", "the clip has no frames")
    container.seek(min(times), stream=stream, backward=True)
    return Packets(sorted(times), sorted(keys))


@decoding()
def probe_video(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """Size of a frame from the header (frames and duration stay 1 and 0: ``transcode_video`` counts them).

    Raises:
        BadData: not a clip of a known container, no video stream, or ``too-many-pixels``.
    """
    if is_animation(data):
        return probe_image(data, max_pixels)
    with open_clip(data) as container:
        context = video_stream(container, max_pixels).codec_context
        if not context.width or not context.height:
            raise BadData("decode-failed", "the clip's header gives no size")
        return MediaInfo(width=context.width, height=context.height)


def checked(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.is_corrupt:
        raise BadData("decode-failed", "a frame of the clip is corrupt")
    return frame


def upright(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], alpha composited on white, the rotation of the container applied."""
    if any(component.is_alpha for component in frame.format.components):
        rgb = np.asarray(_on_white(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # rotation is counter-clockwise, as numpy's
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def decode_video(
    data: bytes, frames: int, positions: Sequence[float] | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """``frames`` frames of a clip: uint8 [F, H, W, 3].

    The clip is cut into F equal segments and one frame is taken from each. A clip shorter than F frames
    repeats some. Only the stretches from a keyframe to a wanted frame are decoded::

        F=2, 8 frames:   0 1 2 3 | 4 5 6 7      the middles are frames 2 and 6

    Args:
        positions: where in each segment, F numbers in [0, 1); the middles (0.5) by default.

    Raises:
        BadData: ``decode-failed``, or ``too-many-pixels``.
        ValueError: ``positions`` has another length than ``frames``, or lies outside [0, 1).
    """
    places = np.full(frames, 0.5) if positions is None else np.asarray(positions, dtype=np.float64)
    if frames < 1 or places.shape != (frames,) or (places < 0).any() or (places >= 1).any():
        raise ValueError(f"positions must be {frames} numbers in [0, 1)")
    with decoding():
        if is_animation(data):
            return _animation_frames(data, places, max_pixels)
        with open_clip(data) as container:
            stream = video_stream(container, max_pixels)
            packets = clip_packets(container, stream)
            wanted = [packets.times[i] for i in _wanted(places, len(packets.times))]
            return np.stack(list(_frames_at(container, stream, packets, wanted)))


def _wanted(places: np.ndarray, total: int) -> list[int]:
    segments = (np.arange(len(places)) + places) / len(places)
    return np.minimum((segments * total).astype(np.int64), total - 1).tolist()


def _frames_at(
    container: InputContainer, stream: VideoStream, packets: Packets, wanted: list[int]
) -> Iterator[np.ndarray]:
    keys = np.asarray(packets.keys)
    decoder = container.decode(stream)
    time, array = None, np.empty(0)
    for target in wanted:
        if time is not None and time >= target:
            yield array
            continue
        before = keys[keys <= target]
        if len(before) and (time is None or before[-1] > time):
            container.seek(int(before[-1]), stream=stream, backward=True)
            decoder = container.decode(stream)
        frame = next((frame for frame in decoder if frame.pts is not None and frame.pts >= target), None)
        if frame is None:
            raise BadData("decode-failed", "the clip ends before its last frame")
        time, array = frame.pts, upright(checked(frame))
        yield array


def _animation_frames(data: bytes, places: np.ndarray, max_pixels: int) -> np.ndarray:
    wanted = _wanted(places, sum(1 for _ in animation(data, max_pixels)))
    shown = {i: image for i, (_, image) in enumerate(animation(data, max_pixels)) if i in wanted}
    return np.stack([shown[i] for i in wanted])


def animation(data: bytes, max_pixels: int) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds, uint8 [H, W, 3]) of each frame of an animated WebP or GIF."""
    milliseconds = 0.0
    with _open_image(data, max_pixels) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            yield milliseconds / 1000, np.asarray(_on_white(image))
            # Browsers show frames of 10 ms and less for 100 ms.
            shown = float(image.info.get("duration", 0) or 0)
            milliseconds += shown if shown > 10 else 100.0
