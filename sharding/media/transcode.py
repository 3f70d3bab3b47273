"""Videos on their way into a shard: cut to clips, H.264 in mp4, every frame near a keyframe.

A video is decoded once, from its beginning, and its clips are encoded one after another as its frames come: memory
holds a frame or two and the clip that is being written, however long the video is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice

import numpy as np

from sharding.errors import BadData
from sharding.fingerprint import Fingerprinter
from sharding.media.config import VideoConfig
from sharding.media.images import shrunk
from sharding.media.info import Encoded, MediaInfo
from sharding.media.resizing import resized_pixels
from sharding.media.untrusted import decoding
from sharding.media.video import (
    animation,
    checked,
    clip_packets,
    container_format,
    is_animation,
    mean_rate,
    open_clip,
    pixel_ratio,
    quarter_turns,
    square_size,
    upright,
    video_stream,
)

# The times of an animation are known by decoding it only: these many frames tell its rate.
_FRAMES_MEASURED = 240


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
        BadData: ``decode-failed`` or ``too-many-pixels``: the whole video is of no use, clips that came included.
    """
    with decoding():
        fitting = _as_it_is(data, config)
        rate = 0.0 if fitting is not None else _frame_rate(data, config.max_pixels)
    if fitting is not None:
        yield fitting
        return
    fps = Fraction(min(rate, config.fps or rate)).limit_denominator(1001)
    length = max(1, min(config.max_frames, math.floor(config.clip_s * float(fps) + 1e-6)))
    clips = config.max_clips if config.clips == "all" else 1
    frames = _at_rate(_clip_frames(data, config.max_pixels), rate, float(fps), clips * length)
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


def _clip_frames(data: bytes, max_pixels: int) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds from the first frame, uint8 [H, W, 3]) of every frame, decoded one after another."""
    with decoding():  # errors of the encoder, which consumes this, are not the clip's fault and pass by
        yield from _decoded(data, max_pixels)


def _decoded(data: bytes, max_pixels: int) -> Iterator[tuple[float, np.ndarray]]:
    if is_animation(data):
        yield from animation(data, max_pixels)
        return
    with open_clip(data) as container:
        stream = video_stream(container, max_pixels)
        expected = len(clip_packets(container, stream).times)
        start, decoded = None, 0
        for frame in container.decode(stream):
            if frame.time is None:
                raise BadData("decode-failed", "the clip has frames without a time")
            start = frame.time if start is None else start
            decoded += 1
            array = upright(checked(frame))
            size = square_size(array.shape[1::-1], pixel_ratio(stream, quarter_turns(frame)))
            yield frame.time - start, resized_pixels(array, size)
        _complete(decoded, max(expected, stream.frames))


def _complete(decoded: int, expected: int) -> None:
    # Containers miscount by a frame or two (edit lists, trailing packets); a cut file misses far more.
    if decoded < expected - max(2, expected // 50):
        raise BadData("decode-failed", f"{decoded} of {expected} frames decode: the clip is cut or broken")


def _frame_rate(data: bytes, max_pixels: int) -> float:
    """Average frames per second."""
    if is_animation(data):
        times = [time for time, _ in islice(animation(data, max_pixels), _FRAMES_MEASURED)]
        return mean_rate(times)
    with open_clip(data) as container:
        stream = video_stream(container, max_pixels)
        unit = float(stream.time_base or 1)
        return mean_rate([time * unit for time in clip_packets(container, stream).times])


def _at_rate(
    frames: Iterator[tuple[float, np.ndarray]], rate: float, fps: float, limit: int
) -> Iterator[np.ndarray]:
    """At most ``limit`` frames at a constant ``fps``; ``rate`` is the source's.

    Slot k shows the last frame of the source that began by k/fps::

        source    0  1  2  3  4  5  6  7     8 frames at rate 4, thinned to fps 2
        slots     0     1     2     3        shows 0 2 4 6
    """
    held, slot, end = None, 0, 0.0
    for time, frame in frames:
        # A tenth of a slot forgives containers that round their times.
        due = math.ceil(time * fps - 0.1)
        while held is not None and slot < due:
            if slot >= limit:
                return
            yield held
            slot += 1
        held, end = frame, time + 1 / rate
    while held is not None and slot < min(limit, max(1, round(end * fps))):
        yield held
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
            rgb = resized_pixels(array, (width, height))
            taken.add(rgb)
            picture = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            picture.pts = count
            picture.time_base = 1 / fps
            out.mux(stream.encode(picture))
            count += 1
        out.mux(stream.encode(None))
    info = MediaInfo(width, height, count, float(count / fps))
    return Encoded(sink.getvalue(), "mp4", info, taken.result())


def _as_it_is(data: bytes, config: VideoConfig) -> Encoded | None:
    """The clip unchanged if it already fits (every frame is decoded to check it), else ``None``."""
    if container_format(data) != "mp4" or len(data) > config.max_bytes:
        return None
    with open_clip(data) as container:
        stream = video_stream(container, config.max_pixels)
        context = stream.codec_context
        side = min(context.width, context.height)
        if context.name != "h264" or context.pix_fmt != "yuv420p" or len(container.streams) > 1:
            return None
        if "mp4" not in container.format.name or (config.resize is not None and side > config.resize):
            return None
        packets = clip_packets(container, stream)
        unit = float(stream.time_base or 1)
        frames = len(packets.times)
        span = (packets.times[-1] - packets.times[0]) * unit
        fps = (frames - 1) / span if span > 0 else 1.0
        duration = frames / fps
        if frames > config.max_frames or duration > config.clip_s or pixel_ratio(stream, 0) != 1:
            return None
        if packets.longest_gap > config.keyframe_interval or (
            config.fps is not None and fps > config.fps * 1.01
        ):
            return None
        decoded = 0
        taken = Fingerprinter()
        for frame in container.decode(stream):
            if checked(frame).rotation:
                return None
            taken.add(upright(frame))
            decoded += 1
        _complete(decoded, max(frames, stream.frames))
        info = MediaInfo(context.width, context.height, frames, duration)
        return Encoded(data, "mp4", info, taken.result())
