"""Reading clips: which frames are shown, and when. Also animated WebP and GIF, which are clips of another make.

What a player shows is known for sure by decoding a clip from its beginning (``shown_frames``); that is how clips are
stored. Packets tell times and keyframes without decoding (``clip_packets``), and serve to jump to single frames where
the clock of a clip runs on; each frame that is found so must be the one of the wanted time, else the clip is decoded
from its beginning after all.

Times are those from the first frame that is shown. A clock that is set anew within a clip (recordings joined in one
file, a transport stream's counter that wraps) does not count: the next frame follows at the usual distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from sharding.errors import BadData
from sharding.media.colour import composited, eight_bits, to_srgb
from sharding.media.containers import (
    container_format,
    is_animation,
    open_clip,
    refuse_cut,
    refuse_unshown_edits,
    video_stream,
)
from sharding.media.gif import Gif
from sharding.media.images import probe_image
from sharding.media.info import MediaInfo
from sharding.media.picture import shown
from sharding.media.resizing import resized_pixels
from sharding.media.stills import open_image
from sharding.media.untrusted import MAX_PIXELS, decoding, refuse_large

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL import Image

# A frame that is shown for longer than this, in seconds, and far longer than usual, tells of a clock that was set. It
# takes less in containers that broadcasts and streams are recorded to (as much as in FFmpeg): they keep the sender's.
_CLOCK_OF_SENDER = {"mpegts": 10.0, "flv": 10.0, "ogg": 10.0}
_CLOCK_OF_FILE = 600.0
# Times of these say when a frame is decoded, and nothing says when it is shown, but its place among the others.
_DECODE_TIMES_ONLY = frozenset({"avi"})
# Seconds before a keyframe to which is jumped in search of it, one after another: some containers land behind it.
_EARLIER = (0, 1, 10)
_HELD = 4  # a frame shown so many times longer than usual is held, and tells nothing of the rate
_MAX_RATE = 240.0


@dataclass(frozen=True)
class Packets:
    """What the packets of a clip tell, without decoding.

    Args:
        times: presentation times of the frames, in the stream's time base, ascending.
        keys: those of the keyframes.
        seconds: when the frames are shown, from the first, ascending.
        rate: usual frames per second while the picture moves, at most 240.
        longest: seconds from one frame to the next, at most; more means that the clock was set.
        jumps: whether a frame can be looked up by its time.
        altered: whether players show other than lies in the file: frames are hidden, or the clock was set.
        leading: frames at the beginning that may not be decodable: they lack what they build on.
        start: presentation time of the first keyframe.
        pixel_ratio: width of a pixel over its height, where the file says so.
    """

    times: list[int]
    keys: list[int]
    seconds: list[float]
    rate: float
    longest: float
    jumps: bool
    altered: bool
    leading: int
    start: int
    pixel_ratio: Fraction | None

    @property
    def longest_gap(self) -> int:
        """Frames between two keyframes, at most."""
        if not self.keys or self.keys[0] != self.times[0]:
            return len(self.times)
        places = [*np.searchsorted(self.times, self.keys).tolist(), len(self.times)]
        return max(after - before for before, after in pairwise(places))

    @property
    def lasts(self) -> float:
        """Seconds, the last frame's included."""
        return self.seconds[-1] + 1 / self.rate


