"""Video-text retrieval as MSR-VTT, 1k-A: ``video/videos/videoN.mp4`` with the three lists that people use.

``MSRVTT_data.json``: all videos and sentences, with the splits ``train``, ``validate`` and ``test``.
``MSRVTT_train.9k.csv``: the videos to train on. ``MSRVTT_JSFUSION_test.csv``: one sentence for each video of the test.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.scenes.request import Request
from pipeline.scenes.sets import Part, different
from pipeline.scenes.sink import Sink
from sharding.scenes.config import Split
from sharding.scenes.generator import encode_clip

_SPLITS: dict[Split, str] = {"train": "train", "val": "validate", "test": "test"}


def write(parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None:
    """Five sentences a video; those of the test list are the fullest."""
    videos: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    train: list[list[str]] = []
    test: list[list[str]] = []
    for part in parts:
        for scene, captions in different(part, part.scenes.clip):
            number = len(videos)
            name = f"video{number}"
            sink.write(f"video/videos/{name}.mp4", encode_clip(scene, request.rules.fps))
            videos.append(
                {
                    "category": 0,
                    "url": f"scene:{part.split}/{scene.number}",
                    "video_id": name,
                    "start time": 0.0,
                    "end time": scene.frames / request.rules.fps,
                    "split": _SPLITS[part.split],
                    "id": number,
                }
            )
            for caption in captions:
                sentences.append({"caption": caption.text, "video_id": name, "sen_id": len(sentences)})
            if part.split == "train":
                train.append([name])
            elif part.split == "test":
                test.append([f"ret{len(test)}", f"msr{number}", name, captions[0].text])
            step()
    info = {"contributor": "scenes", "version": "1.0"}
    sink.write_json("video/MSRVTT_data.json", {"info": info, "videos": videos, "sentences": sentences})
    if train:
        sink.write("video/MSRVTT_train.9k.csv", _csv([["video_id"], *train]))
    if test:
        header = ["key", "vid_key", "video_id", "sentence"]
        sink.write("video/MSRVTT_JSFUSION_test.csv", _csv([header, *test]))


def _csv(rows: Iterable[list[str]]) -> bytes:
    sink = io.StringIO(newline="")
    csv.writer(sink, lineterminator="\n").writerows(rows)
    return sink.getvalue().encode()
