"""Questions about a scene with their answers, as VQAv2 asks them.

An answer is true by construction; half of the yes/no questions are asked so that the answer is no.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sharding.scenes.captions import noun, relation_phrase
from sharding.scenes.colors import NAMES
from sharding.scenes.plans import INVERSE, Motion, Vocabulary
from sharding.scenes.scene import Scene
from sharding.scenes.words import article

AnswerType = Literal["yes/no", "number", "other"]
#: Annotators of one question, and how many of them may say something else: three that agree are right.
ANNOTATORS, _MOST_DISSENT = 10, 3

_SENTENCE_WAY = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


@dataclass(frozen=True)
class Question:
    """``wrong``: what someone who looks badly might answer, for annotators that disagree."""

    text: str
    answer: str
    answer_type: AnswerType
    question_type: str
    wrong: tuple[str, ...]

    def annotations(self, dissent: float, rng: np.random.Generator) -> list[str]:
        """Answers of ``ANNOTATORS`` people: at most three others than ``answer``, each with this probability."""
        others = min(_MOST_DISSENT, int(rng.binomial(ANNOTATORS, dissent)))
        answers = [self.answer] * (ANNOTATORS - others)
        answers += [self.wrong[int(rng.integers(len(self.wrong)))] for _ in range(others)]
        return [answers[int(place)] for place in rng.permutation(ANNOTATORS)]


def questions(scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator) -> list[Question]:
    """All questions that can be asked of a scene, in shuffled order."""
    found = [*_existence(scene, vocabulary, rng), *_counts(scene), *_colors(scene, rng)]
    if scene.frames > 1:
        found += _motions(scene, rng)
    else:
        found += [*_relations(scene, rng), *_sizes(scene), *_places(scene), *_comparisons(scene, rng)]
    return [found[int(place)] for place in rng.permutation(len(found))]


def _yes_no(text: str, true: bool, question_type: str) -> Question:
    answers = ("yes", "no") if true else ("no", "yes")
    return Question(text, answers[0], "yes/no", question_type, answers[1:])


def _existence(scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator) -> Iterator[Question]:
    objects = vocabulary.objects
    for number, group in enumerate(scene.groups):
        there = bool(rng.random() < 0.5)
        kind = group.kind if there else vocabulary.absent([other.kind for other in scene.groups], rng)
        if kind is None:
            continue
        name = objects.kinds[kind].name
        yield _yes_no(f"Is there {article(name)} {name} in the picture?", there, "is there a")
        if number == 0 and len(scene.groups) == 1:
            other = vocabulary.absent([group.kind], rng)
            wrong = (objects.kinds[other].name,) if other is not None else ("nothing",)
            yield Question("What is in the picture?", noun(scene, 0), "other", "what is in the", wrong)


def _counts(scene: Scene) -> Iterator[Question]:
    for number, group in enumerate(scene.groups):
        right = group.count
        wrong = tuple(str(near) for near in (right - 1, right + 1) if near > 0)
        text = f"How many {scene.kinds[number].plural} are there?"
        yield Question(text, str(right), "number", "how many", wrong)


def _colors(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    def others(color: str) -> tuple[str, ...]:
        return tuple(name for name in NAMES if name != color)

    for number, group in enumerate(scene.groups):
        if group.color is not None:
            verb = "is" if group.count == 1 else "are"
            text = f"What color {verb} the {noun(scene, number)}?"
            yield Question(text, group.color, "other", f"what color {verb} the", others(group.color))
    color = scene.plan.background.color
    yield Question("What color is the background?", color, "other", "what color is the", others(color))
    right = bool(rng.random() < 0.5)
    asked = color if right else others(color)[int(rng.integers(len(NAMES) - 1))]
    yield _yes_no(f"Is the background {asked}?", right, "is the")
    by_color = [group.color for group in scene.groups]
    for number, group in enumerate(scene.groups):
        # Asked only where every object has a colour, and this one alone has this one.
        if None not in by_color and len(by_color) > 1 and by_color.count(group.color) == 1:
            wrong = tuple(noun(scene, other) for other in range(len(by_color)) if other != number)
            verb, thing = ("is", "object") if group.count == 1 else ("are", "objects")
            text = f"What {verb} the {group.color} {thing}?"
            yield Question(text, noun(scene, number), "other", f"what {verb} the", wrong)


def _relations(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    groups = range(len(scene.groups))
    relations = {(a, b): scene.relation(a, b) for a in groups for b in groups if a != b}
    for (first, second), relation in relations.items():
        if relation is None:
            continue
        one, other = noun(scene, first), noun(scene, second)
        verb = "Is" if scene.groups[first].count == 1 else "Are"
        if first < second:
            right = bool(rng.random() < 0.5)
            asked = relation_phrase(relation if right else INVERSE[relation])
            yield _yes_no(f"{verb} the {one} {asked} the {other}?", right, f"{verb.lower()} the")
        if second < first:
            left, way = ("left", "right") if relation in ("left", "right") else ("above", "below")
            ways = (
                f"to the left or to the right of the {other}"
                if left == "left"
                else f"above or below the {other}"
            )
            wrong = (way if relation == left else left,)
            yield Question(f"{verb} the {one} {ways}?", relation, "other", f"{verb.lower()} the", wrong)
        # Where others lie that way too, or not clearly elsewhere, the answer would not be one.
        rest = [relations[(third, second)] for third in groups if third not in (first, second)]
        if all(found is not None and found != relation for found in rest):
            text = f"What is {relation_phrase(relation)} the {other}?"
            yield Question(text, one, "other", "what is", (other,))


def _sizes(scene: Scene) -> Iterator[Question]:
    for number, group in enumerate(scene.groups):
        if group.size != "medium":
            verb = "Is" if group.count == 1 else "Are"
            wrong = ("large" if group.size == "small" else "small",)
            text = f"{verb} the {noun(scene, number)} small or large?"
            yield Question(text, group.size, "other", f"{verb.lower()} the", wrong)


def _places(scene: Scene) -> Iterator[Question]:
    for number, group in enumerate(scene.groups):
        place = scene.place(number) if group.count == 1 else None
        if place is not None and place[0] != "middle":
            text = f"On which side of the picture is the {noun(scene, number)}?"
            wrong = ("right" if place[0] == "left" else "left",)
            yield Question(text, place[0], "other", "on which side", wrong)


def _comparisons(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if len(scene.groups) < 2 or scene.groups[0].count == scene.groups[1].count:
        return
    more, fewer = (0, 1) if scene.groups[0].count > scene.groups[1].count else (1, 0)
    right = bool(rng.random() < 0.5)
    one, other = (more, fewer) if right else (fewer, more)
    text = f"Are there more {scene.kinds[one].plural} than {scene.kinds[other].plural}?"
    yield _yes_no(text, right, "are there")


def _motions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for number, group in enumerate(scene.groups):
        name, motion = noun(scene, number), group.motion
        if motion in _SENTENCE_WAY:
            wrong = tuple(way for way in _SENTENCE_WAY if way != motion)
            yield Question(f"Which way does the {name} move?", motion, "other", "which", wrong)
            right = bool(rng.random() < 0.5)
            opposite: dict[Motion, Motion] = {"left": "right", "right": "left", "up": "down", "down": "up"}
            asked = _SENTENCE_WAY[motion if right else opposite[motion]]
            yield _yes_no(f"Does the {name} move {asked}?", right, "does the")
        elif motion in ("grows", "shrinks"):
            right = bool(rng.random() < 0.5)
            grows = (motion == "grows") == right
            yield _yes_no(f"Does the {name} {'grow larger' if grows else 'shrink'}?", right, "does the")