def clip_packets(container: InputContainer, kind: str, stream: VideoStream) -> Packets:
    """Reads the clip's packets. Only compressed bytes are touched; ``container`` is at its end afterwards.

    Args:
        kind: the ``container_format``.
    """
    base = stream.time_base or Fraction(1)
    unit = float(base)
    timed: list[tuple[int, int | None]] = []  # when a frame is shown and decoded, in the order of the packets
    keys: list[int] = []
    hidden, untimed, early = False, 0, 0
    start: int | None = None
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        time = packet.dts if kind in _DECODE_TIMES_ONLY else packet.pts
        if packet.is_discard:
            hidden = True
            continue
        if time is None:  # the second field of a frame, or a time to be guessed
            untimed += 1
            continue
        if packet.is_keyframe:
            keys.append(time)
            start = time if start is None else start
        early += start is None
        timed.append((time, packet.dts))
    if not timed:
        raise BadData("decode-failed", "its packets have no time" if untimed else "the clip has no frames")
    ordered = sorted(time for time, _ in timed)
    usual = _median([after - before for before, after in pairwise(ordered)])
    longest = max(_CLOCK_OF_SENDER.get(kind, _CLOCK_OF_FILE), _HELD * usual * unit)
    runs = _runs(timed)
    parts = [part for run in runs for part in _split(run, longest / unit)]
    rate = _rate([after - before for part in parts for before, after in pairwise(part)], base)
    seconds: list[float] = []
    for part in parts:
        begin = seconds[-1] + 1 / rate if seconds else 0.0
        seconds.extend(begin + (time - part[0]) * unit for time in part)
    times = [time for part in parts for time in part]
    start = parts[0][0] if start is None else start
    leading = max(early, sum(time < start for time in parts[0])) if keys else 0
    distinct = len(runs) == 1 and all(before < after for before, after in pairwise(times))
    jumps = distinct and not untimed and not leading and kind not in _DECODE_TIMES_ONLY
    altered = hidden or len(parts) > 1
    ratio = stream.sample_aspect_ratio
    return Packets(times, sorted(keys), seconds, rate, longest, jumps, altered, leading, start, ratio)


def _runs(timed: Sequence[tuple[int, int | None]]) -> list[list[int]]:
    """Times of the frames, ascending, of each run in which the clock goes forward.

    The times of decoding tell, which go up from packet to packet.
    """
    runs: list[list[int]] = [[]]
    before: int | None = None
    for time, order in timed:
        if order is not None:
            if before is not None and order < before:
                runs.append([])
            before = order
        runs[-1].append(time)
    return [sorted(run) for run in runs if run]


def _split(times: Sequence[int], longest: float) -> list[list[int]]:
    """Cut where the next is more than ``longest`` away."""
    parts = [[times[0]]]
    for before, after in pairwise(times):
        if after - before > longest:
            parts.append([])
        parts[-1].append(after)
    return parts


