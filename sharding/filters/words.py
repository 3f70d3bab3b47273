"""Words of captions, in scripts with and without spaces between them, and blocked words and phrases.

One rule for the limits on words, for ``caption_words`` of the index and for ``blocked_words``: a word stands between
spaces. Where a script writes no spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese and their relatives) each
character counts as a word, with the marks that belong to it. No dictionary decides, so the count is the same on every
machine::

    a dog runs          3    a, dog, runs
    狗在跑               3    狗, 在, 跑
    สุนัขวิ่ง               5    สุ, นั, ข, วิ่, ง       vowels above and below, and tones, are marks
    我有2只iPhone手机     7    我, 有, 2, 只, iphone, 手, 机
    dog-friendly 🐶      2    as ``str.split`` has it: without such characters it decides alone
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache

# Scripts written without spaces: those whose line breaks take a dictionary (UAX 14, class SA) and those that
# break between any two characters (Han, kana, Bopomofo, Yi).
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u3005-\u3007\u3031-\u3035\u3040-\u30ff\u31f0-\u31ff"  # repetition marks, kana
    "\u3100-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\ua000-\ua4cf"  # Yi
    "\U0001b000-\U0001b16f"  # old and small kana
)


@cache
def _token() -> re.Pattern[str]:
    """A word (letters, digits and the marks that belong to them), or a single other character.

    Digits of unspaced scripts make numbers, as those of others do.
    """
    marks = "".join(
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character).startswith("M")
    )
    unspaced = rf"(?!\d)[{_UNSPACED}]"
    return re.compile(rf"{unspaced}[{marks}]*|(?:(?!{unspaced})[\w{marks}])+|[^\w\s]")


_ANY_UNSPACED = re.compile(rf"(?!\d)[{_UNSPACED}]")
_LETTER = re.compile(r"\w")


def tokens(text: str) -> list[str]:
    """Words and other characters of a text, case-folded and NFKC; invisible format characters left out."""
    return _token().findall(_folded(text))


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(character for character in folded if unicodedata.category(character) != "Cf")


def words(text: str) -> list[str]:
    """The words of a text, case-folded: what stands between spaces, each character of scripts without spaces.

    Punctuation counts where it stands alone between spaces, as ``str.split`` has it.
    """
    pieces = text.split()
    if text.isascii():
        return [piece.casefold() for piece in pieces]
    found: list[str] = []
    for piece in pieces:
        # Half-width kana are kana (NFKC). Of a folded piece without such characters nothing else is asked.
        if piece.isascii() or not _ANY_UNSPACED.search(unicodedata.normalize("NFKC", piece)):
            found.append(piece.casefold())
        else:
            # Thai punctuation alone has no letter: it is one word then, as other punctuation is.
            found += [token for token in tokens(piece) if _LETTER.match(token)] or [piece]
    return found


def count_words(text: str) -> int:
    """How many words a text has (see ``words``)."""
    return len(text.split()) if text.isascii() else len(words(text))


class BlockedWords:
    """Finds any of many words or phrases in a caption, in time that does not grow with their number."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._by_first: dict[str, list[list[str]]] = {}
        for entry in entries:
            phrase = tokens(entry)
            if phrase:
                self._by_first.setdefault(phrase[0], []).append(phrase)

    def objection(self, caption: str) -> str | None:
        found = tokens(caption)
        for place, word in enumerate(found):
            for phrase in self._by_first.get(word, ()):
                if found[place : place + len(phrase)] == phrase:
                    return "blocked-words"
        return None
