"""Images taken from clips: one from the middle of each of N equal stretches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from PIL import Image

from sharding.errors import BadData
from sharding.media.config import FramesConfig, ImageConfig
from sharding.media.images import resized, shrunk, store_image
from sharding.media.info import Encoded
from sharding.media.resizing import resized_pixels
from sharding.media.untrusted import decoding
from sharding.media.video import (
    animation,
    clip_packets,
    frames_at,
    is_animation,
    mean_rate,
    open_clip,
    pixel_ratio,
    quarter_turns,
    square_size,
    upright,
    video_stream,
)


def middles(seconds: float, config: FramesConfig) -> list[float]:
    """The times, in seconds from the first frame, of the images of a clip that lasts ``seconds``.

    ::

        every_s 2, 7 s    |---x---|---x---|---x---|      at 1.17, 3.5 and 5.83 s
    """
    # A thousandth forgives containers that round their times.
    count = min(config.max, max(1, int(seconds / config.every_s + 1e-3)))
    return [(number + 0.5) * seconds / count for number in range(count)]


def frames_of(data: bytes, config: ImageConfig) -> Iterator[Encoded]:
    """Images of a video, in their order, each as a shard stores it; shown are the frames of ``middles``.

    Only the stretches from a keyframe to a wanted frame are decoded, and one frame is held at a time.

    Raises:
        BadData: ``decode-failed`` or ``too-many-pixels``: the whole video is of no use.
    """
    assert config.frames is not None
    assert config.format != "keep"  # refused by the configuration
    images = _images(data, config.frames, config.max_pixels)
    while True:
        with decoding():  # errors of the encoder are not the video's fault and pass by
            image = next(images, None)
        if image is None:
            return
        size = shrunk(image.width, image.height, config.resize)
        yield store_image(resized(image, size), config.format, config)


def _images(data: bytes, config: FramesConfig, max_pixels: int) -> Iterator[Image.Image]:
    if is_animation(data):
        yield from _animated(data, config, max_pixels)
        return
    with open_clip(data) as container:
        stream = video_stream(container, max_pixels)
        packets = clip_packets(container, stream)
        unit = float(stream.time_base or 1)
        seconds = [(time - packets.times[0]) * unit for time in packets.times]
        wanted = [packets.times[place] for place in _shown_at(seconds, config)]
        for frame in frames_at(container, stream, packets, wanted):
            pixels = upright(frame)
            size = square_size(pixels.shape[1::-1], pixel_ratio(stream, quarter_turns(frame)))
            yield Image.fromarray(resized_pixels(pixels, size))


def _animated(data: bytes, config: FramesConfig, max_pixels: int) -> Iterator[Image.Image]:
    seconds = [time for time, _ in animation(data, max_pixels)]
    if not seconds:
        raise BadData("decode-failed", "the clip has no frames")
    wanted = _shown_at(seconds, config)
    for place, (_, array) in enumerate(animation(data, max_pixels)):
        for _ in range(wanted.count(place)):
            yield Image.fromarray(array)


def _shown_at(seconds: list[float], config: FramesConfig) -> list[int]:
    """Which frames, of these times from the first, are on the screen at the wanted moments."""
    lasts = seconds[-1] + 1 / mean_rate(seconds)
    return [max(0, bisect_right(seconds, time) - 1) for time in middles(lasts, config)]
