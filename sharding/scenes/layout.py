"""Where the objects of a plan are: no two overlap, and the planned relation holds.

Relations are told from boxes alone, and only where nobody would doubt them: one group is to the left of another if
all of it ends before the other begins, and the way from middle to middle goes more sideways than up or down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharding.scenes.objects import OPAQUE, Objects, resized_cutout
from sharding.scenes.plans import Group, Motion, Plan, Relation

# The longer side of an object in shorter sides of the scene, by how many things it shares it with.
_SMALL, _LARGE = (0.15, 0.18), (0.44, 0.52)
_MEDIUM = {1: (0.28, 0.34), 2: (0.28, 0.33), 3: (0.26, 0.31), 4: (0.24, 0.27), 5: (0.23, 0.26)}
_MEDIUM_CROWDED = (0.21, 0.24)
_MEDIUM_MOVING = (0.26, 0.32)
#: No object is longer than this share of the scene's shorter side.
LONGEST = 0.52
_GAP = 0.02
_TURNED = 12.0  # degrees, at most, to either side
_TRIES, _PLACES = 60, 60
_SHRINK = (1.0, 0.92, 0.85, 0.78)
_HALF_GROWN = 0.5
_BAND = 0.42  # of the height

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; x2 and y2 are the first outside


@dataclass(frozen=True)
class Thing:
    """One object: its group's number, its sprite (uint8 [h, w, 4], tight around the object), its places.

    ``frames``: of each frame the sprite and the (x, y) of its upper left corner; one frame in an image.
    """

    group: int
    frames: tuple[tuple[np.ndarray, int, int], ...]

    def box(self, frame: int = 0) -> Box:
        """Tight around the object's pixels."""
        sprite, x, y = self.frames[frame]
        return x, y, x + sprite.shape[1], y + sprite.shape[0]


@dataclass(frozen=True)
class Layout:
    """The things of a plan in the order of its groups, in a scene of this size in pixels."""

    width: int
    height: int
    things: tuple[Thing, ...]


def relation_of(first: Sequence[Box], second: Sequence[Box]) -> Relation | None:
    """How the first group lies to the second, where that is beyond doubt."""
    one, other = _around(first), _around(second)
    across = (other[0] + other[2] - one[0] - one[2]) / 2
    down = (other[1] + other[3] - one[1] - one[3]) / 2
    if abs(across) > abs(down):
        if one[2] <= other[0]:
            return "left"
        return "right" if other[2] <= one[0] else None
    if abs(down) > abs(across):
        if one[3] <= other[1]:
            return "above"
        return "below" if other[3] <= one[1] else None
    return None


def _around(boxes: Sequence[Box]) -> Box:
    return (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )


