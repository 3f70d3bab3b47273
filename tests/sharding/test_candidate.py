"""Promises of the examiner: cheap questions first, samples in order, several of them from one video."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sharding.candidate import Examined, Examiner
from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.media import Encoded, decode_image, encode_image
from sharding.media.config import VideoConfig
from sharding.media.transcode import cut_video
from sharding.sources import Input
from sharding.sources.fetch import Fetched


def _config(**changes) -> PrepareConfig:
    source = {"kind": "table", "path": "/x/t.csv", "path_column": "p", "caption_column": "c"}
    return PrepareConfig.model_validate({"source": source, "modality": "image"} | changes)


def _png(number: int, width: int = 40, height: int = 30) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (number, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


def _video(frames: int = 60, fps: int = 20, size: tuple[int, int] = (48, 40)) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            array = np.full((size[1], size[0], 3), 4 * number % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        out.mux(stream.encode(None))
    return sink.getvalue()


def _fetched(media: bytes, name: str = "a", captions: tuple[str, ...] = ("a caption",)) -> Fetched:
    return Fetched(Input(address=name, captions=list(captions)), media=media)


def _causes(examined: list) -> list[str | int]:
    return [item.cause if isinstance(item, BadData) else len(item.candidates) for _, item in examined]


def test_inputs_come_out_in_their_order_whatever_becomes_of_them():
    examiner = Examiner(_config(filters=[{"kind": "size", "min": 20}]))
    inputs = []
    for number in range(40):
        media = {0: b"broken", 1: b"", 2: _png(number, 40, 19)}.get(number % 10, _png(number))
        inputs.append(_fetched(media, str(number), captions=() if number % 10 == 3 else ("x",)))
    examined = list(examiner.examine_all(iter(inputs)))
    assert [item.address for item, _ in examined] == [str(number) for number in range(40)]
    tenth = ["decode-failed", "decode-failed", "too-small", "caption-empty", 1, 1, 1, 1, 1, 1]
    assert _causes(examined) == tenth * 4
    for number, (_, item) in enumerate(examined):
        if isinstance(item, Examined):
            (candidate,) = item.candidates
            assert candidate.media == encode_image(_png(number))
            assert candidate.sha256 == hashlib.sha256(_png(number)).hexdigest()
            assert candidate.part is None


def test_only_a_few_inputs_are_taken_ahead_of_those_that_are_used():
    taken = 0

    def inputs():
        nonlocal taken
        for number in range(50):
            taken += 1
            yield _fetched(_png(number))

    for used, _ in enumerate(Examiner(_config()).examine_all(inputs())):
        assert taken <= used + 8


def test_large_inputs_are_not_held_in_number():
    taken = 0

    def inputs():
        nonlocal taken
        for _ in range(6):
            taken += 1
            yield _fetched(bytes(40 * 2**20))

    for used, (_, item) in enumerate(Examiner(_config()).examine_all(inputs())):
        assert isinstance(item, BadData)
        assert taken <= used + 2


def test_a_caller_that_stops_halfway_leaves_nothing_behind_for_the_next():
    examiner = Examiner(_config())
    walk = examiner.examine_all(_fetched(_png(number)) for number in range(20))
    next(walk)
    walk.close()
    (candidate,) = Examiner(_config()).examine(_fetched(_png(7))).candidates
    assert decode_image(candidate.media.data)[0, 0, 0] in range(4, 11)


def test_killing_the_decoding_process_over_and_over_changes_no_sample():
    examiner = Examiner(_config(image={"resize": 20}))
    inputs = [_fetched(_png(number), str(number)) for number in range(30)]
    expected = list(examiner.examine_all(inputs))
    survived = []
    for number, item in enumerate(examiner.examine_all(inputs)):
        survived.append(item)
        if number % 7 == 0:
            os.kill(examiner.decoding_process, signal.SIGKILL)
    assert survived == expected


def test_a_video_gives_a_sample_for_each_clip_with_its_captions():
    media = _video()
    config = _config(modality="video", video={"clips": "all", "clip_s": 1, "min_clip_s": 0.2})
    examined = Examiner(config).examine(_fetched(media))
    clips = [clip for clip in cut_video(media, config.clip) if isinstance(clip, Encoded)]
    assert [candidate.media for candidate in examined.candidates] == clips
    assert [candidate.part for candidate in examined.candidates] == [0, 1, 2]
    assert {tuple(candidate.captions) for candidate in examined.candidates} == {("a caption",)}
    assert not examined.dropped


def test_parts_of_equal_videos_are_equal_and_parts_of_one_video_are_not():
    config = _config(modality="video", video={"clips": "all", "clip_s": 1})
    media = _video()
    first, second = (Examiner(config).examine(_fetched(media, name)).candidates for name in "ab")
    assert [part.sha256 for part in first] == [part.sha256 for part in second]
    assert len({part.sha256 for part in first}) == 3


def test_parts_that_a_filter_drops_are_counted_one_by_one():
    config = _config(
        modality="video",
        video={"clips": "all", "clip_s": 1, "min_clip_s": 0},
        filters=[{"kind": "duration", "min": 0.8}],
    )
    examined = Examiner(config).examine(_fetched(_video(frames=50)))
    assert [candidate.part for candidate in examined.candidates] == [0, 1]
    assert examined.dropped == {"clip-too-short": 1}
    tiny = _config(modality="video", video={"clips": "all", "clip_s": 1, "max_mb": 0.0001})
    assert Examiner(tiny).examine(_fetched(_video())).dropped == {"clip-too-large": 3}


def test_a_video_of_one_clip_that_a_filter_drops_is_dropped_as_an_input():
    config = _config(modality="video", video={"max_mb": 0.0001})
    with pytest.raises(BadData, match="clip-too-large"):
        Examiner(config).examine(_fetched(_video()))


def test_images_are_taken_from_videos():
    config = _config(image={"resize": 20, "format": "png", "frames": {"every_s": 1}})
    assert (config.input_modality, config.gives_parts) == ("video", True)
    examined = Examiner(config).examine(_fetched(_video()))
    assert [candidate.part for candidate in examined.candidates] == [0, 1, 2]
    shown = [decode_image(candidate.media.data).mean() / 4 for candidate in examined.candidates]
    assert shown == pytest.approx([10, 30, 50], abs=1)
    with pytest.raises(BadData, match="decode-failed"):
        Examiner(config).examine(_fetched(b"no video"))


def test_an_input_that_takes_too_long_is_dropped_as_that():
    slow = _video(frames=400, size=(640, 480))
    config = _config(modality="video", video={"fps": 20, "clip_s": 20}, decode_timeout_s=0.5)
    inputs = [_fetched(slow, "slow"), _fetched(_video(frames=4), "quick")]
    assert _causes(list(Examiner(config).examine_all(inputs))) == ["decode-timeout", 1]


def test_a_configuration_is_checked_without_any_decoder():
    source = "import sharding.config, sys; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=root
    )
    assert not {"PIL", "av", "numpy", "simplejpeg", "ray"} & set(done.stdout.split())


def test_the_limits_of_decoding_do_not_name_another_dataset():
    assert _config(decode_timeout_s=7, decode_memory_mb=999).digest == _config().digest
    clips = VideoConfig(clips="all").model_dump(mode="json")
    assert _config(modality="video", video=clips).digest != _config(modality="video").digest
