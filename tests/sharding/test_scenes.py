"""Promises of scenes: what is said of a picture is what its pixels show, and equal rules give equal scenes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sharding.media import decode_video
from sharding.scenes.backgrounds import draw_background
from sharding.scenes.colors import HUES, NAMES, color_of, named_pixels, recolored
from sharding.scenes.generator import Scenes, encode_clip
from sharding.scenes.layout import relation_of
from sharding.scenes.plans import PATTERNS, Background
from sharding.scenes.scene import Scene
from tests.sharding.scenes import bundled


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return bundled(vocabulary=None)


def _alone_on(scene: Scene, group: int, color: str) -> np.ndarray:
    """float [H, W, 3]: the objects of one group only, on a plain background."""
    things = tuple(thing for thing in scene.layout.things if thing.group == group)
    plan = replace(scene.plan, background=Background(color, "plain", 0))
    return replace(scene, plan=plan, layout=replace(scene.layout, things=things)).image().astype(float)


def test_a_mask_is_where_half_of_the_light_or_more_is_the_objects(scenes: Scenes) -> None:
    """Told from pixels alone: the same objects on black and on white differ where they let light through."""
    black, white = (draw_background(Background(name, "plain", 0), 8, 8)[0, 0] for name in ("black", "white"))
    for number in range(12):
        scene = scenes.scene(number)
        for group in range(len(scene.groups)):
            dark, light = (_alone_on(scene, group, name) for name in ("black", "white"))
            alpha = 1 - ((light - dark) / (white.astype(float) - black)).mean(-1)
            mask = scene.mask(group).astype(bool)
            # A step of 8 bits either way is rounding.
            assert alpha[mask].min() > 0.5 - 0.01
            assert alpha[~mask].max() < 0.5 + 0.01


def test_within_a_mask_the_picture_is_the_cut_out_itself(scenes: Scenes) -> None:
    for number in range(12):
        scene = scenes.scene(number)
        image = scene.image()
        for thing in scene.layout.things:
            sprite, x, y = thing.frames[0]
            solid = sprite[..., 3] == 255
            shown = image[y : y + sprite.shape[0], x : x + sprite.shape[1]]
            assert solid.any()
            np.testing.assert_array_equal(shown[solid], sprite[solid][:, :3])


def test_boxes_are_tight_and_objects_keep_apart(scenes: Scenes) -> None:
    for number in range(40):
        scene = scenes.scene(number)
        masks = [scene.mask(group) for group in range(len(scene.groups))]
        assert sum(mask.astype(int) for mask in masks).max() == 1
        for group, mask in enumerate(masks):
            boxes = scene.boxes(group)
            assert len(boxes) == scene.groups[group].count
            left = mask.copy()
            for x1, y1, x2, y2 in boxes:
                inside = left[y1:y2, x1:x2]
                assert inside[0].any()
                assert inside[-1].any()
                assert inside[:, 0].any()
                assert inside[:, -1].any()
                inside[:] = 0
            assert not left.any()


def test_planned_relations_hold_for_every_object_of_both_groups(scenes: Scenes) -> None:
    seen = set()
    for number in range(80):
        scene = scenes.scene(number)
        if len(scene.groups) < 2:
            continue
        ones, others = np.array(scene.boxes(0)), np.array(scene.boxes(1))
        apart = {
            "left": ones[:, 2].max() <= others[:, 0].min(),
            "right": ones[:, 0].min() >= others[:, 2].max(),
            "above": ones[:, 3].max() <= others[:, 1].min(),
            "below": ones[:, 1].min() >= others[:, 3].max(),
        }
        assert apart[scene.plan.relation]
        assert scene.relation(0, 1) == scene.plan.relation
        seen.add(scene.plan.relation)
    assert seen == {"left", "right", "above", "below"}


@pytest.mark.parametrize(
    ("other", "relation"),
    [
        ((30, 2, 40, 12), "left"),
        ((-30, 2, -20, 12), "right"),
        ((2, 30, 12, 40), "above"),
        ((2, -30, 12, -20), "below"),
        ((12, 40, 22, 50), "above"),  # further down than to the side
        ((20, 20, 30, 30), None),  # as far down as to the side
        ((5, 2, 15, 12), None),  # they overlap
    ],
)
def test_a_relation_is_named_only_where_it_is_beyond_doubt(other, relation) -> None:
    assert relation_of([(0, 0, 10, 10)], [other]) == relation


def test_sizes_that_are_named_differ_for_everyone_to_see(scenes: Scenes) -> None:
    sides: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    for number in range(150):
        scene = scenes.scene(number)
        for thing in scene.layout.things:
            x1, y1, x2, y2 = thing.box()
            sides[scene.groups[thing.group].size].append(max(x2 - x1, y2 - y1))
    assert max(sides["small"]) < np.median(sides["medium"]) < min(sides["large"])


def test_objects_have_the_colour_that_is_said(scenes: Scenes) -> None:
    tinted = 0
    for number in range(120):
        scene = scenes.scene(number)
        for thing in scene.layout.things:
            group = scene.groups[thing.group]
            if group.tint is not None:
                assert group.color == group.tint
                assert color_of(thing.frames[0][0]) == group.tint
                tinted += 1
    assert tinted > 20


def test_a_plain_patch_of_each_colour_is_called_by_its_name() -> None:
    patches = {
        "black": (20, 20, 22), "white": (250, 250, 250), "gray": (140, 142, 140), "red": (220, 30, 40),
        "orange": (250, 140, 20), "yellow": (250, 220, 40), "green": (40, 160, 60), "blue": (40, 90, 220),
        "purple": (130, 60, 190), "pink": (250, 140, 200), "brown": (120, 75, 40),
    }  # fmt: skip
    assert set(patches) == set(NAMES)
    for name, rgb in patches.items():
        assert color_of(np.full((4, 4, 4), (*rgb, 255), np.uint8)) == name
    half = np.full((4, 4, 4), (220, 30, 40, 255), np.uint8)
    half[:2] = (40, 90, 220, 255)
    assert color_of(half) is None
    assert color_of(np.zeros((4, 4, 4), np.uint8)) is None


def test_turning_hues_gives_the_colour_asked_for_and_keeps_alpha() -> None:
    red = np.full((6, 6, 4), (220, 40, 40, 255), np.uint8)
    red[0, :, 3] = 7
    for name in HUES:
        turned = recolored(red, name)
        assert color_of(turned) == name
        np.testing.assert_array_equal(turned[..., 3], red[..., 3])


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS)))
@pytest.mark.parametrize("color", NAMES)
def test_a_background_has_the_colour_that_it_is_called(color: str, pattern: str) -> None:
    for seed in range(5):
        pixels = draw_background(Background(color, pattern, seed), 96, 64)
        assert pixels.shape == (64, 96, 3)
        share = (named_pixels(pixels) == NAMES.index(color)).mean()
        assert share > 0.9, (share, seed)


def test_what_moves_moves_as_said_and_nothing_is_in_its_way() -> None:
    scenes, seen = bundled(vocabulary=None), set()
    for number in range(60):
        scene = scenes.clip(number)
        assert scene.frames == 16
        for group, shown in enumerate(scene.groups):
            (first,), (last,) = scene.boxes(group, 0), scene.boxes(group, 15)
            moved = np.array(last) - first
            across, down = moved[0] + moved[2], moved[1] + moved[3]
            grown = (last[2] - last[0]) / (first[2] - first[0])
            told = {
                "left": across < -60 and down == 0,
                "right": across > 60 and down == 0,
                "up": down < -60 and across == 0,
                "down": down > 60 and across == 0,
                "grows": grown > 1.6,
                "shrinks": grown < 0.63,
                "still": not moved.any(),
            }
            assert [name for name, true in told.items() if true] == [shown.motion]
            seen.add(shown.motion)
        for frame in range(scene.frames):
            masks = [scene.mask(group, frame) for group in range(len(scene.groups))]
            assert sum(mask.astype(int) for mask in masks).max() == 1
    assert seen == {"left", "right", "up", "down", "grows", "shrinks", "still"}


def test_a_clip_is_h264_of_the_frames_that_are_told_of() -> None:
    scene = bundled(frames=6, fps=4).clip(3)
    frames = decode_video(encode_clip(scene, 4), 6)
    assert frames.shape == (6, 224, 224, 3)
    for number in range(6):
        assert np.abs(frames[number].astype(int) - scene.image(number)).mean() < 6


@pytest.mark.parametrize(("width", "height"), [(64, 64), (320, 160), (100, 220)])
def test_scenes_have_any_size(width: int, height: int) -> None:
    scenes = bundled(width=width, height=height, split="test")
    for number in range(10):
        assert scenes.scene(number).image().shape == (height, width, 3)
        assert scenes.clip(number).image(15).shape == (height, width, 3)


def test_equal_rules_give_equal_scenes_in_any_order() -> None:
    one, other = bundled(seed=5), bundled(seed=5)
    numbers = [0, 3, 7, 120]
    first = {number: one.scene(number).image() for number in numbers}
    for number in reversed(numbers):
        scene = other.scene(number)
        np.testing.assert_array_equal(scene.image(), first[number])
        assert other.captions(scene) == one.captions(one.scene(number))
        assert other.questions(scene) == one.questions(one.scene(number))
        assert encode_clip(other.clip(number), 8) == encode_clip(one.clip(number), 8)
        (left, right), _ = other.statement(number).pairs
        (before, after), _ = one.statement(number).pairs
        assert other.statement(number).text == one.statement(number).text
        np.testing.assert_array_equal(left.image(), before.image())
        np.testing.assert_array_equal(right.image(), after.image())


def test_another_seed_and_another_number_give_another_scene() -> None:
    pictures = [bundled(seed=seed).scene(number).image().tobytes() for seed in (0, 1) for number in range(5)]
    assert len(set(pictures)) == 10


def _together(scenes: Scenes, numbers: range) -> tuple[set[frozenset[str]], set[str]]:
    """(pairs of objects that some image, clip or image of a statement shows together, all objects shown)."""
    pairs: set[frozenset[str]] = set()
    names: set[str] = set()
    for number in numbers:
        statement = scenes.statement(number)
        shown = [scenes.scene(number), scenes.clip(number), *(s for pair in statement.pairs for s in pair)]
        for scene in shown:
            kinds = [kind.name for kind in scene.kinds]
            assert len(set(kinds)) == len(kinds)
            names.update(kinds)
            pairs |= {frozenset((one, other)) for one in kinds for other in kinds if one != other}
    return pairs, names


def test_no_pair_that_is_held_out_is_ever_shown_in_training_whatever_the_seeds() -> None:
    small = {"width": 64, "height": 64, "vocabulary": 24}
    trained, objects = set(), set()
    for seed in (0, 1):
        pairs, names = _together(bundled(seed=seed, **small), range(70))
        trained |= pairs
        objects |= names
    tested = [bundled(seed=9, split=split, **small) for split in ("val", "test")]
    held = []
    for scenes in tested:
        pairs, names = _together(scenes, range(40))
        assert names <= objects
        held.append(pairs - trained)
        for number in range(40):
            for scene in (scenes.scene(number), scenes.clip(number)):
                shown = [kind.name for kind in scene.kinds]
                assert any(frozenset((one, two)) in held[-1] for one in shown for two in shown)
    assert trained
    assert not held[0] & held[1]


def test_every_object_comes_first_once_before_one_comes_again() -> None:
    scenes = bundled(vocabulary=24)
    for start in (0, 24):
        mains = [scenes.vocabulary.main(number) for number in range(start, start + 24)]
        assert sorted(mains) == scenes.vocabulary.kinds