def sprite_of(objects: Objects, group: Group, side: int, angle: float) -> np.ndarray:
    """uint8 [h, w, 4]: the cut-out with its longer side at ``side`` pixels, turned, tight around the object."""
    pixels = objects.pixels(group.kind, group.cutout, group.tint)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    turned = resized_cutout(pixels, size, angle)
    inside = turned[..., 3] >= OPAQUE
    if not inside.any():  # too thin for its size
        turned = turned.copy()
        turned[..., 3] = np.where(turned[..., 3] == turned[..., 3].max(), 255, turned[..., 3])
        inside = turned[..., 3] >= OPAQUE
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return np.ascontiguousarray(turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def place_picture(plan: Plan, objects: Objects, width: int, height: int, rng: np.random.Generator) -> Layout:
    """Places for an image."""
    short = min(width, height)
    drawn = []
    for number, group in enumerate(plan.groups):
        low, high = _side_range(group, plan.things)
        side = rng.uniform(low, high) * short  # those of a group are alike
        drawn += [(number, group, side, rng.uniform(-_TURNED, _TURNED)) for _ in range(group.count)]
    for shrink in _SHRINK:
        sprites = [sprite_of(objects, group, round(side * shrink), angle) for _, group, side, angle in drawn]
        groups = [number for number, *_ in drawn]
        for _ in range(_TRIES):
            boxes = _try_places(plan, groups, sprites, (width, height), rng)
            if boxes is not None:
                things = tuple(
                    Thing(number, ((sprite, box[0], box[1]),))
                    for number, sprite, box in zip(groups, sprites, boxes, strict=True)
                )
                return Layout(width, height, things)
    raise AssertionError(f"no room for {plan}")


def _side_range(group: Group, things: int) -> tuple[float, float]:
    if group.size == "medium":
        return _MEDIUM.get(things, _MEDIUM_CROWDED)
    return _SMALL if group.size == "small" else _LARGE


def _try_places(
    plan: Plan,
    groups: Sequence[int],
    sprites: Sequence[np.ndarray],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> list[Box] | None:
    """Boxes that keep apart and in which the relation holds, or None where this draw found none."""
    regions = _regions(plan, groups, sprites, size)
    boxes: dict[int, Box] = {}
    gap = max(1, round(_GAP * min(size)))
    # Large ones first, while there is room.
    for thing in sorted(range(len(groups)), key=lambda number: -max(sprites[number].shape)):
        region = regions[groups[thing]] if groups[thing] < len(regions) else (0, 0, *size)
        for box in _places(sprites[thing], region, rng):
            if not any(_close(box, other, gap) for other in boxes.values()):
                boxes[thing] = box
                break
        else:
            return None
    placed = [boxes[thing] for thing in range(len(groups))]
    if plan.relation is not None:
        first, second = ([box for box, g in zip(placed, groups, strict=True) if g == n] for n in (0, 1))
        if relation_of(first, second) != plan.relation:
            return None
    return placed


def _regions(
    plan: Plan, groups: Sequence[int], sprites: Sequence[np.ndarray], size: tuple[int, int]
) -> list[Box]:
    """Where the first two groups may be: the scene cut in two by the relation, by how much room each needs."""
    width, height = size
    if plan.relation is None:
        return [(0, 0, width, height)]
    sideways = plan.relation in ("left", "right")
    needs = []
    for number in (0, 1):
        own = [sprite for sprite, group in zip(sprites, groups, strict=True) if group == number]
        area = sum(sprite.shape[0] * sprite.shape[1] for sprite in own)
        needs.append(max(max(max(sprite.shape[:2]) for sprite in own), math.sqrt(2 * area)))
    leads = 0 if plan.relation in ("left", "above") else 1
    length = width if sideways else height
    cut = round(length * needs[leads] / sum(needs))
    ends = (
        ((0, 0, cut, height), (cut, 0, width, height))
        if sideways
        else ((0, 0, width, cut), (0, cut, width, height))
    )
    return [ends[0], ends[1]] if leads == 0 else [ends[1], ends[0]]


def _places(sprite: np.ndarray, region: Box, rng: np.random.Generator) -> Iterator[Box]:
    """Boxes of the sprite anywhere in a region."""
    height, width = sprite.shape[:2]
    room = region[2] - region[0] - width, region[3] - region[1] - height
    if min(room) < 0:
        return
    for _ in range(_PLACES):
        x = region[0] + int(rng.integers(room[0] + 1))
        y = region[1] + int(rng.integers(room[1] + 1))
        yield x, y, x + width, y + height


def _close(one: Box, other: Box, gap: int) -> bool:
    return (
        one[0] < other[2] + gap
        and other[0] < one[2] + gap
        and one[1] < other[3] + gap
        and other[1] < one[3] + gap
    )


def place_clip(
    plan: Plan, objects: Objects, width: int, height: int, frames: int, rng: np.random.Generator
) -> Layout:
    """Places for every frame of a clip: each thing keeps to its own part of the scene."""
    short = min(width, height)
    things = []
    for number, (group, cell) in enumerate(zip(plan.groups, _cells(plan, width, height, rng), strict=True)):
        side = round(rng.uniform(*_MEDIUM_MOVING) * short)
        angle = rng.uniform(-_TURNED, _TURNED)
        if group.motion == "grows" or group.motion == "shrinks":
            side = round(side * 1.25)
        things.append(Thing(number, tuple(_moves(group, objects, side, angle, cell, frames, rng))))
    return Layout(width, height, tuple(things))


def _cells(plan: Plan, width: int, height: int, rng: np.random.Generator) -> list[Box]:
    """Each thing's part of the scene: all of it for one; of two, parts that leave both a way to go."""
    if len(plan.groups) == 1:
        return [(0, 0, width, height)]
    sideways = [group.motion in ("left", "right") for group in plan.groups]
    upright = [group.motion in ("up", "down") for group in plan.groups]
    stacked = any(sideways) or (not any(upright) and rng.random() < 0.5)
    first_leads = bool(rng.random() < 0.5)
    share = 0.5
    if any(sideways) and any(upright):
        # A band is enough for what goes sideways; what goes up or down needs more.
        share = _BAND if sideways[0 if first_leads else 1] else 1 - _BAND
    if stacked:
        cut = round(height * share)
        halves: list[Box] = [(0, 0, width, cut), (0, cut, width, height)]
    else:
        cut = width // 2
        halves = [(0, 0, cut, height), (cut, 0, width, height)]
    return halves if first_leads else halves[::-1]


def _moves(
    group: Group,
    objects: Objects,
    side: int,
    angle: float,
    cell: Box,
    frames: int,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(sprite, x, y) of every frame."""
    sprite = sprite_of(objects, group, side, angle)
    height, width = sprite.shape[:2]
    room_x, room_y = cell[2] - cell[0] - width, cell[3] - cell[1] - height
    assert min(room_x, room_y) >= 0, "a moving object fits its part of the scene"
    start = np.array([rng.uniform(0.05, 0.95) * room_x, rng.uniform(0.05, 0.95) * room_y])
    end = start.copy()
    first, last = rng.uniform(0, 0.1), rng.uniform(0.9, 1)
    if group.motion in ("left", "right"):
        start[0], end[0] = (first * room_x, last * room_x)[:: 1 if group.motion == "right" else -1]
    elif group.motion in ("up", "down"):
        start[1], end[1] = (first * room_y, last * room_y)[:: 1 if group.motion == "down" else -1]
    for frame in range(frames):
        share = frame / (frames - 1)
        place = start + (end - start) * share
        scaled = _scaled(group.motion, share)
        shown = sprite if scaled == 1 else sprite_of(objects, group, max(2, round(side * scaled)), angle)
        # What grows and shrinks keeps its middle.
        x = cell[0] + place[0] + (width - shown.shape[1]) / 2
        y = cell[1] + place[1] + (height - shown.shape[0]) / 2
        yield shown, int(x), int(y)


def _scaled(motion: Motion, share: float) -> float:
    if motion == "grows":
        return _HALF_GROWN + (1 - _HALF_GROWN) * share
    return 1 - (1 - _HALF_GROWN) * share if motion == "shrinks" else 1.0
