"""Promises of what is said of scenes: English, true, and balanced, so that guessing is worth nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sharding.scenes.captions import CAPTIONS
from sharding.scenes.colors import NAMES, named_pixels
from sharding.scenes.generator import Scenes
from sharding.scenes.questions import ANNOTATORS, Question
from sharding.scenes.scene import Scene
from sharding.scenes.words import NUMBERS, article, plural
from tests.sharding.scenes import bundled


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return bundled(vocabulary=None, width=128, height=128)


@pytest.mark.parametrize(
    ("name", "several", "first"),
    [
        ("cat", "cats", "a"), ("apple", "apples", "an"), ("hourglass", "hourglasses", "an"), ("key", "keys", "a"),
        ("unicorn", "unicorns", "a"), ("fly", "flies", "a"), ("box of fries", "boxes of fries", "a"),
        ("kitchen knife", "kitchen knives", "a"), ("mouse trap", "mouse traps", "a"), ("eye", "eyes", "an"),
        ("ear of corn", "ears of corn", "an"), ("umbrella", "umbrellas", "an"), ("toothbrush", "toothbrushes", "a"),
    ],
)  # fmt: skip
def test_articles_and_plurals_are_english(name: str, several: str, first: str) -> None:
    assert plural(name) == several
    assert article(name) == first


def _said(scene: Scene, group: int) -> str:
    """How many of what, as a phrase must say it."""
    count, kind = scene.groups[group].count, scene.kinds[group]
    return kind.name if count == 1 else kind.plural


def test_captions_name_what_is_there_in_the_right_number_and_their_phrases_are_marked(scenes: Scenes) -> None:
    for number in range(60):
        for scene in (scenes.scene(number), scenes.clip(number)):
            captions = scenes.captions(scene)
            assert len(captions) == CAPTIONS == len({caption.text for caption in captions})
            for caption in captions:
                assert re.fullmatch(r"[A-Z].*[^ .,]\.", caption.text)
                assert "{" not in caption.text
                assert "  " not in caption.text
                assert sorted(phrase.group for phrase in caption.phrases) == list(range(len(scene.groups)))
                for phrase in caption.phrases:
                    words = caption.text[phrase.start : phrase.end]
                    group = scene.groups[phrase.group]
                    assert words.endswith(_said(scene, phrase.group))
                    first = words.split()[0].lower()
                    if group.count == 1:
                        assert first == article(words.split()[1])
                    else:
                        assert first == NUMBERS[group.count]
                    # Only words that belong to this group stand in between.
                    inner = words.lower().removesuffix(_said(scene, phrase.group).lower()).split()[1:]
                    assert set(inner) <= {group.size, group.color}


def test_the_first_caption_says_colours_sizes_relation_motions_and_background(scenes: Scenes) -> None:
    for number in range(60):
        scene, clip = scenes.scene(number), scenes.clip(number)
        for shown in (scene, clip):
            caption = scenes.captions(shown)[0]
            for phrase in caption.phrases:
                words = caption.text[phrase.start : phrase.end].lower()
                group = shown.groups[phrase.group]
                assert group.color is None or group.color in words
                assert group.size == "medium" or group.size in words
            assert re.search(rf"an? (\w+ )?{shown.plan.background.color} background", caption.text)
        if scene.plan.relation:
            assert scene.plan.relation in scenes.captions(scene)[0].text
        ways = {"left": "to the left", "right": "to the right", "grows": "grows", "shrinks": "shrinks"}
        for group in clip.groups:
            assert ways.get(group.motion, group.motion) in scenes.captions(clip)[0].text


# What each sort of question asks, answered from boxes, pixels and kinds: none of the generator's own answers.
def _named(scene: Scene, name: str) -> int:
    found = [n for n, kind in enumerate(scene.kinds) if name in (kind.name, kind.plural)]
    (group,) = found
    return group


def _count(scene: Scene, name: str) -> int:
    return sum(len(scene.boxes(n)) for n, kind in enumerate(scene.kinds) if name in (kind.name, kind.plural))


def _ways(scene: Scene, one: int, other: int) -> set[str]:
    a, b = np.array(scene.boxes(one)), np.array(scene.boxes(other))
    found = {
        "left": a[:, 2].max() <= b[:, 0].min(),
        "right": b[:, 2].max() <= a[:, 0].min(),
        "above": a[:, 3].max() <= b[:, 1].min(),
        "below": b[:, 3].max() <= a[:, 1].min(),
    }
    return {way for way, true in found.items() if true}


def _background(scene: Scene) -> str:
    """The most frequent colour of the picture outside of all masks."""
    free = ~np.any([scene.mask(group) for group in range(len(scene.groups))], axis=0)
    seen = named_pixels(scene.image())[free]
    return NAMES[np.bincount(seen[seen >= 0]).argmax()]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _where(text: str) -> str:
    return re.sub("to the (left|right) of", r"\1", text)


def _moved(scene: Scene, name: str) -> str:
    group = _named(scene, name)
    (first,), (last,) = scene.boxes(group, 0), scene.boxes(group, scene.frames - 1)
    across, down = last[0] + last[2] - first[0] - first[2], last[1] + last[3] - first[1] - first[3]
    grown = (last[2] - last[0]) / (first[2] - first[0])
    if grown > 1.5 or grown < 0.67:
        return "grow larger" if grown > 1 else "shrink"
    return ("right" if across > 0 else "left") if abs(across) > abs(down) else ("down" if down > 0 else "up")


def _on(scene: Scene, way: str, name: str) -> str:
    """The only kind that lies that way, where all others clearly do not."""
    target = _named(scene, name)
    (found,) = (
        n for n in range(len(scene.kinds)) if n != target and scene.relation(n, target) == _where(way)
    )
    return _said(scene, found)


def _colored(scene: Scene, color: str) -> str:
    (found,) = (n for n, group in enumerate(scene.groups) if group.color == color)
    assert all(group.color for group in scene.groups)
    return _said(scene, found)


def _size(scene: Scene, name: str) -> str:
    box = scene.boxes(_named(scene, name))[0]
    return "small" if max(box[2] - box[0], box[3] - box[1]) < 0.3 * scene.layout.width else "large"


def _side(scene: Scene, name: str) -> str:
    (box,) = scene.boxes(_named(scene, name))
    return "left" if box[0] + box[2] < scene.layout.width else "right"


_WAY = "(to the left of|to the right of|above|below)"
_ANSWERS: dict[str, Callable[..., str]] = {
    r"How many (.+) are there\?": lambda s, name: str(_count(s, name)),
    r"Is there an? (.+) in the picture\?": lambda s, name: _yes(_count(s, name) > 0),
    r"What is in the picture\?": lambda s: _said(s, 0),
    r"What color is the background\?": _background,
    r"Is the background (\w+)\?": lambda s, color: _yes(_background(s) == color),
    r"What color (?:is|are) the (.+)\?": lambda s, name: str(s.groups[_named(s, name)].color),
    r"What (?:is|are) the (\w+) objects?\?": _colored,
    r"(?:Is|Are) the (.+) to the left or to the right of the (.+)\?": lambda s, one, other: (
        _ways(s, _named(s, one), _named(s, other)) & {"left", "right"}
    ).pop(),
    r"(?:Is|Are) the (.+) above or below the (.+)\?": lambda s, one, other: (
        _ways(s, _named(s, one), _named(s, other)) & {"above", "below"}
    ).pop(),
    rf"(?:Is|Are) the (.+) {_WAY} the (.+)\?": lambda s, one, way, other: _yes(
        _where(way) in _ways(s, _named(s, one), _named(s, other))
    ),
    rf"What is {_WAY} the (.+)\?": _on,
    r"(?:Is|Are) the (.+) small or large\?": _size,
    r"On which side of the picture is the (.+)\?": _side,
    r"Are there more (.+) than (.+)\?": lambda s, one, other: _yes(_count(s, one) > _count(s, other)),
    r"Which way does the (.+) move\?": _moved,
    r"Does the (.+) move (?:to the )?(left|right|up|down)\?": lambda s, name, way: _yes(
        _moved(s, name) == way
    ),
    r"Does the (.+) (grow larger|shrink)\?": lambda s, name, way: _yes(_moved(s, name) == way),
}


def _answered(scene: Scene, question: Question) -> tuple[str, str]:
    """(pattern of the question, answer told from the scene)."""
    for pattern in _ANSWERS:  # "above or below" comes before "below", which ends like it
        found = re.fullmatch(pattern, question.text)
        if found:
            return pattern, _ANSWERS[pattern](scene, *found.groups())
    raise AssertionError(question.text)


def test_every_answer_is_what_boxes_and_pixels_say_and_every_sort_of_question_is_asked(
    scenes: Scenes,
) -> None:
    asked: Counter[str] = Counter()
    for number in range(100):
        for scene in (scenes.scene(number), scenes.clip(number)):
            questions = scenes.questions(scene)
            assert len({question.text for question in questions}) == len(questions)
            for question in questions:
                pattern, answer = _answered(scene, question)
                assert question.answer == answer, (number, question)
                assert question.answer not in question.wrong
                asked[pattern] += 1
    assert set(asked) == set(_ANSWERS)


def test_half_of_the_answers_to_yes_no_questions_are_yes_for_each_sort(scenes: Scenes) -> None:
    answers: dict[str, Counter[str]] = {}
    for number in range(400):
        scene = scenes.scene(number)
        for question in scenes.questions(scene):
            if question.answer_type == "yes/no":
                answers.setdefault(_answered(scene, question)[0], Counter())[question.answer] += 1
    assert len(answers) == 4
    for pattern, counts in answers.items():
        assert abs(counts["yes"] / counts.total() - 0.5) < 3 / np.sqrt(counts.total()), (pattern, counts)


def test_at_least_seven_of_ten_annotators_agree_on_what_is_true(scenes: Scenes) -> None:
    scene = scenes.scene(2)
    question = scenes.questions(scene)[0]
    unanimous = scenes.annotations(scene, question, dissent=0)
    assert unanimous == [question.answer] * ANNOTATORS
    others = 0
    for number in range(60):
        scene = scenes.scene(number)
        for question in scenes.questions(scene):
            given = scenes.annotations(scene, question, dissent=0.3)
            assert given == scenes.annotations(scene, question, dissent=0.3)
            assert len(given) == ANNOTATORS
            assert given.count(question.answer) >= 7
            assert set(given) <= {question.answer, *question.wrong}
            others += ANNOTATORS - given.count(question.answer)
    assert others > 100


def _statement_holds(text: str, left: Scene, right: Scene) -> bool:
    """Read the sentence, look at the pictures."""
    sides = {"left": left, "right": right}
    if found := re.fullmatch(
        r"(?:There are exactly|The two images show) (\w+) (.+?) in (?:the two|total).*", text
    ):
        return _count(left, found[2]) + _count(right, found[2]) == NUMBERS.index(found[1])
    if found := re.fullmatch(
        r"(?:Both images contain|There is) at least one (.+?)(?: in each image)?\.", text
    ):
        return _count(left, found[1]) > 0 and _count(right, found[1]) > 0
    if found := re.fullmatch(rf"In the (left|right) image the (.+) is {_PLACES} the (.+)\.", text):
        return _lies(sides[found[1]], found[2], found[3], found[4])
    if found := re.fullmatch(rf"The (.+) in the (left|right) image is {_PLACES} the (.+)\.", text):
        return _lies(sides[found[2]], found[1], found[3], found[4])
    if found := re.fullmatch(
        r"The left image contains more (.+) than the right image\.", text
    ) or re.fullmatch(r"There are more (.+) in the left image than in the right one\.", text):
        return _count(left, found[1]) > _count(right, found[1])
    if found := re.fullmatch(r"There is no (.+) in the (left|right) image\.", text):
        return _count(sides[found[2]], found[1]) == 0
    if found := re.fullmatch(r"The (left|right) image does not contain an? (.+)\.", text):
        return _count(sides[found[1]], found[2]) == 0
    if "background" in text:
        return _background(left) == _background(right)
    found = re.fullmatch(r"The left image shows (.+) and the right image shows (.+)\.", text) or re.fullmatch(
        r"There (?:is|are) (.+) in the left image and (.+) in the right image\.", text
    )
    assert found, text
    return _shows(left, found[1]) and _shows(right, found[2])


_PLACES = "((?:to the |on the |)(?:left|right) of|above|over|below|under|beneath)"


def _lies(scene: Scene, one: str, place: str, other: str) -> bool:
    ways = {"over": "above", "under": "below", "beneath": "below"}
    way = next((side for side in ("left", "right") if side in place), ways.get(place, place))
    return len(scene.groups) == 2 and way in _ways(scene, _named(scene, one), _named(scene, other))


def _shows(scene: Scene, words: str) -> bool:
    """Whether the one group of the scene can be called so, and its number is the one said."""
    group, (first, *rest) = scene.groups[0], words.split()
    count = 1 if first in ("a", "an") else NUMBERS.index(first)
    name = " ".join(rest)
    return len(scene.boxes(0)) == count and name in (
        _said(scene, 0),
        f"{group.color} {_said(scene, 0)}",
    )


def test_a_statement_is_true_of_one_pair_and_false_of_the_other(scenes: Scenes) -> None:
    sorts: Counter[str] = Counter()
    first_true = 0
    for number in range(150):
        statement = scenes.statement(number)
        assert sorted(statement.labels) == [False, True]
        first_true += statement.labels[0]
        for pair, label in zip(statement.pairs, statement.labels, strict=True):
            assert _statement_holds(statement.text, *pair) == label, (number, statement.text)
        sorts[statement.text.split()[0] + statement.text.split()[2]] += 1
    assert 50 < first_true < 100
    assert len(sorts) > 6
