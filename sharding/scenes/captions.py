"""Sentences about a scene, with the place of each phrase that names objects of it.

Sentences are templates; in braces stands what the scene fills in::

    {a} {b} {c}     a phrase for the first, second, third group: "a small red car", "two cats"
    {is}            "is" or "are", as the first group has it
    {rel} {inv}     how the first lies to the second, and the second to the first: "to the left of"
    {bg}            "a striped blue background"
    {at}            "in the top left corner"
    {does} {doing}  what the first does in a clip, "moves to the left", "moving to the left"; {does_b} {doing_b}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sharding.scenes.plans import INVERSE, Background, Group, Motion, Relation
from sharding.scenes.scene import Scene
from sharding.scenes.words import NUMBERS, article

#: Sentences of one scene, the first of which says all there is to say.
CAPTIONS = 5

_SLOT = re.compile(r"\{(\w+)\}")
_PLACES: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_DOES: dict[Motion, tuple[str, str]] = {
    "left": ("moves to the left", "moving to the left"),
    "right": ("moves to the right", "moving to the right"),
    "up": ("moves up", "moving up"),
    "down": ("moves down", "moving down"),
    "grows": ("grows larger", "growing larger"),
    "shrinks": ("shrinks", "shrinking"),
    "still": ("stays still", "staying still"),
}
_FULL = {1: "{a} on {bg}", 2: "{a} {rel} {b} on {bg}", 3: "{a} {rel} {b}, and {c}, on {bg}"}
_FULL_CLIP = {1: "{a} {does} on {bg}", 2: "{a} {does} while {b} {does_b} on {bg}"}
_SENTENCES = {
    1: (
        "{a} on {bg}",
        "{a} in front of {bg}",
        "there {is} {a} in this picture",
        "a picture of {a}",
        "we can see {a} on {bg}",
        "this image shows {a}",
    ),
    2: (
        "{a} {is} {rel} {b}",
        "{a} {rel} {b}",
        "{b} {inv} {a}",
        "there {is} {a} {rel} {b}",
        "{rel} {b} there {is} {a}",
        "{a} and {b} on {bg}",
        "a picture of {a} and {b}",
        "{b} and {a} in front of {bg}",
    ),
    3: (
        "{a}, {b} and {c}",
        "{a}, {b} and {c} on {bg}",
        "there {is} {a} {rel} {b}, and also {c}",
        "a picture of {c}, {a} and {b}",
        "{a} {is} {rel} {b}, and there {is_c} {c} too",
        "{c}, and {b} {inv} {a}",
        "we can see {b}, {c} and {a}",
    ),
}
_PLACED = ("{a} {at}", "{a} {at} of the picture", "there {is} {a} {at} of the image")
_CLIP_SENTENCES = {
    1: (
        "{a} {does}",
        "{a} {doing}",
        "a video of {a} {doing}",
        "in this clip {a} {does}",
        "{a} {does} in front of {bg}",
        "{a} {doing} on {bg}",
    ),
    2: (
        "{a} {does} and {b} {does_b}",
        "{b} {does_b} while {a} {does}",
        "{a} {doing} and {b} {doing_b}",
        "a video of {a} {doing} and {b} {doing_b}",
        "in this clip {a} {does} while {b} {does_b}",
        "{a} {doing}, {b} {doing_b}, on {bg}",
    ),
}


@dataclass(frozen=True)
class Phrase:
    """What names a group of objects in a caption: characters ``start`` to ``end`` (the first after it)."""

    group: int
    start: int
    end: int


@dataclass(frozen=True)
class Caption:
    """A sentence, and its phrases in their order."""

    text: str
    phrases: tuple[Phrase, ...]


def noun(scene: Scene, group: int, count: int | None = None) -> str:
    """The name of a group's kind in the number that ``count`` (default: the group's) asks for."""
    kind = scene.kinds[group]
    return kind.name if (count or scene.groups[group].count) == 1 else kind.plural


def described(group: Group, noun: str, *, size: bool, color: bool) -> str:
    """``"two small red cars"``: number or article, then the adjectives asked for, where there are any."""
    words: list[str] = [group.size] if size and group.size != "medium" else []
    words += [group.color] if color and group.color is not None else []
    words.append(noun)
    return " ".join([article(words[0]) if group.count == 1 else NUMBERS[group.count], *words])


def background_phrase(background: Background, pattern: bool) -> str:
    """``"a striped blue background"``."""
    shown = pattern and background.pattern in ("striped", "dotted", "checkered")
    words = f"{background.pattern} {background.color}" if shown else background.color
    return f"{article(words)} {words} background"


def relation_phrase(relation: Relation, rng: np.random.Generator | None = None) -> str:
    """One of the ways to say it; without ``rng`` the plainest."""
    ways = _PLACES[relation]
    return ways[0] if rng is None else ways[int(rng.integers(len(ways)))]


def captions(scene: Scene, rng: np.random.Generator) -> list[Caption]:
    """``CAPTIONS`` different sentences, all true; the first names every object, colour, size and number."""
    clip = scene.frames > 1
    count = len(scene.groups)
    full = _FULL_CLIP[count] if clip else _FULL[count]
    choices = list(_CLIP_SENTENCES[count] if clip else _SENTENCES[count])
    if not clip and count == 1 and scene.place(0) is not None:
        choices += _PLACED
    order = rng.permutation(len(choices))
    found = [_filled(full, scene, rng, full=True)]
    for place in order:
        caption = _filled(choices[int(place)], scene, rng, full=False)
        if all(caption.text != other.text for other in found):
            found.append(caption)
        if len(found) == CAPTIONS:
            break
    return found


def _filled(template: str, scene: Scene, rng: np.random.Generator, full: bool) -> Caption:
    words = _words(scene, rng, full)
    text, phrases, done = "", [], 0
    for slot in _SLOT.finditer(template):
        text += template[done : slot.start()]
        done = slot.end()
        name = slot.group(1)
        if name in "abc":
            phrases.append(Phrase("abc".index(name), len(text), len(text) + len(words[name])))
        text += words[name]
    text += template[done:]
    return Caption(text[0].upper() + text[1:] + ".", tuple(phrases))


def _words(scene: Scene, rng: np.random.Generator, full: bool) -> Mapping[str, str]:
    words: dict[str, str] = {}
    for number, (letter, group) in enumerate(zip("abc", scene.groups, strict=False)):
        size, color = (full or bool(rng.random() < 0.6) for _ in range(2))
        words[letter] = described(group, noun(scene, number), size=size, color=color)
        words[f"is_{letter}"] = "is" if group.count == 1 else "are"
        words[f"does_{letter}"], words[f"doing_{letter}"] = _DOES[group.motion]
    words |= {"is": words["is_a"], "does": words["does_a"], "doing": words["doing_a"]}
    words["bg"] = background_phrase(scene.plan.background, pattern=full or bool(rng.random() < 0.5))
    if scene.plan.relation is not None:
        words["rel"] = relation_phrase(scene.plan.relation, None if full else rng)
        words["inv"] = relation_phrase(INVERSE[scene.plan.relation], rng)
    if len(scene.groups) == 1 and (place := scene.place(0)) is not None:
        words["at"] = _where(*place)
    return words


def _where(across: str, down: str) -> str:
    if across == down == "middle":
        return "in the middle"
    if across == "middle":
        return f"at the {down}"
    return f"on the {across}" if down == "middle" else f"in the {down} {across} corner"


def texts(found: Sequence[Caption]) -> list[str]:
    """The sentences alone."""
    return [caption.text for caption in found]
