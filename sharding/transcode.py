"""Clips on their way into a shard: H.264 in mp4, cut to length, every frame near a keyframe."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np
from PIL import Image

from sharding.errors import BadData
from sharding.fingerprint import Fingerprint, Fingerprinter
from sharding.media import (
    MAX_PIXELS,
    Encoded,
    MediaInfo,
    animation,
    checked,
    clip_packets,
    container_format,
    decoding,
    is_animation,
    open_clip,
    shrunk,
    upright,
    video_stream,
)

# The times of an animation are known by decoding it only: these many frames tell its rate.
_FRAMES_MEASURED = 240


@dataclass(frozen=True)
class ClipLimits:
    """How a clip is stored: shorter side, frame rate, length (longer clips are cut), keyframes, bytes."""

    resize: int | None = None
    fps: float | None = None
    max_frames: int = 900
    max_duration_s: float = 60.0
    keyframe_interval: int = 8
    crf: int = 23
    max_bytes: int = 32 * 2**20
    max_pixels: int = MAX_PIXELS


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
            yield frame.time - start, upright(checked(frame))
        _complete(decoded, max(expected, stream.frames))


def _complete(decoded: int, expected: int) -> None:
    # Containers miscount by a frame or two (edit lists, trailing packets); a cut file misses far more.
    if decoded < expected - max(2, expected // 50):
        raise BadData("decode-failed", f"{decoded} of {expected} frames decode: the clip is cut or broken")


def _frame_rate(data: bytes, max_pixels: int) -> float:
    """Average frames per second."""
    if is_animation(data):
        times = [time for time, _ in islice(animation(data, max_pixels), _FRAMES_MEASURED)]
    else:
        with open_clip(data) as container:
            stream = video_stream(container, max_pixels)
            unit = float(stream.time_base or 1)
            times = [time * unit for time in clip_packets(container, stream).times]
    span = times[-1] - times[0]
    return min((len(times) - 1) / span, 240.0) if span > 0 else 1.0


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


def transcode_video(data: bytes, limits: ClipLimits) -> Encoded:
    """The clip as a shard stores it: H.264 in mp4, no sound, every frame decodable from a near keyframe.

    A clip that already fits is copied unchanged, after every frame has been decoded once.
    Frames are decoded and encoded one at a time, so memory does not grow with the clip.

    Raises:
        BadData: ``decode-failed``, ``too-many-pixels``, or ``clip-too-large`` (over ``limits.max_bytes``).
    """
    with decoding():
        fitting = _as_it_is(data, limits)
        if fitting is not None:
            return fitting
        rate = _frame_rate(data, limits.max_pixels)
    fps = Fraction(min(rate, limits.fps or rate)).limit_denominator(1001)
    limit = max(1, min(limits.max_frames, int(limits.max_duration_s * fps)))
    frames = _at_rate(_clip_frames(data, limits.max_pixels), rate, float(fps), limit)
    encoded, info, found = _encode_h264(frames, fps, limits)
    if len(encoded) > limits.max_bytes:
        raise BadData("clip-too-large", f"{len(encoded)} bytes, more than {limits.max_bytes}")
    return Encoded(encoded, "mp4", info, found)


def _encode_h264(
    frames: Iterator[np.ndarray], fps: Fraction, limits: ClipLimits
) -> tuple[bytes, MediaInfo, Fingerprint]:
    import av

    options = {
        "crf": str(limits.crf),
        "preset": "medium",
        "threads": "1",  # the bytes depend on the number of threads
        "bf": "0",  # no reordering: a frame needs only what lies between it and its keyframe
        "g": str(limits.keyframe_interval),
        "keyint_min": str(limits.keyframe_interval),
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
                size = shrunk(array.shape[1], array.shape[0], limits.resize)
                width, height = (max(2, side - side % 2) for side in size)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stored = _resized(array, width, height)
            taken.add(stored)
            picture = av.VideoFrame.from_ndarray(stored, format="rgb24")
            picture.pts = count
            picture.time_base = 1 / fps
            out.mux(stream.encode(picture))
            count += 1
        if count == 0:
            raise BadData("decode-failed", "the clip has no frames")
        out.mux(stream.encode(None))
    return sink.getvalue(), MediaInfo(width, height, count, float(count / fps)), taken.result()


def _resized(array: np.ndarray, width: int, height: int) -> np.ndarray:
    if array.shape[:2] == (height, width):
        return array
    return np.asarray(
        Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    )


def _as_it_is(data: bytes, limits: ClipLimits) -> Encoded | None:
    """The clip unchanged if it already fits (every frame is decoded to check it), else ``None``."""
    if container_format(data) != "mp4" or len(data) > limits.max_bytes:
        return None
    with open_clip(data) as container:
        stream = video_stream(container, limits.max_pixels)
        context = stream.codec_context
        side = min(context.width, context.height)
        if context.name != "h264" or context.pix_fmt != "yuv420p" or len(container.streams) > 1:
            return None
        if "mp4" not in container.format.name or (limits.resize is not None and side > limits.resize):
            return None
        packets = clip_packets(container, stream)
        unit = float(stream.time_base or 1)
        frames = len(packets.times)
        span = (packets.times[-1] - packets.times[0]) * unit
        fps = (frames - 1) / span if span > 0 else 1.0
        duration = frames / fps
        if frames > limits.max_frames or duration > limits.max_duration_s:
            return None
        if packets.longest_gap > limits.keyframe_interval or (
            limits.fps is not None and fps > limits.fps * 1.01
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
