"""What a scene shows, drawn by seed: groups of objects, their relation, their motions, the background.

A plan has no pixels and no places yet; ``layout`` finds those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from sharding.errors import UserError
from sharding.scenes.colors import NAMES
from sharding.scenes.config import SceneRules
from sharding.scenes.objects import Objects
from sharding.scenes.splits import pair_draws, pairs_of
from sharding.scenes.words import last_word
from sharding.seeds import derive_seed, generator

T = TypeVar("T")
Size = Literal["small", "medium", "large"]
Relation = Literal["left", "right", "above", "below"]
Motion = Literal["left", "right", "up", "down", "grows", "shrinks", "still"]

RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
MOTIONS: tuple[Motion, ...] = ("left", "right", "up", "down", "grows", "shrinks", "still")
PATTERNS = ("plain", "plain", "shaded", "cloudy", "striped", "dotted", "checkered")
INVERSE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
# More things than this leave no room for a large one.
_ROOM_FOR_LARGE = 3
_MOST_THINGS = 7


@dataclass(frozen=True)
class Group:
    """Objects of one kind that look alike.

    Args:
        kind: number in ``Objects.kinds``.
        cutout: number of the picture of that kind.
        tint: the colour it was given; None: its own.
        color: the name of the colour that it has, where a name is right.
        motion: in clips.
    """

    kind: int
    cutout: int
    count: int = 1
    tint: str | None = None
    color: str | None = None
    size: Size = "medium"
    motion: Motion = "still"


@dataclass(frozen=True)
class Background:
    """``color`` is one of ``colors.NAMES``; ``seed`` is of the pattern's details."""

    color: str
    pattern: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """``relation``: of all of the first group to all of the second; None where there is one group."""

    groups: tuple[Group, ...]
    relation: Relation | None
    background: Background

    @property
    def things(self) -> int:
        return sum(group.count for group in self.groups)


class Vocabulary:
    """The kinds that a split shows, and which of them it may show together."""

    def __init__(self, rules: SceneRules, objects: Objects) -> None:
        self._rules, self.objects = rules, objects
        kinds = objects.kinds
        drawn = sorted(
            range(len(kinds)),
            key=lambda kind: derive_seed(rules.split_seed, "scenes.vocabulary", kinds[kind].name),
        )
        if rules.vocabulary is not None:
            if rules.vocabulary > len(kinds):
                raise UserError(
                    f"vocabulary: {rules.vocabulary} objects asked for, the table has {len(kinds)}"
                )
            drawn = drawn[: rules.vocabulary]
        #: Numbers of kinds, in the order of the table.
        self.kinds: list[int] = sorted(drawn)
        names = [kinds[kind].name for kind in self.kinds]
        draws = pair_draws(names, rules.split_seed)
        own = pairs_of(rules.split, draws, rules.held_out)
        last = np.array([last_word(name) for name in names])
        clear = last[:, None] != last[None, :]  # none could be called by the other's name
        self._pairs = own & clear
        # Beside a pair of the split, one of train will do.
        self._beside = (own | pairs_of("train", draws, rules.held_out)) & clear
        self._rows = {kind: row for row, kind in enumerate(self.kinds)}
        #: The kinds that come first in a scene: all that have a partner.
        self.mains = [kind for kind, some in zip(self.kinds, self._pairs.any(1), strict=True) if some]
        if not self.mains:
            raise UserError(
                f"the {len(self.kinds)} objects leave no pair for the split {rules.split!r}: take more objects, "
                "a larger held_out, or another split_seed"
            )

    def main(self, number: int) -> int:
        """The first kind of scene ``number``: each has its turn once in ``len(mains)`` scenes, in shuffled order."""
        cycle, place = divmod(number, len(self.mains))
        rules = self._rules
        rng = generator(derive_seed(rules.seed, "scenes.turns", rules.split, cycle))
        return self.mains[int(rng.permutation(len(self.mains))[place])]

    def partners(self, kind: int) -> list[int]:
        """The kinds that make a pair of this split with one of ``mains``."""
        return [self.kinds[row] for row in np.flatnonzero(self._pairs[self._rows[kind]])]

    def third(self, first: int, second: int, rng: np.random.Generator) -> int | None:
        """A kind that may be shown with both of a pair, or None."""
        choices = np.flatnonzero(self._beside[self._rows[first]] & self._beside[self._rows[second]])
        return self.kinds[int(choices[rng.integers(len(choices))])] if choices.size else None

    def absent(self, shown: Sequence[int], rng: np.random.Generator) -> int | None:
        """A kind that none of those shown could be taken for, or None."""
        kinds = self.objects.kinds
        for _ in range(50):
            kind = self.kinds[int(rng.integers(len(self.kinds)))]
            if not any(kind == other or kinds[kind].conflicts(kinds[other]) for other in shown):
                return kind
        return None


