"""Promises about videos: cut where the configuration says, upright, in the right colours, and in little memory."""

from __future__ import annotations

import io
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sharding.errors import BadData
from sharding.media import Encoded, decode_image, decode_video, probe_video
from sharding.media.config import FramesConfig, ImageConfig, VideoConfig
from sharding.media.frames import frames_of, middles
from sharding.media.transcode import cut_video, transcode_video


def _level(number: int) -> int:
    """The grey of frame ``number``: distinct for 24 frames, then again."""
    return 10 + number % 24 * 10


def _clip(
    frames=24, size=(48, 40), fps: int | Fraction = 24, container="mp4", turn: int = 0, ratio: Fraction | None = None,
    picture=None, times=None, gop=12, **context,
) -> bytes:  # fmt: skip
    """H.264 whose frame n is a plain grey of ``_level(n)``, or ``picture``."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream("libx264", rate=fps, options={"g": str(gop), "threads": "1", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            array = np.full((size[1], size[0], 3), _level(number), np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            if "colorspace" in context:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts = number if times is None else times[number]
            frame.time_base = 1 / Fraction(fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def _frames(data: bytes) -> list[int]:
    """Which frames of ``_clip`` a stored clip shows (modulo 24)."""
    with av.open(io.BytesIO(data)) as container:
        greys = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    return [round((grey - 10) / 10) for grey in greys]


def _cut(data: bytes, **config) -> list[Encoded]:
    clips = list(cut_video(data, VideoConfig(clips="all", **config)))
    assert all(isinstance(clip, Encoded) for clip in clips)
    return clips


def test_a_long_video_gives_clips_that_together_show_each_frame_once():
    clips = _cut(_clip(frames=60), clip_s=1, min_clip_s=0.1)
    assert [clip.info.frames for clip in clips] == [24, 24, 12]
    assert [clip.info.duration for clip in clips] == pytest.approx([1, 1, 0.5])
    assert [number for clip in clips for number in _frames(clip.data)] == [
        number % 24 for number in range(60)
    ]


def test_every_clip_begins_with_a_keyframe_and_has_near_ones():
    for clip in _cut(_clip(frames=48, gop=48), clip_s=1, keyframe_interval=6):
        with av.open(io.BytesIO(clip.data)) as container:
            keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
        assert [number for number, key in enumerate(keys) if key] == [0, 6, 12, 18]
        assert len(decode_video(clip.data, 4)) == 4


def test_a_rest_shorter_than_wanted_is_left_out_unless_it_is_all_there_is():
    assert len(_cut(_clip(frames=60), clip_s=1, min_clip_s=0.6)) == 2
    assert len(_cut(_clip(frames=60), clip_s=1, min_clip_s=0.5)) == 3
    assert [clip.info.frames for clip in _cut(_clip(frames=6), fps=12, clip_s=1, min_clip_s=0.9)] == [3]
    assert len(_cut(_clip(frames=48), clip_s=0.5, min_clip_s=5)) == 4


def test_the_first_clip_alone_is_the_first_of_all():
    data = _clip(frames=60)
    first = list(cut_video(data, VideoConfig(clip_s=1)))
    assert first == _cut(data, clip_s=1)[:1]
    assert first == [transcode_video(data, VideoConfig(clip_s=1))]


def test_clips_are_bounded_in_number_frames_and_bytes():
    data = _clip(frames=60)
    assert len(_cut(data, clip_s=0.25, min_clip_s=0, max_clips=3)) == 3
    assert [clip.info.frames for clip in _cut(data, max_frames=25, min_clip_s=0)] == [25, 25, 10]
    small = list(cut_video(data, VideoConfig(clips="all", clip_s=1, max_mb=0.0001)))
    assert [fault.cause for fault in small if isinstance(fault, BadData)] == ["clip-too-large"] * 2


def test_a_video_that_breaks_off_is_of_no_use_even_if_some_clips_came():
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    data = bytearray(_clip(frames=72, picture=noise))
    middle = len(data) * 2 // 3
    data[middle : middle + 3000] = bytes(3000)
    clips = cut_video(bytes(data), VideoConfig(clips="all", clip_s=0.5, resize=20))
    assert isinstance(next(clips), Encoded)
    with pytest.raises(BadData, match="decode-failed"):
        list(clips)


def test_cutting_again_gives_the_same_bytes():
    data = _clip(frames=60, size=(60, 44))
    assert len({tuple(_cut(data, clip_s=1, resize=32, fps=12)) for _ in range(3)}) == 1


def test_memory_does_not_grow_with_the_video():
    peaks = []
    for frames in (24, 240):
        data = _clip(frames=frames, size=(320, 240))
        tracemalloc.start()
        for clip in cut_video(data, VideoConfig(clips="all", clip_s=0.5, resize=64)):
            assert isinstance(clip, Encoded)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2 * 320 * 240 * 3


@pytest.mark.parametrize(("turn", "size"), [(90, (40, 48)), (-90, (40, 48)), (180, (48, 40)), (0, (48, 40))])
def test_the_rotation_of_the_container_is_applied(turn, size):
    picture = np.zeros((40, 48, 3), np.uint8)
    picture[:12, :12] = 255
    data = _clip(picture=picture, turn=turn)
    with av.open(io.BytesIO(data)) as container:
        assert next(container.decode(video=0)).rotation % 360 == turn % 360
    clip = transcode_video(data, VideoConfig(fps=12))
    assert (clip.info.width, clip.info.height) == size
    (image,) = frames_of(data, ImageConfig(format="png", frames=FramesConfig()))
    expected = np.rot90(picture, turn // 90)
    for shown in (decode_video(clip.data, 1)[0], decode_image(image.data), decode_video(data, 1)[0]):
        assert np.abs(shown.astype(int) - expected).mean() < 8


def test_pixels_that_are_not_square_are_made_so():
    data = _clip(size=(48, 40), ratio=Fraction(2, 1))
    clip = transcode_video(data, VideoConfig())
    assert (clip.info.width, clip.info.height) == (96, 40)
    (image,) = frames_of(data, ImageConfig(frames=FramesConfig()))
    assert (image.info.width, image.info.height) == (96, 40)


def test_colours_come_through_whatever_matrix_the_source_was_coded_with():
    colour = np.array([200, 60, 30], np.uint8)
    picture = np.broadcast_to(colour, (40, 48, 3)).copy()
    for options in ({}, {"colorspace": 1}):
        data = _clip(picture=picture, **options)
        clip = transcode_video(data, VideoConfig(resize=20, crf=5))
        assert np.abs(decode_video(clip.data, 1)[0, 10, 10].astype(int) - colour).max() <= 6


def test_frames_of_uneven_times_are_shown_when_they_are_due():
    data = _clip(frames=6, fps=10, times=[0, 1, 2, 12, 13, 14])
    clip = transcode_video(data, VideoConfig(resize=20))
    assert _frames(clip.data) == [0, 1, *[2] * 10, 3, 4, 5]
    assert clip.info.duration == pytest.approx(1.5)


def test_the_header_tells_frames_and_seconds():
    for container in ("mp4", "matroska"):
        info = probe_video(_clip(frames=48, container=container))
        assert (info.width, info.height, info.frames) == (48, 40, 48)
        assert info.duration == pytest.approx(2, abs=0.1)


# ---------------------------------------------------------------- frames


def test_frames_lie_in_the_middles_of_equal_stretches():
    assert middles(7, FramesConfig(every_s=2)) == pytest.approx([7 / 6, 3.5, 35 / 6])
    assert middles(120, FramesConfig(every_s=2, max=4)) == [15, 45, 75, 105]
    assert middles(0.1, FramesConfig(every_s=2)) == [0.05]
    assert middles(4, FramesConfig(every_s=2)) == [1, 3]


def test_extracted_frames_are_those_on_the_screen_at_these_times():
    data = _clip(frames=24, fps=4)  # 6 s
    config = ImageConfig(resize=20, format="png", frames=FramesConfig(every_s=2))
    images = list(frames_of(data, config))
    assert [round((decode_image(image.data).mean() - 10) / 10) for image in images] == [4, 12, 20]
    assert {(image.extension, image.info.width, image.info.height) for image in images} == {("png", 24, 20)}
    assert list(frames_of(data, config)) == images


def test_frames_of_animations_are_taken_too():
    pictures = [Image.new("RGB", (30, 20), (_level(number),) * 3) for number in range(20)]
    sink = io.BytesIO()
    pictures[0].save(sink, "WEBP", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    images = list(frames_of(sink.getvalue(), ImageConfig(format="png", frames=FramesConfig(every_s=1))))
    assert [round((decode_image(image.data).mean() - 10) / 10) for image in images] == [5, 15]


def test_frames_of_a_cut_video_are_bad_data():
    data = _clip(frames=48)
    for length in (0, 40, len(data) // 2):
        with pytest.raises(BadData, match="decode-failed"):
            list(frames_of(data[:length], ImageConfig(frames=FramesConfig(every_s=0.1))))


@pytest.mark.parametrize("changes", [{"clips": "some"}, {"clip_s": 0}, {"max_clips": 0}, {"min_clip_s": -1}])
def test_video_blocks_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValidationError):
        VideoConfig.model_validate(changes)
