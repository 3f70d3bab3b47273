"""Promises of scenes as a source: listed without being made, made in tasks, the same for any number of workers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from pydantic import ValidationError

from sharding.config import PrepareConfig
from sharding.errors import UserError
from sharding.media import decode_image, decode_video
from sharding.prepare import prepare
from sharding.sources import open_source
from sharding.storage import open_storage
from tests.sharding.listings import configured, fetched, listed
from tests.sharding.scenes import OBJECTS, bundled, write_objects

_RULES = {"kind": "scenes", "objects": str(OBJECTS), "count": 12, "vocabulary": 40, "seed": 3}


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_images_are_stored_with_their_captions_the_same_by_any_workers(tmp_path, ray_session) -> None:
    config = PrepareConfig.model_validate(
        {"source": _RULES, "modality": "image", "samples_per_shard": 5, "image": {"format": "png"}}
    )
    folders = []
    for in_flight in (1, 3):
        storage = open_storage(tmp_path / str(in_flight))
        prepared = prepare("scenes", config, storage, in_flight=in_flight)
        folders.append(tmp_path / str(in_flight) / prepared.path)
    assert _files(folders[0]) == _files(folders[1])
    tars = [str(folders[0] / shard.tar) for shard in prepared.manifest.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 12
    scenes = bundled(seed=3)
    for number, sample in enumerate(samples):
        scene = scenes.scene(number)
        np.testing.assert_array_equal(sample["png"], scene.image())
        assert sample["json"]["captions"] == [caption.text for caption in scenes.captions(scene)]
        assert sample["json"]["source"] == f"scene/{number:06d}.png"


def test_clips_are_stored_with_their_captions(tmp_path, ray_session) -> None:
    config = PrepareConfig.model_validate(
        {"source": {**_RULES, "count": 3, "frames": 6}, "modality": "video"}
    )
    prepared = prepare("clips", config, open_storage(tmp_path), in_flight=2)
    (shard,) = prepared.manifest.shards
    samples = list(webdataset.WebDataset(str(tmp_path / prepared.path / shard.tar), shardshuffle=False))
    scenes = bundled(seed=3, frames=6)
    for number, sample in enumerate(samples):
        scene = scenes.clip(number)
        frames = decode_video(sample["mp4"], 6)
        assert frames.shape == (6, 224, 224, 3)
        assert np.abs(frames[5].astype(int) - scene.image(5)).mean() < 6
        captions = json.loads(sample["json"])["captions"]
        assert captions == [caption.text for caption in scenes.captions(scene)]
    assert len(samples) == 3


def test_the_first_scenes_are_the_same_whatever_the_count() -> None:
    storage = open_storage(OBJECTS.parent)
    few, many = (fetched(configured(**{**_RULES, "count": count}), storage) for count in (2, 5))
    assert [item.media for item in many[:2]] == [item.media for item in few]
    assert many[4].input.captions
    assert decode_image(many[4].media).shape == (224, 224, 3)


@pytest.mark.parametrize("change", [{"seed": 4}, {"count": 13}, {"vocabulary": 41}, {"split": "test"}])
def test_another_rule_is_another_listing(change) -> None:
    storage = open_storage(OBJECTS.parent)
    before, after = (
        listed(open_source(configured(**rules), storage))[1] for rules in (_RULES, {**_RULES, **change})
    )
    assert before != after


def test_another_picture_or_modality_is_another_listing(tmp_path) -> None:
    table, storage = write_objects(tmp_path), open_storage(tmp_path)
    rules = {"kind": "scenes", "objects": str(table), "count": 2, "held_out": 0.2}
    digests = {
        listed(open_source(configured(modality, **rules), storage))[1] for modality in ("image", "video")
    }
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes() + b"x")
    digests.add(listed(open_source(configured(**rules), storage))[1])
    assert len(digests) == 3


def test_listing_opens_no_picture_and_a_bad_one_ends_the_preparation_in_one_line(
    tmp_path, ray_session
) -> None:
    table = write_objects(tmp_path / "objects")
    for picture in table.parent.glob("*.png"):
        picture.write_bytes(b"no picture")
    rules = {"kind": "scenes", "objects": str(table), "count": 2, "held_out": 0.2}
    config = configured(**rules)
    inputs, _ = listed(open_source(config, open_storage(tmp_path)))
    assert [item.address for item in inputs] == ["scene/000000.png", "scene/000001.png"]
    with pytest.raises(UserError, match=r"the cut-out file:///.*\.png cannot be used"):
        prepare("bad", config, open_storage(tmp_path / "out"), in_flight=1)


def test_no_scenes_and_no_table_are_refused_before_anything_starts(tmp_path) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        configured(**{**_RULES, "count": 0})
    with pytest.raises(UserError, match="no such table of objects"):
        listed(
            open_source(
                configured(**{**_RULES, "objects": str(tmp_path / "x.jsonl")}), open_storage(tmp_path)
            )
        )
