"""Images taken from clips: one from the middle of each of N equal stretches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from PIL import Image

from sharding.errors import BadData
from sharding.media.config import FramesConfig, ImageConfig
from sharding.media.images import resized, shrunk, store_image
from sharding.media.info import Encoded
from sharding.media.untrusted import decoding
from sharding.media.video import animation, chosen_frames, is_animation, usual_rate


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

    One frame is held at a time.

    Raises:
        BadData: ``decode-failed``, ``too-many-pixels`` or ``unsupported-colour``: the whole video is of no use.
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
    for pixels in chosen_frames(data, max_pixels, lambda seconds, lasts: _shown_at(seconds, lasts, config)):
        yield Image.fromarray(pixels)


def _animated(data: bytes, config: FramesConfig, max_pixels: int) -> Iterator[Image.Image]:
    seconds = [time for time, _ in animation(data, max_pixels)]
    if not seconds:
        raise BadData("decode-failed", "the clip has no frames")
    wanted = _shown_at(seconds, seconds[-1] + 1 / usual_rate(seconds), config)
    for place, (_, array) in enumerate(animation(data, max_pixels)):
        for _ in range(wanted.count(place)):
            yield Image.fromarray(array)


def _shown_at(seconds: Sequence[float], lasts: float, config: FramesConfig) -> list[int]:
    """Which frames, of these times from the first, are on the screen at the wanted moments."""
    # A microsecond forgives sums of times.
    return [max(0, bisect_right(seconds, time + 1e-6) - 1) for time in middles(lasts, config)]
