"""Videos on their way into a shard: cut to clips, H.264 in mp4, every frame near a keyframe.

A video is decoded once, from its beginning, and its clips are encoded one after another as its frames come: memory
holds a frame or two and the clip that is being written, however long the video is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from sharding.errors import BadData
from sharding.fingerprint import Fingerprinter
from sharding.media.config import VideoConfig
from sharding.media.containers import container_format, is_animation, open_clip
from sharding.media.hdr import needs_mapping
from sharding.media.images import shrunk
from sharding.media.info import Encoded, MediaInfo
from sharding.media.picture import lies_upright, shown
from sharding.media.resizing import resized_pixels
from sharding.media.untrusted import decoding
from sharding.media.video import Packets, animation, shown_frames, usual_rate

if TYPE_CHECKING:
    import av

# The times of an animation are known by decoding it only: these many frames tell its rate.
_FRAMES_MEASURED = 240
# Of FFmpeg, and of ITU-T H.273 but for the range.
_BT709, _LIMITED = 1, 1


def transcode_video(data: bytes, config: VideoConfig) -> Encoded:
    """The first clip of a video, as a shard stores it.

    Raises:
        BadData: as ``cut_video``; or ``clip-too-large`` (over ``config.max_mb``).
    """
    first = next(cut_video(data, config))
    if isinstance(first, BadData):
        raise first
    return first


def cut_video(data: bytes, config: VideoConfig) -> Iterator[Encoded | BadData]:
    """The clips of a video in their order, each as a shard stores it, or why it cannot be.

    A clip is H.264 in mp4 without sound, every frame decodable from a near keyframe. A video that already is such
    a clip is given unchanged, after every frame was decoded once. With ``clips: all``::

        0         10        20        30  33.5 s      clip_s 10, min_clip_s 2: four clips, of 10, 10, 10, 3.5 s
        |----0----|----1----|----2----|-3-|           min_clip_s 5: three clips

    Yields:
        ``BadData("clip-too-large")`` for a clip over ``config.max_mb``; the others are not touched by it.

    Raises:
        BadData: ``decode-failed``, ``too-many-pixels`` or ``unsupported-colour``: the whole video is of no use, clips
            that came included.
    """
    with decoding():
        fitting = _as_it_is(data, config)
    if fitting is not None:
        yield fitting
        return
    with decoding():
        rate, source = _source(data, config)
    fps = _stored_rate(rate, config)
    length = max(1, min(config.max_frames, math.floor(config.clip_s * float(fps) + 1e-6)))
    clips = config.max_clips if config.clips == "all" else 1
    frames = _at_rate(_checked(source), rate, float(fps), clips * length)
    for number in range(clips):
        first = next(frames, None)
        if first is None:
            if number == 0:
                raise BadData("decode-failed", "the clip has no frames")
            return
        encoded = encode_h264(chain([first], islice(frames, length - 1)), fps, config)
        if number > 0 and encoded.info.duration < min(config.min_clip_s, float(length / fps)):
            return
        yield encoded if len(encoded.data) <= config.max_bytes else _too_large(encoded, config)


def _too_large(encoded: Encoded, config: VideoConfig) -> BadData:
    return BadData("clip-too-large", f"{len(encoded.data)} bytes, more than {config.max_bytes}")


def _stored_rate(rate: float, config: VideoConfig) -> Fraction:
    """Frames per second of the clips of a source of this rate; a frame lasts no longer than a clip may."""
    wanted = Fraction(min(rate, config.fps or rate)).limit_denominator(1001)
    least = Fraction(math.ceil(1001 / config.clip_s), 1001)
    return wanted if wanted * Fraction(config.clip_s) >= 1 else least


# A frame that is not made into a picture before it is known that the picture is wanted.
_Frame = Callable[[], np.ndarray]


def _checked(frames: Iterator[tuple[float, _Frame]]) -> Iterator[tuple[float, _Frame]]:
    while True:
        with decoding():  # errors of the encoder, which consumes this, are not the clip's fault and pass by
            item = next(frames, None)
        if item is None:
            return
        yield item


def _source(data: bytes, config: VideoConfig) -> tuple[float, Iterator[tuple[float, _Frame]]]:
    """Usual frames per second, and every frame with its time in seconds from the first, in the order of times."""
    if is_animation(data):
        times = [time for time, _ in islice(animation(data, config.max_pixels), _FRAMES_MEASURED)]
        pictures = animation(data, config.max_pixels)
        return usual_rate(times), ((time, partial(_itself, picture)) for time, picture in pictures)
    packets, frames = shown_frames(data, config.max_pixels)
    return packets.rate, ((time, partial(_picture, frame, packets, config.resize)) for time, frame in frames)


def _itself(picture: np.ndarray) -> np.ndarray:
    return picture


def _picture(frame: av.VideoFrame, packets: Packets, shorter: int | None) -> np.ndarray:
    with decoding():
        return shown(frame, packets.pixel_ratio, shorter)


def _at_rate(
    frames: Iterator[tuple[float, _Frame]], rate: float, fps: float, limit: int
) -> Iterator[np.ndarray]:
    """At most ``limit`` frames at a constant ``fps``; ``rate`` is the source's.

    Slot k shows the last frame of the source that began by k/fps::

        source    0  1  2  3  4  5  6  7     8 frames at rate 4, thinned to fps 2
        slots     0     1     2     3        shows 0 2 4 6
    """
    held: _Frame | None = None
    picture: np.ndarray | None = None
    slot, end = 0, 0.0
    for time, frame in frames:
        # A tenth of a slot forgives containers that round their times.
        due = math.ceil(time * fps - 0.1)
        while held is not None and slot < due:
            if slot >= limit:
                return
            picture = held() if picture is None else picture
            yield picture
            slot += 1
        held, picture, end = frame, None, time + 1 / rate
    while held is not None and slot < min(limit, max(1, round(end * fps))):
        picture = held() if picture is None else picture
        yield picture
        slot += 1


def encode_h264(frames: Iterator[np.ndarray], fps: Fraction, config: VideoConfig) -> Encoded:
    """The clip of these frames (uint8 [H, W, 3], at least one, of one size) as a shard stores clips."""
    import av

    options = {
        "crf": str(config.crf),
        "preset": "medium",
        "threads": "1",  # the bytes depend on the number of threads
        "bf": "0",  # no reordering: a frame needs only what lies between it and its keyframe
        "g": str(config.keyframe_interval),
        "keyint_min": str(config.keyframe_interval),
        "sc_threshold": "0",
        "mbtree": "0",  # x264's vectorised macroblock tree reads stale memory: other bytes at each run
    }
    sink = io.BytesIO()
    taken = Fingerprinter()
    count, width, height = 0, 0, 0
    with av.open(sink, mode="w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("libx264", rate=fps, options=options)
        for array in frames:
            if count == 0:
                size = shrunk(array.shape[1], array.shape[0], config.resize)
                width, height = (max(2, side - side % 2) for side in size)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                # Said in the file, since players guess by the size where it is not.
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = _BT709
                context.color_range = _LIMITED
            rgb = resized_pixels(array, (width, height))
            taken.add(rgb)
            picture = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1
            )
            picture.pts = count
            picture.time_base = 1 / fps
            out.mux(stream.encode(picture))
            count += 1
        out.mux(stream.encode(None))
    info = MediaInfo(width, height, count, float(count / fps))
    return Encoded(sink.getvalue(), "mp4", info, taken.result())


def _as_it_is(data: bytes, config: VideoConfig) -> Encoded | None:
    """The clip unchanged if it already fits (every frame is decoded to check it), else ``None``.

    It fits if every reader shows the same of it as a player: nothing is hidden by an edit list, its frames follow
    each other at one rate and lie upright, and their colours are those of SDR.
    """
    if container_format(data) != "mp4" or len(data) > config.max_bytes:
        return None
    with open_clip(data) as container:
        if len(container.streams) > 1 or not container.streams.video:
            return None
        context = container.streams.video[0].codec_context
        claimed = container.streams.video[0].frames
        if context is None or context.name != "h264" or context.pix_fmt != "yuv420p":
            return None
        if config.resize is not None and min(context.width, context.height) > config.resize:
            return None
        size = (context.width, context.height)
    packets, frames = shown_frames(data, config.max_pixels)
    count, duration = len(packets.times), len(packets.times) / packets.rate
    if packets.altered or not packets.jumps or claimed not in (0, count) or not _even(packets):
        return None
    if count > config.max_frames or duration > config.clip_s or packets.pixel_ratio not in (None, 0, 1):
        return None
    if packets.longest_gap > config.keyframe_interval or (
        config.fps is not None and packets.rate > config.fps * 1.01
    ):
        return None
    taken = Fingerprinter()
    for _, frame in frames:
        if not lies_upright(frame) or needs_mapping(frame.color_trc, frame.color_primaries):
            return None
        taken.add(shown(frame, None))
    return Encoded(data, "mp4", MediaInfo(*size, count, duration), taken.result())


def _even(packets: Packets) -> bool:
    """Whether every frame is shown within half a step of its place at the clip's rate."""
    return all(abs(time * packets.rate - place) < 0.5 for place, time in enumerate(packets.seconds))
