"""Promises about times: stored are the frames that a player shows, when it shows them, whatever a container claims.

The reference is the same frames in a plain MP4 (from 0, every frame shown, one clock), which ``clips.clip`` numbers.
"""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from sharding.errors import BadData
from sharding.media import decode_video, probe_video
from sharding.media.config import FramesConfig, ImageConfig, VideoConfig
from sharding.media.containers import container_format
from sharding.media.frames import frames_of
from sharding.media.transcode import cut_video, transcode_video
from sharding.media.video import clip_info
from tests.sharding.clips import (
    COUNT,
    FPS,
    causes,
    children,
    clip,
    clip_shows,
    moov_first,
    music_with_cover,
    number_of,
    shows,
    stills_show,
    with_edits,
)

HOUR = 3600 * FPS
FINE = {"b": "20M", "qmin": "1", "qmax": "1"}  # so that MPEG-2 and MPEG-4 keep every level of grey


@pytest.fixture(scope="module")
def plain() -> dict[str, list[int]]:
    """What is stored of 48 frames (1.92 s) in a plain MP4, and taken for training."""
    data = clip(b_frames=0)
    assert shows(data) == list(range(COUNT))
    return _all_shown(data)


def _all_shown(data: bytes) -> dict[str, list[int]]:
    taken = [number_of(pixels) for pixels in decode_video(data, 10)]
    return {"clip": clip_shows(data), "stills": stills_show(data), "training": taken}


def test_the_reference_itself_is_what_its_numbers_say(plain):
    # Frame n is shown from n / 25 s on; slot k of the clip is k / 8 s, with a tenth of a slot forgiven.
    assert plain["clip"] == [max(n for n in range(COUNT) if n * 8 / FPS - 0.1 <= k) for k in range(15)]
    assert plain["stills"] == [int((k + 0.5) * 1.92 / 7 * FPS + 1e-6) for k in range(7)]
    assert plain["training"] == [2, 7, 12, 16, 21, 26, 31, 36, 40, 45]


def _spaced(data: bytes, before: int, behind: int) -> bytes:
    """A transport stream with so many bytes before and behind each packet."""
    packets = (data[place : place + 188] for place in range(0, len(data), 188))
    return b"".join(bytes(before) + packet + bytes(behind) for packet in packets)