def _median(steps: Sequence[float]) -> float:
    """Of those that are above 0; 0 where there is none."""
    found = sorted(step for step in steps if step > 0)
    return found[(len(found) - 1) // 2] if found else 0.0


def _rate(steps: Sequence[float], unit: Fraction) -> float:
    """Frames per second of frames that follow each other after these steps of ``unit`` s; 1 where that is unknown.

    The mean, in which frames that are held (a slide, a gap of a recorder) do not count::

        0.04 0.04 0.04 3600 0.04     25
    """
    usual = _median(steps)
    moving = [step for step in steps if 0 < step <= _HELD * usual]
    if not moving:
        return 1.0
    return min(float(len(moving) / (Fraction(sum(moving)) * unit)), _MAX_RATE)


def usual_rate(times: Sequence[float]) -> float:
    """Frames per second, while the picture moves, of frames shown at these seconds (ascending)."""
    return _rate([after - before for before, after in pairwise(times)], Fraction(1))


def shown_frames(data: bytes, max_pixels: int) -> tuple[Packets, Iterator[tuple[float, av.VideoFrame]]]:
    """All frames of a clip as they are shown, decoded from its beginning: (seconds from the first, frame).

    Raises:
        BadData: there are no frames, or the header is broken; while the frames come: one is corrupt or has too many
            pixels, or fewer come than the packets promise.
    """
    kind = container_format(data)
    with open_clip(data) as container:
        stream = video_stream(container, max_pixels)
        refuse_cut(data, stream)
        refuse_unshown_edits(data, stream)
        packets = clip_packets(container, kind, stream)
    return packets, _decoded(data, kind, packets, max_pixels)


def _decoded(
    data: bytes, kind: str, packets: Packets, max_pixels: int
) -> Iterator[tuple[float, av.VideoFrame]]:
    with open_clip(data) as container:  # anew: not every container finds back to its beginning
        stream = video_stream(container, max_pixels)
        clock = _Clock(kind, packets, float(stream.time_base or 1))
        came, interlaced = 0, True
        for frame in container.decode(stream):
            if not came and frame.is_corrupt and frame.pts is not None and frame.pts < packets.start:
                continue  # it builds on a picture before the beginning; players leave it out
            refuse_large(frame.width, frame.height, max_pixels)
            yield clock.seconds(frame.pts), checked(frame)
            came += 1
            interlaced = interlaced and frame.interlaced_frame
    expected = len(packets.times) - packets.leading
    if came and interlaced and kind == "mpegts":
        expected //= 2  # a packet may hold one field
    # Containers miscount by a frame or two; a cut file misses far more.
    if came < expected - max(2, expected // 50) or not came:
        raise BadData("decode-failed", f"{came} of {expected} frames decode: the clip is cut or broken")


class _Clock:
    """Makes the time at which a frame is shown of what its packet says; see the head of this module."""

    def __init__(self, kind: str, packets: Packets, unit: float) -> None:
        self._places = iter(packets.times) if kind in _DECODE_TIMES_ONLY else None
        self._unit, self._step = unit, 1 / packets.rate
        self._longest = packets.longest
        self._last: float | None = None
        self._offset: float | None = None

    def seconds(self, pts: int | None) -> float:
        """When the next frame is shown, from the first; never earlier than the one before."""
        if self._places is not None:
            pts = next(self._places, None)
        time = self._step + (self._last or 0.0) if self._last is not None else 0.0
        if pts is not None:
            if self._offset is None:
                self._offset = time - pts * self._unit
            due = pts * self._unit + self._offset
            if self._last is None or self._last - 1e-6 <= due <= self._last + self._longest:
                time = due
            else:
                self._offset += time - due
        self._last = time if self._last is None else max(self._last, time)
        return self._last


def chosen_frames(
    data: bytes, max_pixels: int, choose: Callable[[Sequence[float], float], Sequence[int]]
) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of some frames of a clip, as ``picture.shown`` gives them; one is held at a time.

    Where the clip's clock runs on, only the stretches from a keyframe to a wanted frame are decoded.

    Args:
        choose: is given the times of all frames and the seconds that the clip lasts, and says which frames are
            wanted: their places, ascending, may repeat. It may be asked twice.

    Raises:
        BadData: ``decode-failed``, ``too-many-pixels`` or ``unsupported-colour``.
    """
    from av.error import FFmpegError

    kind, given = container_format(data), 0
    with open_clip(data) as container:
        stream = video_stream(container, max_pixels)
        refuse_cut(data, stream)
        refuse_unshown_edits(data, stream)
        packets = clip_packets(container, kind, stream)
        if packets.jumps:
            wanted = [packets.times[place] for place in choose(packets.seconds, packets.lasts)]
            try:
                for frame in _looked_up(container, stream, packets, wanted):
                    yield shown(frame, packets.pixel_ratio)
                    given += 1
                return
            except (BadData, FFmpegError):
                pass  # its times or keyframes are not what they seem; if the clip is broken, that is found below
    packets, frames = shown_frames(data, max_pixels)
    seconds = [time for time, _ in frames]
    places = list(choose(seconds, seconds[-1] + 1 / packets.rate))[given:]
    _, frames = shown_frames(data, max_pixels)
    for place, (_, frame) in enumerate(frames):
        if not places:
            return
        if place == places[0]:
            pixels = shown(frame, packets.pixel_ratio)
            while places and places[0] == place:
                del places[0]
                yield pixels


def _looked_up(
    container: InputContainer, stream: VideoStream, packets: Packets, wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """The frames of these times (of ``packets.times``, ascending, may repeat), by the nearest keyframes.

    Raises:
        BadData: a frame is corrupt, or there is none of exactly this time.
    """
    keys = np.asarray(packets.keys)
    frames: Iterator[av.VideoFrame] = iter(())
    found: av.VideoFrame | None = None
    for target in wanted:
        if found is None or found.pts != target:
            before = keys[keys <= target]
            key = int(before[-1]) if len(before) else None
            if found is None or found.pts is None or (key is not None and key > found.pts):
                frames = _decoded_from(container, stream, key, packets.times[0])
            found = next((frame for frame in frames if frame.pts is not None and frame.pts >= target), None)
            if found is None or found.pts != target:
                raise BadData("decode-failed", "the clip has no frame of a time that it lists")
            checked(found)
        yield found


def _decoded_from(
    container: InputContainer, stream: VideoStream, key: int | None, first: int
) -> Iterator[av.VideoFrame]:
    """The frames from this keyframe on; ``None``: from the one, hidden by an edit list, before the first frame.

    Raises:
        BadData: the container does not find it.
    """
    for seconds in _EARLIER:
        place = first if key is None else max(first, key - round(seconds / (stream.time_base or 1)))
        container.seek(place, stream=stream, backward=True)
        packets = container.demux(stream)
        for packet in packets:
            if key is None or (packet.is_keyframe and packet.pts == key):
                return chain.from_iterable(each.decode() for each in chain([packet], packets))
            if packet.dts is not None and packet.dts > key:
                break
    raise BadData("decode-failed", "the clip has no keyframe of a time that it lists")


@decoding()
def clip_info(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """Size of a frame as it is shown, and the clip's frames and seconds, counted in its packets; one is decoded.

    Raises:
        BadData: ``decode-failed`` (also where bytes are missing), ``too-many-pixels`` or ``unsupported-colour``.
    """
    if is_animation(data):
        return probe_video(data, max_pixels)
    packets, frames = shown_frames(data, max_pixels)
    for _, frame in frames:
        height, width = shown(frame, packets.pixel_ratio).shape[:2]
        return MediaInfo(width, height, len(packets.times), round(packets.lasts, 6))
    raise BadData("decode-failed", "the clip has no frames")


@decoding()
def probe_video(data: bytes, max_pixels: int = MAX_PIXELS) -> MediaInfo:
    """What the header says of a clip: size of a frame as it is stored, and the frames and seconds it claims to have.

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
        BadData: ``decode-failed``, ``too-many-pixels`` or ``unsupported-colour``.
        ValueError: ``positions`` has another length than ``frames``, or lies outside [0, 1).
    """
    places = np.full(frames, 0.5) if positions is None else np.asarray(positions, dtype=np.float64)
    if frames < 1 or places.shape != (frames,) or (places < 0).any() or (places >= 1).any():
        raise ValueError(f"positions must be {frames} numbers in [0, 1)")
    with decoding():
        if is_animation(data):
            return _animation_frames(data, places, max_pixels)
        taken = list(chosen_frames(data, max_pixels, lambda seconds, _: _wanted(places, len(seconds))))
        size = taken[0].shape[1::-1]  # a stream may change its size
        return np.stack([resized_pixels(pixels, size) for pixels in taken])


def _wanted(places: np.ndarray, total: int) -> list[int]:
    segments = (np.arange(len(places)) + places) / len(places)
    return np.minimum((segments * total).astype(np.int64), total - 1).tolist()


def _animation_frames(data: bytes, places: np.ndarray, max_pixels: int) -> np.ndarray:
    wanted = _wanted(places, sum(1 for _ in animation(data, max_pixels)))
    taken = {i: image for i, (_, image) in enumerate(animation(data, max_pixels)) if i in wanted}
    return np.stack([taken[i] for i in wanted])


def animation(data: bytes, max_pixels: int) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds, uint8 [H, W, 3]) of each frame of an animated WebP or GIF."""
    milliseconds = 0.0
    for picture, lasts in _pictures(data, max_pixels):
        yield milliseconds / 1000, np.asarray(composited(picture, "white"))
        # Browsers show frames of 10 ms and less for 100 ms.
        milliseconds += lasts if lasts > 10 else 100.0


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
