"""Three promises for every source, every medium and every filter.

Conservation: ``read = kept + dropped by cause``, and nothing is kept that the corpus does not hold (asserted by
``prepare_files`` and by comparing everything that is stored). Correctness: each stored sample shows its own picture
under its own captions. Isolation: what is broken costs itself alone, whatever stands beside it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from sharding.filters.config import FilterBlock, FilterConfig, chosen
from sharding.media import decode_image
from tests.sharding.preparation import StoredSample, prepare_files

_GOOD = 3
_LEVELS = [40 * (number + 1) for number in range(_GOOD)]  # the grey of each good picture or clip
_CUT = "cut"
_NOT_MEDIA = b"neither a picture nor a clip"


def _still(level: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (24, 16), (level,) * 3).save(sink, "PNG")
    return sink.getvalue()


def _clip(level: int, container: str) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=10, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), "rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


@dataclass(frozen=True)
class _Kind:
    """A medium: how its files are made, and what a sample of it is stored as."""

    suffix: str
    make: Callable[[int], bytes]
    modality: str
    block: dict[str, Any]


_ONE_STILL = {"format": "png", "frames": {"every_s": 5, "max": 1}}

_KINDS = {
    "images": _Kind(".png", _still, "image", {"image": {"format": "png"}}),
    "clips": _Kind(".mp4", lambda level: _clip(level, "mp4"), "video", {}),
    "stills of clips": _Kind(
        ".avi",
        lambda level: _clip(level, "avi"),
        "image",
        {"image": {"format": "png", "frames": {"every_s": 5, "max": 1}}},
    ),
}


def _level(sample: StoredSample) -> float:
    """The grey that a stored sample shows."""
    if sample.media.startswith(b"\x89PNG"):
        return float(decode_image(sample.media).mean())
    with av.open(io.BytesIO(sample.media)) as container:
        return float(
            np.mean([frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)])
        )


@dataclass(frozen=True)
class _Corpus:
    """Files, the source that reads them, and under which causes the broken ones must be counted."""

    files: dict[str, bytes]
    source: dict[str, Any]
    dropped: dict[str, int]


def _caption(number: int) -> str:
    return f"the caption number {number}"


def _media(kind: _Kind) -> dict[str, bytes]:
    """The good files, and three broken ones."""
    files = {f"{number}{kind.suffix}": kind.make(level) for number, level in enumerate(_LEVELS)}
    whole = kind.make(7)
    broken = {_CUT: whole[: len(whole) * 2 // 3], "other": _NOT_MEDIA, "empty": b""}
    return files | {f"{name}{kind.suffix}": data for name, data in broken.items()}


_BROKEN = ("cut", "other", "empty")


def _folder(kind: _Kind, suffix: str) -> _Corpus:
    def sidecar(text: str) -> bytes:
        return text.encode() if suffix == ".txt" else json.dumps({"caption": text}).encode()

    files = _media(kind)
    files |= {f"{number}{suffix}": sidecar(_caption(number)) for number in range(_GOOD)}
    files |= {f"{name}{suffix}": sidecar("a caption") for name in _BROKEN}
    good = kind.make(99)
    files |= {f"{name}{kind.suffix}": good for name in ("alone", "latin", "blank")}
    files |= {f"latin{suffix}": b"caf\xe9", f"blank{suffix}": sidecar(" \n")}
    files |= {
        ".hidden.png": good,
        "__MACOSX/0.mp4": good,
        "notes.pdf": b"%PDF",
        f"orphan{suffix}": sidecar("x"),
    }
    dropped = {"decode-failed": 3, "caption-missing": 1, "caption-not-text": 1, "caption-empty": 1}
    return _Corpus(files, {"kind": "folder", "path": "{folder}", "captions": suffix}, dropped)


def _rows(kind: _Kind) -> list[dict[str, Any]]:
    """Rows of a table: the good ones, those of broken media, and broken rows."""
    rows = [{"file": f"{number}{kind.suffix}", "caption": _caption(number)} for number in range(_GOOD)]
    rows += [{"file": f"{name}{kind.suffix}", "caption": "a caption"} for name in _BROKEN]
    rows += [{"file": f"nowhere{kind.suffix}", "caption": "a caption"}]
    rows += [{"file": "../outside.png", "caption": "a caption"}, {"file": "", "caption": "a caption"}]
    return [*rows, {"file": f"0{kind.suffix}", "caption": ""}]


_OF_ROWS = {"decode-failed": 3, "missing-file": 1, "bad-address": 2, "caption-empty": 1}
_TABLE = {"kind": "table", "path_column": "file", "caption_column": "caption"}


def _jsonl(kind: _Kind) -> _Corpus:
    lines = [json.dumps(row) for row in _rows(kind)]
    half = f'{{"file": "1{kind.suffix}", "caption": "half \\ud800"}}'
    lines[2:2] = ["{broken", "[1, 2]", half, "9" * 5000]
    files = _media(kind) | {"table.jsonl": "\n".join(lines).encode()}
    return _Corpus(
        files, {**_TABLE, "path": "{folder}/table.jsonl"}, {**_OF_ROWS, "bad-row": 3, "caption-not-text": 1}
    )


def _text(kind: _Kind, separator: str, suffix: str) -> _Corpus:
    lines = [f"file{separator}caption"] + [f"{row['file']}{separator}{row['caption']}" for row in _rows(kind)]
    lines[3:3] = [f"0{kind.suffix}", separator.join("abcd")]
    files = _media(kind) | {f"table{suffix}": "\n".join(lines).encode()}
    return _Corpus(
        files, {**_TABLE, "path": "{folder}/table" + suffix}, {**_OF_ROWS, "bad-row": 1, "caption-empty": 2}
    )


def _parquet(kind: _Kind) -> _Corpus:
    rows = [{**row, "caption": [row["caption"]]} for row in _rows(kind)] + [
        {"file": None, "caption": ["a caption"]}
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=4)
    files = _media(kind) | {"table.parquet": sink.getvalue()}
    return _Corpus(files, {**_TABLE, "path": "{folder}/table.parquet"}, {**_OF_ROWS, "bad-address": 3})


def _coco(kind: _Kind) -> _Corpus:
    rows = _rows(kind)
    images: list[Any] = [{"id": number, "file_name": row["file"]} for number, row in enumerate(rows)]
    annotations: list[Any] = [
        {"image_id": number, "caption": row["caption"]} for number, row in enumerate(rows) if row["caption"]
    ]
    listed = {
        "images": [*images, {"id": 0, "file_name": "0.png"}, 7],
        "annotations": [*annotations, {"caption": "x"}],
    }
    files = _media(kind) | {"list.json": json.dumps(listed).encode()}
    source = {"kind": "coco", "path": "{folder}/list.json", "images": "{folder}"}
    return _Corpus(files, source, {**_OF_ROWS, "bad-row": 3})


def _karpathy(kind: _Kind) -> _Corpus:
    images: list[Any] = [
        {"filename": row["file"], "split": "train", "sentences": [{"raw": row["caption"]}]}
        for row in _rows(kind)
    ]
    listed = {"images": [*images, 7, {"filename": "0.png", "split": "train"}]}
    files = _media(kind) | {"list.json": json.dumps(listed).encode()}
    source = {"kind": "karpathy", "path": "{folder}/list.json", "images": "{folder}"}
    return _Corpus(files, source, {**_OF_ROWS, "bad-row": 2})


def _tar(kind: _Kind) -> _Corpus:
    media = _media(kind)
    members = [(name, data) for name, data in media.items()]
    members += [(f"{number}.txt", _caption(number).encode()) for number in range(_GOOD)]
    members += [(f"{name}.json", b'{"caption": "a caption"}') for name in _BROKEN]
    members += [(f"alone{kind.suffix}", kind.make(9)), ("words.txt", b"no media"), ("._0.png", b"a fork")]
    members += [(f"twice{kind.suffix}", kind.make(9))] * 2
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dropped = {"decode-failed": 3, "caption-missing": 1, "media-missing": 1, "repeated-member": 1}
    return _Corpus({"0.tar": sink.getvalue()}, {"kind": "webdataset", "path": "{folder}"}, dropped)


def _huggingface(kind: _Kind) -> _Corpus:
    media = _media(kind)
    texts = [_caption(number) for number in range(_GOOD)] + ["a caption"] * 3
    rows = [{"media": data, "caption": text} for (_, data), text in zip(media.items(), texts, strict=True)]
    rows += [{"media": None, "caption": "a caption"}, {"media": kind.make(9), "caption": None}]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    source = {"kind": "huggingface", "path": "{folder}", "media_column": "media", "caption_column": "caption"}
    return _Corpus(
        {"train.parquet": sink.getvalue()},
        source,
        {"decode-failed": 3, "media-missing": 1, "caption-empty": 1},
    )


_SOURCES: dict[str, Callable[[_Kind], _Corpus]] = {
    "folder of .txt": lambda kind: _folder(kind, ".txt"),
    "folder of .json": lambda kind: _folder(kind, ".json"),
    "jsonl": _jsonl,
    "csv": lambda kind: _text(kind, ",", ".csv"),
    "tsv": lambda kind: _text(kind, "\t", ".tsv"),
    "parquet": _parquet,
    "coco": _coco,
    "karpathy": _karpathy,
    "webdataset": _tar,
    "huggingface": _huggingface,
}


def _msrvtt(kind: _Kind) -> _Corpus:
    lines = ["key,vid_key,video_id,sentence"]
    lines += [
        f"k,v,{row['file'].removesuffix('.mp4')},{row['caption']}" for row in _rows(kind) if row["caption"]
    ]
    files = _media(kind) | {"list.csv": "\n".join([*lines, "k,v", "k,v,1,x,too,many"]).encode()}
    source = {"kind": "msrvtt", "path": "{folder}/list.csv", "videos": "{folder}"}
    return _Corpus(files, source, {"decode-failed": 3, "missing-file": 1, "bad-row": 4})


def _lsmdc(kind: _Kind) -> _Corpus:
    lines = [
        f"{row['file'].removesuffix('.mp4')}\t1\t2\t3\t4\t{row['caption']}"
        for row in _rows(kind)
        if row["caption"]
    ]
    data = "\n".join(lines).encode() + b"\n0\t1\ncaf\xe9\t1\t2\t3\t4\tx\n"
    source = {"kind": "lsmdc", "path": "{folder}/list.csv", "videos": "{folder}"}
    return _Corpus(
        _media(kind) | {"list.csv": data}, source, {"decode-failed": 3, "missing-file": 1, "bad-row": 4}
    )


_OF_VIDEOS: dict[str, Callable[[_Kind], _Corpus]] = {"msrvtt": _msrvtt, "lsmdc": _lsmdc}


@pytest.mark.parametrize(
    ("name", "medium"),
    [(name, medium) for medium in _KINDS for name in _SOURCES] + [(name, "clips") for name in _OF_VIDEOS],
)
def test_what_is_broken_costs_itself_alone_and_everything_is_counted(name: str, medium: str):
    kind = _KINDS[medium]
    corpus = {**_SOURCES, **_OF_VIDEOS}[name](kind)
    prepared = prepare_files(corpus.files, corpus.source, kind.modality, **kind.block)
    assert prepared.counts.dropped == dict(sorted(corpus.dropped.items()))
    assert sorted(sample.captions for sample in prepared.samples) == [
        [_caption(number)] for number in range(_GOOD)
    ]
    for sample in prepared.samples:
        number = int(sample.captions[0].rpartition(" ")[2])
        # H.264 and MPEG-4 keep a grey within two levels.
        assert abs(_level(sample) - _LEVELS[number]) <= 2, sample.source
    skipped = prepared.survey.skipped
    if name.startswith("folder"):
        assert skipped == {"unused-caption": 1, "hidden": 2, ".pdf": 1}
        assert prepared.survey.inputs + prepared.survey.sidecars + sum(skipped.values()) == len(corpus.files)
    if name == "webdataset":
        assert skipped == {"hidden": 1}


_FILTERS: dict[str, dict[str, Any]] = {
    "size": {"min": 20},
    "aspect": {"max": 1.2},
    "pixels": {"max": 400},
    "animated": {"images": "drop"},
    "duration": {"max": 0.1},
    "frames": {"min": 2},
    "fps": {"max": 1},
    "caption": {"min_words": 4, "max_words": 20, "max_repeated_words": 0.5},
    "language": {"keep": ["en"]},
    "blocked_words": {"words": ["number 1"]},
    "duplicates": {"by": "bytes"},
}


def _block(filter_kind: str) -> FilterBlock:
    block: FilterBlock = TypeAdapter(FilterConfig).validate_python(
        {"kind": filter_kind, **_FILTERS[filter_kind]}
    )
    return block


# One medium for each: those of clips alone are asked of clips.
_CASES = [
    (filter_kind, "images" if "image" in _block(filter_kind).modalities else "clips")
    for filter_kind in _FILTERS
]


@pytest.mark.parametrize(("filter_kind", "medium"), _CASES)
def test_every_filter_counts_what_it_drops_among_broken_inputs(filter_kind: str, medium: str):
    kind, block = _KINDS[medium], _block(filter_kind)
    corpus = _folder(kind, ".txt")
    prepared = prepare_files(
        corpus.files, corpus.source, kind.modality, filters=[block.model_dump()], **kind.block
    )
    dropped = Counter(prepared.counts.dropped)
    by_choice = Counter({cause: count for cause, count in dropped.items() if chosen(cause)})
    assert set(by_choice) <= set(block.causes)
    # What no filter saw is broken as before; a caption filter may object before the media are opened.
    assert dropped - by_choice <= Counter(corpus.dropped)
    assert by_choice.total() or len(prepared.samples) == _GOOD
