"""Promises of the table of cut-outs: what is wrong with it is said in one line, before anything is made of it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sharding.errors import UserError
from sharding.scenes.config import SceneRules
from sharding.scenes.generator import Scenes
from sharding.scenes.objects import Objects, open_objects
from sharding.storage import open_storage
from tests.sharding.scenes import OBJECTS, bundled, write_objects


def _opened(path, side=64) -> Objects:
    return open_objects(path.as_uri(), open_storage(path.parent), side)


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def test_every_bundled_object_opens_has_a_name_of_its_own_and_a_plural() -> None:
    objects = _opened(OBJECTS)
    names = [kind.name for kind in objects.kinds]
    assert len(names) == len(set(names)) == 460
    for number, kind in enumerate(objects.kinds):
        assert kind.plural
        assert kind.name == kind.name.strip()
        assert (kind.plural != kind.name) or kind.name in {
            "sheep", "deer", "fish", "shrimp", "squid", "bison", "moose", "jellyfish",
        }  # fmt: skip
        pixels = objects.pixels(number, 0)
        assert pixels.shape[2] == 4
        assert max(pixels.shape) <= 64
    colored = [objects.color(number, 0) for number in range(460)]
    assert sum(color is not None for color in colored) > 120


def test_a_cut_out_is_trimmed_and_shrunk_and_keeps_its_colours(tmp_path) -> None:
    pixels = np.zeros((100, 200, 4), np.uint8)
    pixels[10:90, 20:60] = (200, 30, 30, 255)
    table = write_objects(tmp_path)
    (tmp_path / "0.png").write_bytes(_png(pixels))
    assert _opened(table, side=200).pixels(0, 0).shape == (80, 40, 4)
    small = _opened(table, side=40).pixels(0, 0)
    assert small.shape == (40, 20, 4)
    assert (small[5:-5, 5:-5] == (200, 30, 30, 255)).all()


def test_lines_of_one_name_are_pictures_of_one_kind_and_the_table_overrules_pixels(tmp_path) -> None:
    table = write_objects(tmp_path, 6)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[0] |= {"name": "cube", "plural": "cubi", "color": "green"}
    rows[1] |= {"name": "cube", "color": None}
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objects = _opened(table)
    assert [kind.name for kind in objects.kinds][:2] == ["cube", "thing c"]
    assert objects.kinds[0].plural == "cubi"
    assert len(objects.kinds[0].cutouts) == 2
    assert objects.color(0, 0) == "green"
    assert objects.color(0, 1) is None
    assert objects.colors(0, 1) == ()
    shown = {scene.groups[0].cutout for scene in _portraits(objects, 0)}
    assert shown == {0, 1}


def _portraits(objects: Objects, kind: int):
    scenes = Scenes(SceneRules(held_out=0.2), objects)
    return [scenes.portrait(kind, number) for number in range(12)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "line 3 has no path"),
        ('{"path": "0.png"}', "line 3 has no name"),
        ('{"path": "0.png", "name": " "}', "line 3 has no name"),
        ('{"path": "../0.png", "name": "x"}', "'../0.png' is not one below the table's folder"),
        ('{"path": "/etc/x.png", "name": "x"}', "is not one below the table's folder"),
        ('{"path": "none.png", "name": "x"}', "names none.png, which is not there"),
        ('{"path": "0.png", "name": "x", "color": "mauve"}', "color 'mauve' is none of black, white"),
        ('{"path": "0.png", "name": "x", "plural": 3}', "plural is no text"),
        ("[1]", "line 3 is not a JSON object"),
        ("no json", "line 3 is not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, said: str) -> None:
    table = write_objects(tmp_path, 2)
    table.write_text(table.read_text() + line + "\n")
    with pytest.raises(UserError) as caught:
        _opened(table)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_missing_empty_or_a_folder_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such table of objects: file:///"):
        _opened(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        _opened(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON lines in UTF-8"):
        _opened(tmp_path / "binary.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"no such table|is a folder"):
        _opened(tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no picture", "cannot be used .decode-failed"),
        (_png(np.zeros((8, 8, 4), np.uint8)), "is empty: all its pixels are transparent"),
        (_png(np.zeros((4097, 4097), np.uint8)), "cannot be used .too-many-pixels"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_when_it_is_needed(
    tmp_path, content: bytes, said: str
) -> None:
    table = write_objects(tmp_path, 6)
    (tmp_path / "0.png").write_bytes(content)
    objects = _opened(table)
    assert objects.pixels(1, 0).size
    with pytest.raises(UserError, match=rf"the cut-out file:///.*/0.png {said}"):
        objects.pixels(0, 0)


def test_the_digest_follows_the_table_and_the_sizes_of_its_pictures(tmp_path) -> None:
    table = write_objects(tmp_path, 6)
    before = _opened(table).digest
    assert _opened(table).digest == before
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes() + b"x")
    grown = _opened(table).digest
    table.write_text(table.read_text().replace("thing a", "thing z"))
    assert len({before, grown, _opened(table).digest}) == 3


def test_too_few_objects_and_impossible_rules_are_refused(tmp_path) -> None:
    objects = _opened(write_objects(tmp_path, 6))
    with pytest.raises(UserError, match="vocabulary: 7 objects asked for, the table has 6"):
        Scenes(SceneRules(vocabulary=7), objects)
    single = _opened(write_objects(tmp_path / "one", 1))
    with pytest.raises(UserError, match="take more objects"):
        Scenes(SceneRules(), single)
    with pytest.raises(ValidationError, match="most_kinds must be 2 or 3"):
        SceneRules(split="test", most_kinds=1)


def test_objects_that_could_be_called_by_each_others_name_are_never_shown_together() -> None:
    scenes = bundled(vocabulary=None, width=64, height=64)
    kinds = {kind.name: number for number, kind in enumerate(scenes.objects.kinds)}
    car, police_car = kinds["car"], kinds["police car"]
    assert police_car not in scenes.vocabulary.partners(car)
    rng = np.random.default_rng(0)
    absent = {scenes.vocabulary.absent([car], rng) for _ in range(3000)}
    assert police_car not in absent
    assert car not in absent
    assert len(absent) > 400
