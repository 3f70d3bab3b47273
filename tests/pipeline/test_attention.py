"""Attention maps for the report: of readable samples chosen by seed, the same for every checkpoint, and small."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from pipeline.evaluation.attention import attention_examples
from pipeline.evaluation.result import Example
from sharding.errors import StorageFault
from sharding.manifest import Manifest, load_manifest
from sharding.reader import RawSample, ShardReader
from sharding.storage import open_storage
from tests.sharding.real_media import write_image_dataset

CLIPS = Path(__file__).resolve().parents[2] / "pipeline/demo/corpus/clips"
CONFIG = GLSCLConfig.preset(
    "tiny", image_size=32, patch_size=16, vision_layers=1, text_layers=1, fusion_layers=1
)


def model(seed: int) -> GLSCLForPreTraining:
    torch.manual_seed(seed)
    return GLSCLForPreTraining(CONFIG).eval()


PROCESSOR = GLSCLProcessor.from_config(CONFIG)


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    """Two shards of 6 pictures; rows 0 to 3 of both do not decode."""
    storage = open_storage(tmp_path / "dataset")
    write_image_dataset(storage, 6, shards=2, broken={0, 1, 2, 3})
    return ShardReader(storage, load_manifest(storage))


def keys(examples: list[Example]) -> list[str]:
    return [dict(example.lines)["sample"] for example in examples]


def sizes(example: Example) -> set[tuple[int, int]]:
    return {Image.open(io.BytesIO(data)).size for data, _ in example.pictures}


def test_maps_are_of_readable_samples_the_same_for_every_checkpoint_and_others_for_another_seed(
    reader: ShardReader,
) -> None:
    first = attention_examples(model(0), PROCESSOR, reader, 0)
    later = attention_examples(model(1), PROCESSOR, reader, 0)
    assert keys(first) == keys(later)
    assert len(set(keys(first))) == 2
    assert all(int(key.split("-")[1]) >= 4 for key in keys(first))
    assert first[0].pictures[0] == later[0].pictures[0]  # the picture itself
    assert first[0].pictures[1] != later[0].pictures[1]  # the map
    chosen = {tuple(keys(attention_examples(model(0), PROCESSOR, reader, seed))) for seed in range(8)}
    assert len(chosen) > 2
    assert len(attention_examples(model(0), PROCESSOR, reader, 0, count=9)) == 4  # there are no more
    assert attention_examples(model(0), PROCESSOR, reader, 0, limit=3) == []


def test_an_example_has_the_picture_the_whole_caption_and_each_word(reader: ShardReader) -> None:
    for example in attention_examples(model(0), PROCESSOR, reader, 0, count=4):
        assert example.right is None
        words = example.title.strip("“”").split()
        captions = [caption.split(",")[0] for _, caption in example.pictures]
        assert captions == ["picture", "whole caption", *words]
        assert sizes(example) == {(160, 160)}
        assert sum(len(data) for data, _ in example.pictures) < 60_000


def _with(reader: ShardReader, sample: RawSample, modality: str) -> ShardReader:
    """A reader that gives ``sample`` at every place."""
    manifest = Manifest.model_validate(reader.manifest.model_dump() | {"modality": modality})
    changed = ShardReader(reader.dataset, manifest)
    changed.read = lambda shard, row: sample  # type: ignore[method-assign]
    return changed


def test_a_clip_is_a_strip_of_its_frames_and_a_long_caption_is_cut(reader: ShardReader) -> None:
    clip = sorted(CLIPS.glob("*.mp4"))[0].read_bytes()
    caption = "one two three four five six seven eight nine ten eleven twelve"
    sample = dataclasses.replace(reader.read(0, 4), media=clip, extension="mp4", captions=[caption])
    (example,) = attention_examples(model(0), PROCESSOR, _with(reader, sample, "video"), 0, count=1, frames=4)
    assert len(example.pictures) == 2 + 10
    assert dict(example.lines)["words"] == "the first 10 of 12"
    assert sizes(example) == {(640, 160)}
    (many,) = attention_examples(model(0), PROCESSOR, _with(reader, sample, "video"), 0, count=1, frames=8)
    assert sizes(many) == {(640, 80)}
    frames = [
        np.asarray(Image.open(io.BytesIO(example.pictures[0][0])))[:, n * 160 : n * 160 + 160] for n in (0, 3)
    ]
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 0.5  # they move


def test_a_caption_without_a_word_is_passed_over_and_a_fault_of_the_storage_is_not(
    reader: ShardReader,
) -> None:
    sample = dataclasses.replace(reader.read(0, 4), captions=["?!"])
    assert attention_examples(model(0), PROCESSOR, _with(reader, sample, "image"), 0) == []

    def refuse(shard: int, row: int) -> RawSample:
        raise StorageFault("away")

    broken = _with(reader, sample, "image")
    broken.read = refuse  # type: ignore[method-assign]
    with pytest.raises(StorageFault):
        attention_examples(model(0), PROCESSOR, broken, 0)
