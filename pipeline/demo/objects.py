"""The countable objects among the emoji: ``objects.yaml`` says which, and ``objects.jsonl`` is made of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.demo.emoji import Emoji

_LIST = Path(__file__).with_suffix(".yaml")
_MANY_COLORED = "many colored"


def _entries(lists: Mapping[str, list[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label of the emoji, fields of its line) in the order of the list."""
    for category, entries in lists.items():
        if category == _MANY_COLORED:
            continue
        for entry in entries:
            label, _, words = entry.partition("=")
            name, _, plural = (words or label).partition("/")
            row: dict[str, Any] = {"name": name}
            if plural:
                row["plural"] = plural
            if name in lists[_MANY_COLORED]:
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
    lists = yaml.safe_load(_LIST.read_text("utf-8"))
    return [
        {"path": f"images/{stems[label]}.webp", **row} for label, row in _entries(lists) if label in stems
    ]