PLAIN_CONTENT = {
    "ts": lambda: clip("mpegts", gop=30),
    "ts, one keyframe": lambda: clip("mpegts", gop=250),
    "m2ts": lambda: _spaced(clip("mpegts"), 4, 0),
    "ts of a broadcast": lambda: _spaced(clip("mpegts"), 0, 16),
    "ts, MPEG-2": lambda: clip("mpegts", codec="mpeg2video", b_frames=2, options=FINE),
    "ts, HEVC": lambda: clip("mpegts", codec="libx265", options={"x265-params": "log-level=none"}),
    "ts, open GOP": lambda: clip("mpegts", options={"x264-params": "open-gop=1"}),
    "ts, refreshed in columns": lambda: clip("mpegts", b_frames=0, options={"x264-params": "intra-refresh=1"}),
    "mp4, refreshed in columns": lambda: clip(b_frames=0, options={"x264-params": "intra-refresh=1"}),
    "ts, clock wraps": lambda: clip("mpegts", times=[2**33 * FPS // 90_000 - 30 + n for n in range(COUNT)]),
    "ts, clock jumps ahead": lambda: clip("mpegts", times=[n if n < 25 else HOUR + n for n in range(COUNT)]),
    "ts, clock starts anew": lambda: clip("mpegts", range(30)) + clip("mpegts", range(30, COUNT)),
    "flv, clock jumps ahead": lambda: clip("flv", times=[n if n < 25 else HOUR + n for n in range(COUNT)]),
    "mkv, clock jumps ahead": lambda: clip("matroska", times=[n if n < 25 else HOUR + n for n in range(COUNT)]),
    "mp4, clock jumps ahead": lambda: clip(times=[n if n < 25 else HOUR + n for n in range(COUNT)]),
    "avi, H.264 with B-frames": lambda: clip("avi"),
    "avi, MPEG-4 with B-frames": lambda: clip("avi", codec="mpeg4", b_frames=2, options=FINE),
    "flv, B-frames": lambda: clip("flv"),
    "webm, VP8 with hidden frames": lambda: clip(
        "webm", codec="libvpx", gop=120, options={"auto-alt-ref": "1", "lag-in-frames": "16", "crf": "4", "b": "2M"}
    ),
    "ogg": lambda: clip("ogg", codec="libvpx", options={"crf": "4", "b": "2M"}),
    "mkv, starts after an hour": lambda: clip("matroska", times=[HOUR + n for n in range(COUNT)]),
    "mp4, starts after an hour": lambda: clip(times=[HOUR + n for n in range(COUNT)]),
    "mp4 in fragments": lambda: clip(muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "mp4 in fragments, sidx": lambda: clip(muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof+dash"}),
    "mp4, cover first": lambda: clip(cover=True),
    "mkv, cover first": lambda: clip("matroska", cover=True),
    "mp4, edits hide nothing": lambda: with_edits(clip(b_frames=0), [(0, 25), (25, 23)]),
    "mp4, hidden before and behind": lambda: with_edits(
        clip(numbers=[0] * 10 + list(range(COUNT)) + [0] * 20, b_frames=0), [(10, COUNT)]
    ),
    "mov, begins later": lambda: with_edits(clip("mov", b_frames=0), [(-1, 50), (0, COUNT)]),
    "mp4, shown in another order": lambda: with_edits(
        clip(numbers=[*range(28, COUNT), *range(28)], b_frames=0, gop=4), [(20, 28), (0, 20)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_CONTENT)
def test_the_same_frames_are_stored_whatever_the_container_does(name, plain):
    assert _all_shown(PLAIN_CONTENT[name]()) == plain


@pytest.mark.parametrize("boxes", [b"styp", b"sidx", b"moof", b"uuid", b"emsg"])
def test_fragments_may_begin_with_any_box(boxes):
    data = bytes(4) + boxes
    assert container_format(len(data).to_bytes(4, "big") + boxes + bytes(24)) == "mp4"


def test_segments_that_begin_with_styp_or_uuid_are_read(plain):
    data = clip(muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    for box in (b"\0\0\0\x18stypmsdh\0\0\0\0msdhmsix", b"\0\0\0\x20uuid" + bytes(24)):
        body = b"".join(
            data[begin:end] for kind, begin, end in children(data) if kind not in (b"ftyp", b"mfra")
        )
        assert _all_shown(box + body) == plain


def test_an_edit_list_shows_its_part_and_hides_the_rest():
    data = clip(numbers=range(COUNT), b_frames=0)
    for first, count in ((0, 20), (30, 18), (12, 24)):
        edited = with_edits(data, [(first, count)])
        encoded = transcode_video(edited, VideoConfig(crf=1))
        assert shows(encoded.data) == list(range(first, first + count))
        assert (encoded.info.frames, encoded.info.duration) == (count, pytest.approx(count / FPS))
        assert stills_show(edited, 0.2, 4) == stills_show(clip(numbers=range(first, first + count)), 0.2, 4)
        assert clip_info(edited).frames == count


def test_edit_lists_that_ffmpeg_does_not_follow_are_refused_by_name():
    data = clip(b_frames=0)
    for edited in (with_edits(data, [(0, 20), (-1, 25), (20, 20)]), with_edits(data, [(0, 40)], rate=2)):
        assert causes(edited) == {"unsupported-edit-list"}
        with pytest.raises(BadData, match="unsupported-edit-list"):
            decode_video(edited, 2)
    assert clip_shows(with_edits(data, [(0, 20), (0, 20)]), fps=25) == [*range(20), *range(20)]


def test_a_clip_that_hides_frames_or_jumps_is_not_kept_byte_for_byte():
    fits = {"keyframe_interval": 25, "clip_s": 10}
    data = clip(b_frames=0)
    assert transcode_video(data, VideoConfig(**fits)).data == data
    edited = with_edits(data, [(10, 30)])
    jumps = clip(times=[n if n < 25 else HOUR + n for n in range(COUNT)], b_frames=0)
    uneven = clip(times=[n if n < 25 else 20 + n for n in range(COUNT)], b_frames=0)
    for other, count in ((edited, 30), (jumps, COUNT), (uneven, COUNT + 20)):
        encoded = transcode_video(other, VideoConfig(**fits))
        assert encoded.data != other
        assert encoded.info.frames == count


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
@pytest.mark.parametrize("times", [[0, HOUR], [0, 1, HOUR], [0, 400, 800, 1200], [0, 1, 2, 500, 501, 502]])
def test_no_clip_lasts_longer_than_it_may(container, times):
    data = clip(container, range(len(times)), times=times, b_frames=0)
    for config in ({"clip_s": 3}, {"clip_s": 0.3}, {"clip_s": 7, "fps": 0.05}):
        for encoded in cut_video(data, VideoConfig(clips="all", max_clips=3, **config)):
            with av.open(io.BytesIO(encoded.data)) as container_:
                lasts = container_.streams.video[0].duration * container_.streams.video[0].time_base
            assert encoded.info.duration <= config["clip_s"] + 1e-6
            assert float(lasts) <= config["clip_s"] + 1e-6


def test_a_picture_that_is_held_is_held_and_its_neighbours_keep_their_rate():
    times = [*range(25), *range(150, 173)]  # 5 s of a slide in between
    for container in ("mp4", "matroska", "mpegts"):
        numbers = clip_shows(clip(container, times=times), fps=25)
        assert numbers[:25] == list(range(25))
        assert numbers[25:149] == [24] * 124
        assert numbers[150:] == list(range(25, COUNT))


def test_a_stream_that_is_cut_into_begins_with_its_first_whole_picture():
    data = clip("mpegts", options={"x264-params": "open-gop=1"})
    with av.open(io.BytesIO(data)) as container:
        keys = [packet.pos for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
    begun = data[keys[1] // 188 * 188 :]
    numbers = clip_shows(data[: 3 * 188] + begun, fps=25)
    assert numbers[0] in range(20, 26)
    assert numbers == list(range(numbers[0], COUNT))
    middle = keys[0] // 188 * 188 + 10 * 188  # behind the first keyframe
    assert clip_shows(data[: 3 * 188] + data[middle:], fps=25)[-1] == COUNT - 1


# ---------------------------------------------------------------- bytes that are missing


def _noise() -> list[np.ndarray]:
    pictures = np.random.default_rng(0).integers(0, 256, (COUNT, 48, 64, 3), np.uint8)
    return list(pictures)


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """Clips of noise, so that every frame takes many bytes."""
    codecs = {"webm": "libvpx", "ogg": "libvpx"}
    kinds = ("mp4", "mov", "matroska", "mpegts", "avi", "flv", "webm", "ogg")
    found = {kind: clip(kind, pixels=_noise(), codec=codecs.get(kind, "libx264")) for kind in kinds}
    found["mp4, moov first"] = moov_first(found["mp4"])
    found["mp4 in fragments"] = clip(
        pixels=_noise(), muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    )
    return found


KINDS = (
    "mp4",
    "mov",
    "matroska",
    "mpegts",
    "avi",
    "flv",
    "webm",
    "ogg",
    "mp4, moov first",
    "mp4 in fragments",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_of_which_bytes_are_missing_is_dropped(kind, whole):
    data = whole[kind]
    assert causes(data) == {"kept"}
    third = len(data) // 3
    for cut in (data[: 2 * third], data[:-200], data[:third] + data[third + 1000 :]):
        assert causes(cut) == {"decode-failed"}


def test_packets_that_are_missing_from_a_transport_stream_are_noticed(whole):
    """Whatever the number of packets, but a multiple of the 16 that their counter counts."""
    data = whole["mpegts"]
    for first, count in ((40, 1), (40, 5), (100, 31)):
        cut = data[: first * 188] + data[(first + count) * 188 :]
        with pytest.raises(BadData, match="packets are missing before byte"):
            list(cut_video(cut, VideoConfig()))
    still = clip("mpegts", b_frames=0)  # a frame takes one packet: whole frames are missing
    with pytest.raises(BadData, match="packets are missing before byte"):
        list(cut_video(still[: 20 * 188] + still[31 * 188 :], VideoConfig()))
    assert causes(data[:1880] + bytes(188) + data[2068:]) == {"decode-failed"}


def test_a_joined_recording_whose_pictures_ffmpeg_would_leave_out_is_dropped():
    first = clip("mpegts", range(24))
    assert clip_shows(first + clip("mpegts", range(24, COUNT)), fps=25) == list(range(COUNT))
    for muxer in ({"mpegts_start_pid": "512"}, {"mpegts_start_pid": "512", "mpegts_pmt_start_pid": "4352"}):
        second = clip("mpegts", range(24, COUNT), muxer=muxer)
        with pytest.raises(BadData, match="joined recording"):
            list(cut_video(first + second, VideoConfig()))
        for joined in (second + first, first + second + first, (first + second) * 2):
            assert causes(joined) == {"decode-failed"}
        assert causes(first + second) == {"decode-failed"}
    assert causes(first + clip("mpegts", range(24, COUNT), codec="mpeg2video")) == {"decode-failed"}


def test_a_file_of_a_cover_alone_is_no_clip():
    data = clip("matroska", cover=True)
    with av.open(io.BytesIO(data)) as container:
        assert next(stream.codec_context.name for stream in container.streams.video) == "mjpeg"
    assert (probe_video(data).width, probe_video(data).height) == (64, 48)
    with pytest.raises(BadData, match="no video stream"):
        list(frames_of(music_with_cover(), ImageConfig(frames=FramesConfig())))