class Planner:
    """Draws plans of a split. Every method is a pure function of its arguments and the rules."""

    def __init__(self, rules: SceneRules, objects: Objects) -> None:
        self.rules, self.objects = rules, objects
        self.vocabulary = Vocabulary(rules, objects)

    def rng(self, purpose: str, *keys: int | str) -> np.random.Generator:
        """The draws of one thing, named and keyed; splits have draws of their own."""
        return generator(derive_seed(self.rules.seed, f"scenes.{purpose}", self.rules.split, *keys))

    def picture(self, number: int) -> Plan:
        """Of an image: one to three groups; held-out splits show a held-out pair in every scene."""
        rng = self.rng("plan", number)
        rules = self.rules
        alone = rules.most_kinds == 1 or (rules.split == "train" and rng.random() < 0.25)
        first = self.vocabulary.main(number)
        if alone:
            return self.single(first, rng)
        second = _choice(self.vocabulary.partners(first), rng)
        kinds = [first, second]
        if rules.most_kinds == 3 and rng.random() < 0.35:
            third = self.vocabulary.third(first, second, rng)
            kinds += [] if third is None else [third]
        if rng.random() < 0.5:
            kinds[:2] = second, first
        return self.shown(kinds, rng)

    def single(self, kind: int, rng: np.random.Generator, alone: bool = False) -> Plan:
        """Of one kind; ``alone``: one object only."""
        count = 1 if alone or rng.random() < 0.5 else int(rng.integers(1, self.rules.most_alike + 1))
        return self.planned([kind], [count], None, rng)

    def shown(self, kinds: Sequence[int], rng: np.random.Generator) -> Plan:
        """Of these two or three kinds, with counts and a relation as they come."""
        counts = [1] * len(kinds)
        for place in range(len(kinds)):
            if rng.random() < 0.4:
                room = _MOST_THINGS - sum(counts) + 1
                counts[place] = int(rng.integers(1, min(self.rules.most_alike, room) + 1))
        return self.planned(kinds, counts, RELATIONS[int(rng.integers(4))], rng)

    def planned(
        self, kinds: Sequence[int], counts: Sequence[int], relation: Relation | None, rng: np.random.Generator
    ) -> Plan:
        """With colours, sizes and a background as they come."""
        groups: list[Group] = []
        large = sum(counts) <= _ROOM_FOR_LARGE
        for kind, count in zip(kinds, counts, strict=True):
            size: Size = ("small", "medium", "medium", "large")[int(rng.integers(4))]
            if size == "large" and (not large or count > 1):
                size = "medium"
            large = large and size != "large"
            groups.append(self.group(kind, count, size, rng))
        return Plan(tuple(groups), relation, self.background(groups, rng))

    def group(self, kind: int, count: int, size: Size, rng: np.random.Generator) -> Group:
        """Of this kind; one in ``recolored`` of those that can have another colour has one."""
        cutout = int(rng.integers(len(self.objects.kinds[kind].cutouts)))
        colors = self.objects.colors(kind, cutout)
        tint = _choice(colors, rng) if colors and rng.random() < self.rules.recolored else None
        color = tint or self.objects.color(kind, cutout)
        return Group(kind, cutout, count, tint, color, size)

    def background(self, groups: Sequence[Group], rng: np.random.Generator) -> Background:
        """Of no colour that an object in front of it has."""
        taken = {group.color for group in groups}
        color = _choice([name for name in NAMES if name not in taken], rng)
        return Background(color, PATTERNS[int(rng.integers(len(PATTERNS)))], int(rng.integers(2**31)))

    def clip(self, number: int) -> Plan:
        """Of a clip: one object, or two of which one at least moves; never more, so that none is in the way."""
        rng = self.rng("clip", number)
        first = self.vocabulary.main(number)
        kinds = [first]
        if self.rules.most_kinds > 1 and (self.rules.split != "train" or rng.random() < 0.6):
            kinds.append(_choice(self.vocabulary.partners(first), rng))
        motions = [MOTIONS[int(rng.integers(6))], MOTIONS[int(rng.integers(7))]]
        groups = []
        for kind, motion in zip(kinds, motions, strict=False):
            drawn = self.group(kind, 1, "medium", rng)
            groups.append(Group(kind, drawn.cutout, 1, drawn.tint, drawn.color, "medium", motion))
        if rng.random() < 0.5:
            groups.reverse()
        return Plan(tuple(groups), None, self.background(groups, rng))


def _choice(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]
