"""Filters of single captions. They see text with single spaces and no space at its ends."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from sharding.filters.config import CaptionFilter
from sharding.filters.words import count_words, words


class CaptionRule(Protocol):
    """Decides about one caption."""

    def objection(self, caption: str) -> str | None:
        """The cause under which the caption is left out; None where it may stay."""
        ...


class NotEmpty:
    """Captions in which nothing can be seen."""

    def objection(self, caption: str) -> str | None:
        seen = any(letter.isprintable() and not letter.isspace() for letter in caption)
        return None if seen else "caption-empty"


@dataclass(frozen=True)
class Length:
    """Characters and words."""

    limits: CaptionFilter

    def objection(self, caption: str) -> str | None:
        limits, characters, number = self.limits, len(caption), count_words(caption)
        if characters < (limits.min_characters or 0) or number < (limits.min_words or 0):
            return "caption-too-short"
        if limits.max_characters is not None and characters > limits.max_characters:
            return "caption-too-long"
        if limits.max_words is not None and number > limits.max_words:
            return "caption-too-long"
        return None


@dataclass(frozen=True)
class Characters:
    """Which characters, and how often the same."""

    limits: CaptionFilter

    def objection(self, caption: str) -> str | None:
        limits, written = self.limits, caption.replace(" ", "")
        letters = sum(map(_is_letter, written))
        if limits.min_letters is not None and letters < limits.min_letters * len(written):
            return "caption-characters"
        foreign = sum(not character.isascii() for character in written)
        if limits.max_non_ascii is not None and foreign > limits.max_non_ascii * len(written):
            return "caption-characters"
        repeated = sum(before == after for before, after in pairwise(written))
        if limits.max_repeated_characters is not None and repeated > limits.max_repeated_characters * len(
            written
        ):
            return "caption-repetitive"
        if limits.max_repeated_words is not None:
            found = words(caption)
            if len(found) - len(set(found)) > limits.max_repeated_words * len(found):
                return "caption-repetitive"
        return None


def _is_letter(character: str) -> bool:
    """Vowel signs, tones and accents are part of a letter: half of a text in Burmese or Hindi is such marks."""
    return character.isalpha() or (not character.isascii() and unicodedata.category(character)[0] == "M")
