"""Tables of countable objects, as scenes are composed of: of the emoji, and of Tux Paint's stamps.

``objects.yaml`` says which emoji and what they are called. Of stamps the captions tell.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.demo.emoji import Emoji
from pipeline.yaml_reader import parse_yaml
from sharding.scenes.colors import NAMES

_LISTS = Path(__file__).with_suffix(".yaml")
# "A red fire truck." names one thing; "A shipwreck, seen from afar." and "Fire! Fire!" do not.
_NAMING = re.compile(r"An? ([A-Za-z][A-Za-z’ -]*)\.")
_ADJECTIVES = frozenset(
    [*NAMES, "small", "large", "little", "big", "huge", "very", "colorful", "happy", "silver", "lit", "male"]
)
_NO_OBJECTS = ("/symbols/", "/people/", "/flags/", "/military/", "/roadsigns/")
_LONGEST_NAME = 3  # words


@cache
def _lists() -> dict[str, Any]:
    lists: dict[str, Any] = parse_yaml(_LISTS.read_text("utf-8"), _LISTS.name)
    return lists


def _entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """(label of the emoji, fields of its line) in the order of the list."""
    for category, entries in _lists()["emoji"].items():
        for entry in entries:
            label, _, words = entry.partition("=")
            name, _, plural = (words or label).partition("/")
            row: dict[str, Any] = {"name": name}
            if plural:
                row["plural"] = plural
            if name in _lists()["many colored"]:
                row["color"] = None
            yield label.partition("/")[0], row | {"category": category}


def object_rows(files: Mapping[str, Emoji]) -> list[dict[str, Any]]:
    """The lines of objects.jsonl for the stills of these file stems, as ``sharding.scenes.objects`` reads them.

    Base emoji only; of several spellings of a code the first. Labels without a still are left out.
    """
    stems = {
        emoji.label: stem
        for stem, emoji in sorted(files.items(), reverse=True)
        if emoji.code == emoji.base and emoji.skin_tone is None
    }
    return [{"path": f"images/{stems[label]}.webp", **row} for label, row in _entries() if label in stems]


def stamp_rows(stamps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of objects.jsonl for lines of stamps.jsonl: those whose caption is "A" and the name of one thing.

    Adjectives of colour and size go: colours are told from the pixels, sizes are the scene's.
    """
    rows = []
    for stamp in stamps:
        found = _NAMING.fullmatch(stamp["caption"])
        if found is None or any(folder in f"/{stamp['path']}" for folder in _NO_OBJECTS):
            continue
        words = [word for word in found.group(1).split() if word.lower() not in _ADJECTIVES]
        name = " ".join(words)
        described = not set(words).isdisjoint(_lists()["describing"])
        if 0 < len(words) <= _LONGEST_NAME and not described and name not in _lists()["too wide"]:
            rows.append({"path": stamp["path"], "name": name, "category": stamp["group"]})
    return rows
