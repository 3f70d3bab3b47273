"""Statements about two images, as NLVR2 has them: one true of a pair of scenes and false of another.

The two pairs differ in what the statement is about and in little else, so that neither the sentence nor one image
alone tells the answer. Whether a statement holds is asked of the finished scenes, not taken from how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sharding.scenes.captions import described, relation_phrase
from sharding.scenes.colors import NAMES
from sharding.scenes.plans import INVERSE, RELATIONS, Group, Plan, Planner
from sharding.scenes.scene import Scene
from sharding.scenes.words import NUMBERS, article

Pair = tuple[Plan, Plan]
_MOST_TOGETHER = 10  # numbers that have a word here


@dataclass(frozen=True)
class Draft:
    """A sentence, the plans of a (left, right) pair of which it is true and of one of which it is false."""

    text: str
    true: Pair
    false: Pair
    holds: Callable[[Scene, Scene], bool]


def draft(planner: Planner, number: int) -> Draft:
    """The statement of this number; its sort, objects and wording are drawn."""
    rng = planner.rng("statement", number)
    first = planner.vocabulary.main(number)
    partners = planner.vocabulary.partners(first)
    second = partners[int(rng.integers(len(partners)))]
    make = _SORTS[int(rng.integers(len(_SORTS)))]
    return make(planner, first, second, rng)


def _shown(scene: Scene, kind: int) -> int:
    """How many objects of a kind a scene shows."""
    return sum(group.count for group in scene.groups if group.kind == kind)


def _one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _counted(plan: Plan, count: int) -> Plan:
    """The plan of one group with another count."""
    (group,) = plan.groups
    # Several large ones have no room.
    size = "medium" if count > 1 and group.size == "large" else group.size
    return replace(plan, groups=(replace(group, count=count, size=size),))


def _alone(planner: Planner, kind: int, rng: np.random.Generator) -> Plan:
    return planner.single(kind, rng, alone=True)


def _total(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    most = max(2, planner.rules.most_alike)
    left, right, other = (int(count) for count in rng.permutation(most)[:3] + 1) if most > 2 else (1, 1, 2)
    left = min(left, _MOST_TOGETHER - right)
    kind = planner.objects.kinds[first]
    plans = [_counted(_alone(planner, first, rng), count) for count in (left, right)]
    wanted = left + right
    ways = ("There are exactly {} {} in the two images together.", "The two images show {} {} in total.")
    return Draft(
        _one_of(ways, rng).format(NUMBERS[wanted], kind.plural),
        (plans[0], plans[1]),
        (plans[0], _counted(plans[1], other)),
        lambda one, two: _shown(one, first) + _shown(two, first) == wanted,
    )


def _each(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    plans = planner.single(first, rng), planner.single(second, rng)
    groups = [plan.groups[0] for plan in plans]
    kinds = planner.objects.kinds

    def phrase(group: Group) -> str:
        kind = kinds[group.kind]
        return described(group, kind.name if group.count == 1 else kind.plural, size=False, color=True)

    def shows(scene: Scene, group: Group) -> bool:
        return any(
            (other.kind, other.count, other.color) == (group.kind, group.count, group.color)
            for other in scene.groups
        )

    ways = ("The left image shows {} and the right image shows {}.",
            "There {is} {} in the left image and {} in the right image.")  # fmt: skip
    text = _one_of(ways, rng).format(*map(phrase, groups), **{"is": "is" if groups[0].count == 1 else "are"})
    return Draft(
        text, plans, (plans[1], plans[0]), lambda one, two: shows(one, groups[0]) and shows(two, groups[1])
    )


def _both(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    name = planner.objects.kinds[first].name
    pair = planner.shown([first, second], rng)
    with_it, without = _alone(planner, first, rng), _alone(planner, second, rng)
    ways = ("Both images contain at least one {0}.", "There is at least one {0} in each image.")
    turned = bool(rng.random() < 0.5)
    return Draft(
        _one_of(ways, rng).format(name),
        (with_it, pair) if turned else (pair, with_it),
        (without, pair) if turned else (pair, without),
        lambda one, two: _shown(one, first) > 0 and _shown(two, first) > 0,
    )


def _related(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    relation = RELATIONS[int(rng.integers(4))]
    plan = planner.planned([first, second], [1, 1], relation, rng)
    other = _alone(planner, first if rng.random() < 0.5 else second, rng)
    names = [planner.objects.kinds[kind].name for kind in (first, second)]
    left = bool(rng.random() < 0.5)
    opposite = replace(plan, relation=INVERSE[relation])
    ways = (
        "In the {side} image the {} is {rel} the {}.",
        "The {} in the {side} image is {rel} the {}.",
    )
    text = _one_of(ways, rng).format(
        *names, side="left" if left else "right", rel=relation_phrase(relation, rng)
    )
    return Draft(
        text,
        (plan, other) if left else (other, plan),
        (opposite, other) if left else (other, opposite),
        lambda one, two: (
            len((one if left else two).groups) == 2 and (one if left else two).relation(0, 1) == relation
        ),
    )


def _more(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    kind = planner.objects.kinds[first]
    few, many = sorted(int(count) + 1 for count in rng.permutation(max(2, planner.rules.most_alike))[:2])
    plans = [_counted(_alone(planner, first, rng), count) for count in (many, few)]
    ways = ("The left image contains more {0} than the right image.",
            "There are more {0} in the left image than in the right one.")  # fmt: skip
    return Draft(
        _one_of(ways, rng).format(kind.plural),
        (plans[0], plans[1]),
        (plans[1], plans[0]),
        lambda one, two: _shown(one, first) > _shown(two, first),
    )


def _none(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    name = planner.objects.kinds[first].name
    with_it, without = planner.shown([first, second], rng), _alone(planner, second, rng)
    other = _alone(planner, first, rng)
    left = bool(rng.random() < 0.5)
    ways = ("There is no {} in the {} image.", "The {1} image does not contain {2} {0}.")
    text = _one_of(ways, rng).format(name, "left" if left else "right", article(name))
    return Draft(
        text,
        (without, other) if left else (other, without),
        (with_it, other) if left else (other, with_it),
        lambda one, two: _shown(one if left else two, first) == 0,
    )


def _backgrounds(planner: Planner, first: int, second: int, rng: np.random.Generator) -> Draft:
    plans = [_alone(planner, kind, rng) for kind in (first, second)]
    taken = {plan.groups[0].color for plan in plans}
    colors = [name for name in NAMES if name not in taken]
    same, other = (colors[int(place)] for place in rng.permutation(len(colors))[:2])
    one, two, different = (
        replace(plan, background=replace(plan.background, color=color))
        for plan, color in zip((*plans, plans[1]), (same, same, other), strict=True)
    )
    ways = ("The backgrounds of the two images have the same color.",
            "Both images have a background of the same color.")  # fmt: skip
    return Draft(
        _one_of(ways, rng),
        (one, two),
        (one, different),
        lambda left, right: left.plan.background.color == right.plan.background.color,
    )


_SORTS = (_total, _each, _both, _related, _more, _none, _backgrounds)
