"""Examples as cards: what was asked, whether it was right, pictures and lines of text.

Pictures go into the page as they are, JPEG or PNG, as long as there is room for them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from pipeline.evaluation.result import Example
from sharding.errors import BadData
from sharding.html_page import shown_text
from sharding.media import probe_image

_EXAMPLES = 24  # of one evaluation
_PICTURES, _LINES = 24, 16  # of one example
_LARGEST = 300_000  # bytes of one picture
_HIGH, _NARROWEST, _WIDEST = 120, 56, 720  # pixels on the page: height, and bounds of the width
_FEW, _LOWER = (
    3,
    92,
)  # with more pictures than these in a card, they are lower, so that two cards fit side by side
_MIME = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_GROUPS: tuple[tuple[bool | None, str, str], ...] = (
    (False, "wrong", "Wrong"),
    (True, "right", "Right"),
    (None, "map", "Maps"),
)


class Room:
    """Bytes of pictures that may still go into the page."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        """Whether there is room for ``size`` bytes; if so, they are taken."""
        if size > self._left:
            return False
        self._left -= size
        return True


def needs(examples: Sequence[Example]) -> int:
    """Bytes of the pictures that would be shown of ``examples``."""
    return sum(
        len(data)
        for example in examples[:_EXAMPLES]
        for data, _ in example.pictures[:_PICTURES]
        if len(data) <= _LARGEST
    )


def fair_shares(needed: Sequence[int], total: int) -> list[int]:
    """What each may take of ``total``: all it needs, unless that is more than an equal share of what is left."""
    shares, left = [0] * len(needed), total
    for place, number in enumerate(sorted(range(len(needed)), key=needed.__getitem__)):
        shares[number] = min(needed[number], left // (len(needed) - place))
        left -= shares[number]
    return shares


def cards(examples: Sequence[Example], room: Room) -> str:
    """The cards, wrong ones first; nothing where there are no examples."""
    shown = examples[:_EXAMPLES]
    parts = []
    for right, style, title in _GROUPS:
        found = [example for example in shown if example.right is right]
        if found:
            drawn = "".join(_card(example, style, room) for example in found)
            broad = " broad" if any(len(example.pictures) > _FEW for example in found) else ""
            parts.append(
                f"<h4>{title} <span>{len(found)}</span></h4><div class='cards {style}s{broad}'>{drawn}</div>"
            )
    if len(examples) > len(shown):
        parts.append(f"<p>{len(examples) - len(shown)} more are in the run's storage.</p>")
    return "".join(parts)


def _card(example: Example, style: str, room: Room) -> str:
    shown = example.pictures[:_PICTURES]
    high = _LOWER if len(shown) > _FEW and example.right is not None else _HIGH
    figures = [_figure(data, caption, high, room) for data, caption in shown]
    pictures = "".join(figures) + _left_out(len(example.pictures) - sum(map(bool, figures)))
    lines = "".join(
        f"<div><dt>{shown_text(label, 60)}</dt><dd><bdi>{shown_text(text)}</bdi></dd></div>"
        for label, text in example.lines[:_LINES]
    )
    badge = "" if example.right is None else f"<b>{'✓ right' if example.right else '✗ wrong'}</b>"
    one = " one" if len(figures) == 1 else ""
    return (
        f"<article class='card {style}{one}'><h5>{badge}<bdi>{shown_text(example.title)}</bdi></h5>"
        + (f"<div class='pictures'>{pictures}</div>" if pictures else "")
        + (f"<dl>{lines}</dl>" if lines else "")
        + "</article>"
    )


def _left_out(count: int) -> str:
    if not count:
        return ""
    what = "one picture" if count == 1 else f"{count} pictures"
    return f"<p class='none'>{what} left out</p>"


def _figure(data: bytes, caption: str, high: int, room: Room) -> str:
    """Nothing where it is no JPEG or PNG, or too large."""
    mime = next((mime for start, mime in _MIME.items() if data.startswith(start)), None)
    try:
        size = probe_image(data)
    except BadData:
        return ""
    if mime is None or len(data) > _LARGEST or not room.take(len(data)):
        return ""
    words = shown_text(caption, 90)
    width = min(_WIDEST, max(_NARROWEST, round(high * size.width / size.height)))
    encoded = base64.b64encode(data).decode()
    return (
        f"<figure style='width:{width}px'><img alt='{words}' width='{size.width}' height='{size.height}' "
        f"src='data:{mime};base64,{encoded}'/><figcaption><bdi>{words}</bdi></figcaption></figure>"
    )
