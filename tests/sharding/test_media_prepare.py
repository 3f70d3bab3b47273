"""Preparing videos: clips and frames as samples, and a decoder that hangs or is killed in the middle of a job."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from sharding.config import PrepareConfig
from sharding.index import read_index
from sharding.media import decode_image, decode_video
from sharding.prepare import PreparedDataset, prepare
from sharding.storage import Storage, open_storage


def _video(frames: int, base: int) -> bytes:
    """10 frames a second, each brighter than the one before."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10, options={"threads": "1", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            array = np.full((48, 64, 3), (base + 5 * number) % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        out.mux(stream.encode(None))
    return sink.getvalue()


@pytest.fixture
def videos(tmp_path) -> Path:
    """Videos of 3.4, 1, 2 and 1 s, the last a copy of the second, and one that is broken."""
    folder = tmp_path / "videos"
    folder.mkdir()
    contents = [_video(34, 0), _video(10, 30), _video(20, 90)]
    contents += [contents[1], contents[0][:1500]]
    for number, data in enumerate(contents):
        (folder / f"{number}.mp4").write_bytes(data)
        (folder / f"{number}.txt").write_text(f"video {number}\n")
    return folder


def _config(folder: Path, **changes) -> PrepareConfig:
    values = {"source": {"kind": "folder", "path": str(folder)}, "bad_limit": 0.5, "samples_per_shard": 2}
    return PrepareConfig.model_validate(values | changes)


def _clips(folder: Path) -> PrepareConfig:
    return _config(folder, modality="video", video={"clips": "all", "clip_s": 1, "min_clip_s": 0.4})


def _tree(storage: Storage, prepared: PreparedDataset) -> dict[str, str]:
    dataset = storage.at(prepared.path)
    return {file.path: hashlib.sha256(dataset.read_bytes(file.path)).hexdigest() for file in dataset.list()}


def test_a_video_dataset_of_all_clips(tmp_path, videos, ray_session):
    storage = open_storage(tmp_path / "out")
    prepared = prepare("clips", _clips(videos), storage, in_flight=2)
    counts = prepared.manifest.counts
    # Three whole clips and a rest of 0.4 s that just counts; one; two; the copy of the second; the broken one.
    assert counts.inputs == 5
    assert (counts.read, counts.kept) == (9, 7)
    assert counts.dropped == {"decode-failed": 1, "duplicate-other-caption": 1}
    dataset = storage.at(prepared.path)
    rows = read_index(dataset.read_bytes("000000.parquet")).to_pylist()
    assert [row["key"] for row in rows] == [
        "000000-000000-0000", "000000-000000-0001", "000000-000000-0002", "000000-000000-0003", "000000-000001-0000",
    ]  # fmt: skip
    assert [row["frames"] for row in rows] == [10, 10, 10, 4, 10]
    media = dataset.read_bytes("000000.tar", rows[1]["media_offset"], rows[1]["media_size"])
    assert decode_video(media, 10).mean(axis=(1, 2, 3)) == pytest.approx(
        [5 * n for n in range(10, 20)], abs=3
    )


def test_an_image_dataset_of_frames_of_videos(tmp_path, videos, ray_session):
    config = _config(
        videos, modality="image", image={"resize": 24, "format": "png", "frames": {"every_s": 1, "max": 2}}
    )
    storage = open_storage(tmp_path / "out")
    prepared = prepare("frames", config, storage, in_flight=2)
    assert prepared.manifest.modality == "image"
    assert prepared.manifest.counts.kept == 5
    assert prepared.manifest.counts.dropped == {"decode-failed": 1, "duplicate-other-caption": 1}
    dataset = storage.at(prepared.path)
    rows = read_index(dataset.read_bytes("000000.parquet")).to_pylist()
    assert [(row["key"][-11:], row["extension"], row["frames"]) for row in rows] == [
        ("000000-0000", "png", 1), ("000000-0001", "png", 1), ("000001-0000", "png", 1),
    ]  # fmt: skip
    image = dataset.read_bytes("000000.tar", rows[1]["media_offset"], rows[1]["media_size"])
    assert decode_image(image).mean() == pytest.approx(5 * 25, abs=4)


def _kill_one_of_each_task_process(over: threading.Event, bereft: set[int]) -> None:
    """Kill a decoding process of every Ray worker below this process, one of each."""
    while not over.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            try:
                task, command = process.ppid(), process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if "sharding.guarded" in command and task not in bereft | {os.getpid()}:
                bereft.add(task)
                os.kill(process.pid, signal.SIGKILL)


def test_decoding_processes_that_are_killed_change_no_byte(tmp_path, videos, ray_session):
    reference = open_storage(tmp_path / "reference")
    expected = prepare("clips", _clips(videos), reference, in_flight=2)
    over, bereft = threading.Event(), set()
    thread = threading.Thread(target=_kill_one_of_each_task_process, args=(over, bereft))
    thread.start()
    try:
        storage = open_storage(tmp_path / "out")
        prepared = prepare("clips", _clips(videos), storage, in_flight=2)
    finally:
        over.set()
        thread.join()
    assert bereft
    assert _tree(storage, prepared) == _tree(reference, expected)
