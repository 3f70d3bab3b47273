"""Clips as programs leave them, each frame of which tells its number; and which of them something shows."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

from sharding.errors import BadData
from sharding.media import decode_image
from sharding.media.config import FramesConfig, ImageConfig, VideoConfig
from sharding.media.frames import frames_of
from sharding.media.transcode import transcode_video

WIDTH, HEIGHT, FPS = 64, 48, 25
_STEP = 5  # grey levels between two frames
COUNT = 48  # frames that have levels of their own


def picture(number: int) -> npt.NDArray[np.uint8]:
    """uint8 [48, 64, 3] of frame ``number``."""
    return np.full((HEIGHT, WIDTH, 3), 8 + _STEP * (number % COUNT), np.uint8)


def number_of(pixels: npt.NDArray[np.uint8]) -> int:
    """The frame that these pixels show."""
    return round((float(pixels.mean()) - 8) / _STEP)


def clip(
    container: str = "mp4", numbers: Sequence[int] = range(COUNT), *, times: Sequence[int] | None = None,
    codec: str = "libx264", gop: int = 25, b_frames: int = 3, options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None, cover: bool = False, pixels: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> bytes:  # fmt: skip
    """A clip of these frames, shown at ``times`` / 25 seconds (one after the other by default).

    Args:
        cover: a JPEG is the first stream, marked as attached picture.
        pixels: of the frames, instead of those of ``picture``.
    """
    sink = io.BytesIO()
    shown = [picture(number) for number in numbers] if pixels is None else pixels
    chosen = {"g": str(gop), "bf": str(b_frames), "threads": "1"}
    if codec == "libx264":
        chosen |= {"keyint_min": str(gop), "sc_threshold": "0", "b_strategy": "0", "crf": "2"}
    with av.open(sink, "w", format=container, options=muxer or {}) as out:
        jpeg = _add_cover(out) if cover else None
        stream = out.add_stream(codec, rate=FPS, options=chosen | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *shown[0].shape[:2], "yuv420p"
        if jpeg is not None:
            out.mux(jpeg)
        for place, array in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = place if times is None else times[place], Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def _add_cover(out: av.container.OutputContainer) -> av.Packet:
    from av.stream import Disposition

    stream = out.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    stream.disposition = Disposition.attached_pic
    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
    frame.pts = 0
    return stream.encode(frame)[0]


def music_with_cover() -> bytes:
    """An mp4 of sound, whose only pictures are its cover."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        jpeg = _add_cover(out)
        sound = out.add_stream("aac", rate=48_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        silence.sample_rate = 48_000
        out.mux(jpeg)
        out.mux(sound.encode(silence))
        out.mux(sound.encode(None))
    return sink.getvalue()


def clip_shows(data: bytes, **config: object) -> list[int]:
    """The numbers of the frames of the stored clip, one after another; it is given at most 8 frames a second."""
    encoded = transcode_video(data, VideoConfig.model_validate({"fps": 8, "clip_s": 10, "crf": 1, **config}))
    return shows(encoded.data)


def shows(data: bytes) -> list[int]:
    """The numbers of all frames of a clip, decoded from its beginning."""
    with av.open(io.BytesIO(data)) as container:
        return [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def stills_show(data: bytes, every_s: float = 0.25, most: int = 8) -> list[int]:
    """The numbers of the frames that are taken from a clip as images."""
    config = ImageConfig(format="png", frames=FramesConfig(every_s=every_s, max=most))
    return [number_of(decode_image(image.data)) for image in frames_of(data, config)]


def causes(data: bytes) -> set[str]:
    """Why a clip, and stills of it, cannot be stored."""
    found = set()
    for function in (clip_shows, stills_show):
        try:
            function(data)
            found.add("kept")
        except BadData as error:
            found.add(error.cause)
    return found


# ---------------------------------------------------------------- boxes of mp4


def children(data: bytes) -> list[tuple[bytes, int, int]]:
    """(kind, begin, end) of the boxes of a payload."""
    boxes, begin = [], 0
    while begin + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, begin)
        boxes.append((kind, begin, begin + size))
        begin += size
    return boxes


def with_edits(data: bytes, edits: Sequence[tuple[int, int]], rate: int = 1) -> bytes:
    """The same mp4 (moov last), of which players show ``count`` frames from ``first`` on, for each (first, count).

    ``first`` -1: nothing is shown for the time of ``count`` frames. ``rate``: the speed of what is shown.
    """
    boxes = {kind: data[begin:end] for kind, begin, end in children(data)}
    moov = boxes[b"moov"][8:]
    timescales = [struct.unpack_from(">I", moov, moov.index(kind) + 4 + 12)[0] for kind in (b"mvhd", b"mdhd")]
    entries = b""
    for first, count in edits:
        begin = -1 if first < 0 else round(first * timescales[1] / FPS)
        entries += struct.pack(
            ">Iihh", round(count * timescales[0] / FPS), begin, 1 if first < 0 else rate, 0
        )
    elst = bytes(4) + struct.pack(">I", len(edits)) + entries
    edts = _box(b"edts", _box(b"elst", elst))
    inside = b""
    for kind, begin, end in children(moov):
        box = moov[begin:end]
        if kind == b"trak":
            track = box[8:]
            parts = [(kind, track[begin:end]) for kind, begin, end in children(track) if kind != b"edts"]
            box = _box(b"trak", b"".join(part + (edts if kind == b"tkhd" else b"") for kind, part in parts))
        inside += box
    whole = [
        data[begin:end] if kind != b"moov" else _box(b"moov", inside) for kind, begin, end in children(data)
    ]
    return b"".join(whole)


def _box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def moov_first(data: bytes) -> bytes:
    """The same mp4 with its index before its frames, as a server likes it."""
    boxes = {kind: data[begin:end] for kind, begin, end in children(data)}
    moov = bytearray(boxes[b"moov"])
    place = moov.index(b"stco") + 8
    (count,) = struct.unpack_from(">I", moov, place)
    for entry in range(place + 4, place + 4 + 4 * count, 4):
        struct.pack_into(">I", moov, entry, struct.unpack_from(">I", moov, entry)[0] + len(moov))
    return (
        boxes[b"ftyp"]
        + bytes(moov)
        + b"".join(boxes[kind] for kind in boxes if kind not in (b"ftyp", b"moov"))
    )


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The same mp4, with this matrix in its track's header."""
    place = data.index(b"tkhd") + 4 + 40
    return (
        data[:place]
        + struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        + data[place + 36 :]
    )
