"""Reading clips: containers, packets, frames. Also animated WebP and GIF, which are clips of another make."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sharding.errors import BadData
from sharding.media.colour import composited, eight_bits, to_srgb
from sharding.media.gif import Gif
from sharding.media.images import probe_image
from sharding.media.info import MediaInfo
from sharding.media.stills import open_image
from sharding.media.untrusted import MAX_PIXELS, decoding, refuse_large

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream


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
    refuse_large(context.width, context.height, max_pixels)
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


def mean_rate(times: Sequence[float]) -> float:
    """Frames per second of frames shown at these seconds (ascending); 1 where that is unknown, 240 at most."""
    span = times[-1] - times[0]
    return min((len(times) - 1) / span, 240.0) if span > 0 else 1.0


@decoding()
def probe_video(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """What the header says of a clip: size of an upright frame, and the frames and seconds that it claims to have.

    Nothing is decoded or counted, so a broken file may claim anything; ``transcode`` counts. Frames are 1 and the
    duration 0 where the header does not tell (an animation's duration is the sum of its frames').

    Raises:
        BadData: not a clip of a known container, no video stream, or ``too-many-pixels``.
    """
    if is_animation(data):
        return probe_image(data, max_pixels)
    with open_clip(data) as container:
        stream = video_stream(container, max_pixels)
        context = stream.codec_context
        if not context.width or not context.height:
            raise BadData("decode-failed", "the clip's header gives no size")
        seconds = 0.0
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1_000_000
        frames = stream.frames or round(seconds * float(stream.average_rate or 0))
        return MediaInfo(context.width, context.height, max(1, frames), max(0.0, seconds))


def checked(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.is_corrupt:
        raise BadData("decode-failed", "a frame of the clip is corrupt")
    return frame


def upright(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], alpha composited on white, the rotation of the container applied."""
    if any(component.is_alpha for component in frame.format.components):
        rgb = np.asarray(composited(Image.fromarray(frame.to_ndarray(format="rgba")), "white"))
    else:
        rgb = frame.to_ndarray(format="rgb24")
    turns = quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise, as numpy's, that make the frame upright."""
    return round(frame.rotation / 90) % 4


def square_size(size: tuple[int, int], ratio: Fraction) -> tuple[int, int]:
    """(width, height) at which a frame of pixels ``ratio`` times as wide as high looks right on square ones."""
    return max(1, round(size[0] * ratio)), size[1]


def pixel_ratio(stream: VideoStream, turns: int) -> Fraction:
    """Width of a pixel over its height, after ``turns`` quarter turns; 1 where the file does not say."""
    ratio = stream.sample_aspect_ratio
    if not ratio or not Fraction(1, 10) < ratio < 10:
        return Fraction(1)
    return 1 / ratio if turns % 2 else ratio


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
            return np.stack([upright(frame) for frame in frames_at(container, stream, packets, wanted)])


def _wanted(places: np.ndarray, total: int) -> list[int]:
    segments = (np.arange(len(places)) + places) / len(places)
    return np.minimum((segments * total).astype(np.int64), total - 1).tolist()


def frames_at(
    container: InputContainer, stream: VideoStream, packets: Packets, wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """The frames of these times (of ``packets.times``, ascending, may repeat), by the nearest keyframes.

    Raises:
        BadData: a frame is corrupt or missing.
    """
    keys = np.asarray(packets.keys)
    decoder = container.decode(stream)
    found: av.VideoFrame | None = None
    for target in wanted:
        if found is not None and found.pts >= target:
            yield found
            continue
        before = keys[keys <= target]
        if len(before) and (found is None or before[-1] > found.pts):
            container.seek(int(before[-1]), stream=stream, backward=True)
            decoder = container.decode(stream)
        found = next((frame for frame in decoder if frame.pts is not None and frame.pts >= target), None)
        if found is None:
            raise BadData("decode-failed", "the clip ends before its last frame")
        yield checked(found)


def _animation_frames(data: bytes, places: np.ndarray, max_pixels: int) -> np.ndarray:
    wanted = _wanted(places, sum(1 for _ in animation(data, max_pixels)))
    shown = {i: image for i, (_, image) in enumerate(animation(data, max_pixels)) if i in wanted}
    return np.stack([shown[i] for i in wanted])


def animation(data: bytes, max_pixels: int) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds, uint8 [H, W, 3]) of each frame of an animated WebP or GIF."""
    milliseconds = 0.0
    for picture, shown in _pictures(data, max_pixels):
        yield milliseconds / 1000, np.asarray(composited(picture, "white"))
        # Browsers show frames of 10 ms and less for 100 ms.
        milliseconds += shown if shown > 10 else 100.0


def _pictures(data: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, float]]:
    """(RGB or RGBA, milliseconds as the file has them) of each frame."""
    if container_format(data) == "gif":
        yield from Gif(data, max_pixels).shown()
        return
    with open_image(data, max_pixels) as image:
        profile = image.info.get("icc_profile")
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()  # which knows how long it is shown
            yield to_srgb(eight_bits(image), profile), float(image.info.get("duration", 0) or 0)
