"""Words on a picture: a font that has their letters, and a size at which they fit."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

#: Looked for among the system's fonts, in this order, for words that Pillow's own font cannot spell.
_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"),
    *(
        "NotoSansCJK-Regular.ttc",
        "NotoSansCJKsc-Regular.otf",
        "wqy-microhei.ttc",
        "DroidSansFallbackFull.ttf",
    ),
    *("PingFang.ttc", "msyh.ttc", "malgun.ttf", "YuGothR.ttc"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
    *("NotoSansBengali-Regular.ttf", "NotoSansTamil-Regular.ttf", "NotoSansThai-Regular.ttf", "Nirmala.ttf"),
    *("NotoSansSymbols2-Regular.ttf", "NotoEmoji-Regular.ttf", "Symbola.ttf", "seguiemj.ttf"),
)
_ABSENT = "\U0010ffff"  # a code point that is no character: every font draws its sign for what it lacks
_ELLIPSIS = "…"

Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Lettering:
    """A line of text: stretches of it, each with the font that has its letters."""

    runs: tuple[tuple[str, Font], ...]

    @property
    def width(self) -> float:
        """Pixels."""
        return sum(font.getlength(text) for text, font in self.runs)

    def draw(self, pen: ImageDraw.ImageDraw, left: float, baseline: float, fill: str) -> None:
        """Write it, beginning at ``left``."""
        for text, font in self.runs:
            pen.text((left, baseline), text, fill=fill, font=font, anchor="ls")
            left += font.getlength(text)


def lettering(text: str, size: int) -> Lettering:
    """``text`` in one line. Letters that no font here has are written as their code points (U+732B)."""
    return Lettering(
        tuple((run, _font(name, size)) for run, name in _runs(unicodedata.normalize("NFC", text)))
    )


def fitted(text: str, width: int, size: int, least: int) -> Lettering:
    """``text`` in one line of ``width`` pixels.

    As large as ``size`` where there is room, not below ``least``: what is then still too long loses its end to an
    ellipsis.
    """
    for smaller in range(size, least - 1, -1):
        line = lettering(text, smaller)
        if line.width <= width:
            return line
    while text and line.width > width:
        text = text[:-1]
        line = lettering(text + _ELLIPSIS, least)
    return line


def wrapped(text: str, width: int, size: int, lines: int) -> list[Lettering]:
    """``text`` on at most ``lines`` lines of ``width`` pixels, broken at white space; the last is cut to fit."""
    words = text.split()
    rows: list[str] = []
    for number, word in enumerate(words):
        if rows and lettering(f"{rows[-1]} {word}", size).width <= width:
            rows[-1] += f" {word}"
        elif len(rows) < lines:
            rows.append(word)
        else:
            rows[-1] = " ".join([rows[-1], *words[number:]])
            break
    return [fitted(row, width, size, size) for row in rows]


def _runs(text: str) -> list[tuple[str, str]]:
    """Stretches of the text and the name of a font for each (empty: Pillow's own); a word in one font if any has it."""
    runs: list[tuple[str, str]] = []

    def add(piece: str, name: str) -> None:
        if runs and runs[-1][1] == name:
            runs[-1] = (runs[-1][0] + piece, name)
        else:
            runs.append((piece, name))

    for word in re.findall(r"\s+|\S+", text):
        whole = runs[-1][1] if runs and word.isspace() else _font_for(word)
        for piece in [word] if whole is not None else word:
            name = whole if whole is not None else _font_for(piece)
            if name is not None:
                add(piece, name)
            else:
                gap = " " if runs and not runs[-1][0].endswith(" ") else ""
                add(f"{gap}U+{ord(piece):04X}", "")
    return runs


def _font_for(piece: str) -> str | None:
    """The first font with all its characters."""
    return next((name for name in ("", *_SYSTEM_FONTS) if all(_has(name, one) for one in piece)), None)


@lru_cache
def _is_there(name: str) -> bool:
    try:
        _font(name, 16)
    except OSError:
        return False
    return True


@lru_cache
def _font(name: str, size: int) -> Font:
    font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache(maxsize=4096)
def _has(name: str, character: str) -> bool:
    if not _is_there(name):
        return False
    # Spaces, joiners and variation selectors show nothing by themselves.
    if unicodedata.category(character) in ("Zs", "Cf", "Mn"):
        return True
    return _drawn(name, character) != _drawn(name, _ABSENT)


@lru_cache(maxsize=4096)
def _drawn(name: str, character: str) -> bytes:
    canvas = Image.new("L", (48, 48))
    ImageDraw.Draw(canvas).text((8, 8), character, fill=255, font=_font(name, 16))
    return canvas.tobytes()
