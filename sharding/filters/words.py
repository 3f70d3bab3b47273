"""Blocked words and phrases in captions."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache

# Written without spaces: each character is a word of its own. Thai, Lao, Myanmar, Khmer; kana; Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)


@cache
def _token() -> re.Pattern[str]:
    """A word (letters, digits and the marks that belong to them), or a single other character."""
    marks = "".join(
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character).startswith("M")
    )
    return re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\w{marks}])+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and other characters of a text, case-folded and NFKC; invisible format characters left out."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    return _token().findall(visible)


class BlockedWords:
    """Finds any of many words or phrases in a caption, in time that does not grow with their number."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._by_first: dict[str, list[list[str]]] = {}
        for entry in entries:
            phrase = tokens(entry)
            if phrase:
                self._by_first.setdefault(phrase[0], []).append(phrase)

    def objection(self, caption: str) -> str | None:
        words = tokens(caption)
        for place, word in enumerate(words):
            for phrase in self._by_first.get(word, ()):
                if words[place : place + len(phrase)] == phrase:
                    return "blocked-words"
        return None
