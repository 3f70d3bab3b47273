"""A scene: a plan, its layout, and their pixels when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from sharding.scenes.backgrounds import draw_background
from sharding.scenes.layout import Box, Layout, relation_of
from sharding.scenes.objects import OPAQUE, Kind
from sharding.scenes.plans import Group, Plan, Relation


@dataclass(frozen=True)
class Scene:
    """One image, or one clip where ``frames`` > 1.

    Args:
        number: of the scene in its split.
        kinds: of the plan's groups.
    """

    number: int
    plan: Plan
    layout: Layout
    kinds: tuple[Kind, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.plan.groups

    @property
    def frames(self) -> int:
        return len(self.layout.things[0].frames)

    def image(self, frame: int = 0) -> np.ndarray:
        """uint8 [H, W, 3]."""
        ground = Image.fromarray(self._ground)
        for thing in self.layout.things:
            sprite, x, y = thing.frames[frame]
            cutout = Image.fromarray(sprite)
            ground.paste(cutout.convert("RGB"), (x, y), cutout.getchannel("A"))
        return np.asarray(ground)

    @cached_property
    def _ground(self) -> np.ndarray:
        """uint8 [H, W, 3]: the background, the same in all frames."""
        return draw_background(self.plan.background, self.layout.width, self.layout.height)

    def boxes(self, group: int, frame: int = 0) -> list[Box]:
        """(x1, y1, x2, y2) of each object of a group, tight; x2 and y2 are the first pixel outside."""
        return [thing.box(frame) for thing in self.layout.things if thing.group == group]

    def masks(self, group: int, frame: int = 0) -> list[np.ndarray]:
        """uint8 [H, W] for each object of a group, 1 where it is: its alpha is a half or more."""
        masks = []
        for thing in self.layout.things:
            if thing.group == group:
                mask = np.zeros((self.layout.height, self.layout.width), np.uint8)
                x1, y1, x2, y2 = thing.box(frame)
                mask[y1:y2, x1:x2] = thing.frames[frame][0][..., 3] >= OPAQUE
                masks.append(mask)
        return masks

    def mask(self, group: int, frame: int = 0) -> np.ndarray:
        """uint8 [H, W], 1 where any object of the group is."""
        return np.maximum.reduce(self.masks(group, frame))

    def relation(self, first: int, second: int) -> Relation | None:
        """How one group lies to another in every frame, where that is beyond doubt."""
        found = {
            relation_of(self.boxes(first, frame), self.boxes(second, frame)) for frame in range(self.frames)
        }
        return found.pop() if len(found) == 1 else None

    def place(self, group: int) -> tuple[str, str] | None:
        """("left" | "middle" | "right", "top" | "middle" | "bottom") of a single still object; None where the
        object is near the border of two.
        """
        (box, *others) = self.boxes(group)
        if others or self.frames > 1:
            return None
        across = _third((box[0] + box[2]) / 2 / self.layout.width)
        down = _third((box[1] + box[3]) / 2 / self.layout.height)
        if across is None or down is None:
            return None
        return ("left", "middle", "right")[across], ("top", "middle", "bottom")[down]


def _third(share: float) -> int | None:
    if share <= 0.34:
        return 0
    if 0.4 <= share <= 0.6:
        return 1
    return 2 if share >= 0.66 else None
