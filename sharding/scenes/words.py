"""Articles, plurals and numbers: as much English as captions of scenes need."""

from __future__ import annotations

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_IRREGULAR = {
    "child": "children", "person": "people", "man": "men", "woman": "women", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "ox": "oxen", "sheep": "sheep", "deer": "deer", "fish": "fish",
    "leaf": "leaves", "knife": "knives", "wolf": "wolves", "loaf": "loaves", "shelf": "shelves", "half": "halves",
    "potato": "potatoes", "tomato": "tomatoes", "die": "dice", "snowman": "snowmen", "bison": "bison",
    "moose": "moose", "trout": "trout", "shrimp": "shrimp",
}  # fmt: skip
# Begin with a vowel letter and a consonant's sound, and the other way round.
_AS_CONSONANT = ("uni", "use", "usu", "eu", "ewe", "one", "uk")
_AS_VOWEL = ("hour", "honest", "heir", "honor")


def article(following: str) -> str:
    """``"a"`` or ``"an"``, by the word that follows."""
    word = following.lower()
    if word.startswith(_AS_VOWEL):
        return "an"
    return "an" if word[:1] in "aeiou" and not word.startswith(_AS_CONSONANT) else "a"


def plural(name: str) -> str:
    """The regular plural of a noun; ``"box of fries"`` -> ``"boxes of fries"``."""
    head, of, rest = name.partition(" of ")
    before, space, noun = head.rpartition(" ")
    return before + space + _plural_word(noun) + of + rest


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in ("", *"aeiou"):
        return word[:-1] + "ies"
    return word + "s"


def last_word(name: str) -> str:
    """What a thing is a kind of: ``"police car"`` -> ``"car"``."""
    return name.rpartition(" ")[2].lower()
