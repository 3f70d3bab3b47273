"""What is done to well-formed files before they are read: drawn by hypothesis, which shrinks what fails.

Bytes are flipped, cut, moved, repeated, overwritten with extreme numbers and mixed with those of other files; of JSON
and YAML also the tree: a value, a name or an item is replaced by one that no writer of such files had in mind.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

# Numbers that lengths, counts and offsets in headers are replaced by.
_EXTREMES = [
    number.to_bytes(width, order, signed=number < 0)
    for width in (1, 2, 4, 8)
    for number in (0, 1, -1, 2 ** (8 * width - 1) - 1)
    for order in ("little", "big")
]
_TEXTS = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"\r",
    b"\n\n",
    b",",
    b"\\ud800",
    b"../../../etc/passwd",
    b"9" * 400,
]
_MOST_CHANGES = 6

# What stands where something else is due: types, sizes and texts that JSON allows.
ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e308, 2**70, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\ud800",
        "\x00",
        "1e-05",
        "a" * 70_000,
        "../../../etc/passwd",
        "file:///etc/passwd",
        "/etc/passwd",
    ),
    *([], {}, [[]], [None], {"": {}}, [{"a": [1]}]),
]


def mutated_bytes(seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """One of ``seeds`` with up to six changes; ``tokens``: what else may be put into it."""
    insertions = st.sampled_from([*_EXTREMES, *_TEXTS, *tokens]) | st.binary(max_size=8)

    @st.composite
    def draw_file(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(list(seeds))))
        for _ in range(draw(st.integers(1, _MOST_CHANGES))):
            _change(data, draw, insertions, seeds)
        return bytes(data)

    return draw_file()


def _change(
    data: bytearray, draw: st.DrawFn, insertions: st.SearchStrategy[bytes], seeds: Sequence[bytes]
) -> None:
    start = draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(["overwrite", "insert", "flip", "remove", "repeat", "cut", "mix"]))
    length = draw(st.sampled_from([1, 2, 4, 16, 100, 1000]))
    if kind == "overwrite":
        new = draw(insertions)
        data[start : start + len(new)] = new
    elif kind == "insert":
        data[start:start] = draw(insertions)
    elif kind == "flip" and start < len(data):
        data[start] ^= 1 << draw(st.integers(0, 7))
    elif kind == "remove":
        del data[start : start + length]
    elif kind == "repeat":
        data[start:start] = data[start : start + length] * draw(st.sampled_from([1, 2, 50]))
    elif kind == "cut":
        del data[start:]
    elif kind == "mix":
        other = draw(st.sampled_from(list(seeds)))
        data[start : start + length] = other[start : start + length]


def mutated_tree(seeds: Sequence[Any]) -> st.SearchStrategy[Any]:
    """A JSON value of ``seeds`` in which up to three values, names or items are replaced, removed or repeated."""

    @st.composite
    def draw_tree(draw: st.DrawFn) -> Any:
        tree = [copy.deepcopy(draw(st.sampled_from(list(seeds))))]
        for _ in range(draw(st.integers(1, 3))):
            holder, place = draw(st.sampled_from(_places(tree)))
            kind = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"]))
            if kind == "replace":
                holder[place] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
            elif holder is tree:
                continue
            elif kind == "remove":
                del holder[place]
            elif isinstance(holder, list):
                holder.append(copy.deepcopy(holder[place]))
            else:
                holder[draw(st.sampled_from(["", "\ud800", "id", "x" * 300]))] = holder.pop(place)
        return tree[0]

    return draw_tree()


def _places(holder: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below ``holder``."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found.append((holder, key))
        if isinstance(holder[key], dict | list):
            found += _places(holder[key])
    return found


def mutated_json(
    seeds: Sequence[Any], write: Callable[[Any], bytes] | None = None, tokens: Sequence[bytes] = ()
) -> st.SearchStrategy[bytes]:
    """Files of JSON: trees with odd values, and their bytes damaged.

    Args:
        write: how a tree becomes a file; default: as one JSON value.
    """
    as_bytes = write or to_json
    return mutated_tree(seeds).map(as_bytes) | mutated_bytes([as_bytes(seed) for seed in seeds], tokens)


def to_json(tree: Any) -> bytes:
    """JSON in ASCII; what is not finite, and half surrogate pairs, as Python's writer spells them."""
    return json.dumps(tree).encode("ascii")


def to_json_lines(rows: Any) -> bytes:
    """A line for each item, where the tree is still a list."""
    items = rows if isinstance(rows, list) else [rows]
    return b"".join(to_json(row) + b"\n" for row in items)
