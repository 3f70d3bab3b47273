"""The table of cut-outs: what each shows, and its pixels when they are asked for.

A table is JSON lines beside its pictures; a line is one cut-out::

    {"path": "images/1f98a.webp", "name": "fox", "category": "animal"}
    {"path": "images/1f42d.webp", "name": "mouse", "plural": "mice", "color": null}

``path`` is relative to the table's folder. Lines of equal ``name`` are pictures of the same kind of object.
``plural``: where it is not the regular one. ``color``: the name of the object's colour, ``null`` where no name is
right; without the field the pixels tell.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sharding.captions import is_text
from sharding.errors import BadData, UserError
from sharding.media.images import decode_cutout
from sharding.scenes.colors import HUES, NAMES, color_of, prominent, recolored
from sharding.scenes.words import last_word, plural
from sharding.sources.base import folder_and_name
from sharding.storage import Storage

LARGEST_TABLE = 64 << 20
_LARGEST_FILE = 16 << 20
_MAX_PIXELS = 4096 * 4096
#: A pixel of a cut-out belongs to the object from this alpha on.
OPAQUE = 128
# Colours are told from a small picture: a pixel in a hundred makes no difference.
_COLOR_SIDE = 64
_ASIDE = "from the pixels"


@dataclass(frozen=True)
class CutOut:
    """One picture of a kind of object; ``color``: what the table says, if it says anything."""

    path: str
    color: str | None


@dataclass(frozen=True)
class Kind:
    """A kind of object, with all its pictures."""

    name: str
    plural: str
    category: str
    cutouts: tuple[CutOut, ...]

    def conflicts(self, other: Kind) -> bool:
        """Whether one might be called by the other's name: "car" and "police car"."""
        return last_word(self.name) == last_word(other.name)


@dataclass(frozen=True)
class _Colors:
    own: str | None
    others: tuple[str, ...]
    prominent: tuple[str, ...]


class Objects:
    """The kinds of a table in its order, and their pixels, read when first asked for and kept.

    Args:
        side: no cut-out is needed larger than this, in pixels; larger ones are kept at this size.
        digest: of the table and of the names and sizes of its pictures.
    """

    def __init__(self, root: Storage, kinds: list[Kind], digest: str, side: int) -> None:
        self.kinds, self.digest = kinds, digest
        self._root, self._side = root, side
        self._pixels: dict[str, np.ndarray] = {}
        self._colors: dict[str, _Colors] = {}
        self._lock = threading.Lock()

    def pixels(self, kind: int, cutout: int, color: str | None = None) -> np.ndarray:
        """uint8 [H, W, 4] of a cut-out, without the transparent rim; ``color``: one of ``colors``, or its own."""
        own = self._read(self.kinds[kind].cutouts[cutout].path)
        return own if color is None else recolored(own, color)

    def color(self, kind: int, cutout: int) -> str | None:
        """The name of a cut-out's own colour, or None where no name is right."""
        return self._told(kind, cutout).own

    def colors(self, kind: int, cutout: int) -> tuple[str, ...]:
        """The other colours that a cut-out can be given; none, where it is not of one colour."""
        return self._told(kind, cutout).others

    def prominent(self, kind: int, cutout: int) -> tuple[str, ...]:
        """Colours that much of a cut-out has: it is hard to see on a background of them."""
        return self._told(kind, cutout).prominent

    def _told(self, kind: int, cutout: int) -> _Colors:
        item = self.kinds[kind].cutouts[cutout]
        if item.path not in self._colors:
            small = _within(self._read(item.path), _COLOR_SIDE)
            own = color_of(small) if item.color == _ASIDE else item.color
            others = [name for name in HUES if name != own and color_of(recolored(small, name)) == name]
            self._colors[item.path] = _Colors(own, tuple(others) if own in HUES else (), prominent(small))
        return self._colors[item.path]

    def _read(self, path: str) -> np.ndarray:
        with self._lock:  # one thread reads a picture, the others wait for it
            if path not in self._pixels:
                self._pixels[path] = self._decoded(path)
            return self._pixels[path]

    def _decoded(self, path: str) -> np.ndarray:
        url = self._root.url_of(path)
        try:
            data = self._root.read_bytes(path, 0, _LARGEST_FILE + 1)
            if len(data) > _LARGEST_FILE:
                raise BadData("too-many-bytes", f"more than {_LARGEST_FILE}")
            cutout = decode_cutout(data, _MAX_PIXELS)
        except FileNotFoundError:
            raise UserError(f"the cut-out {url} is not there any more") from None
        except BadData as fault:
            raise UserError(f"the cut-out {url} cannot be used ({fault})") from None
        inside = cutout[..., 3] >= OPAQUE
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not rows.size:
            raise UserError(f"the cut-out {url} is empty: all its pixels are transparent")
        trimmed = cutout[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return _within(np.ascontiguousarray(trimmed), self._side)


def resized_cutout(rgba: np.ndarray, size: tuple[int, int], angle: float = 0.0) -> np.ndarray:
    """uint8 [H, W, 4] of a cut-out at (width, height), then turned by ``angle`` degrees to the left."""
    # Premultiplied: otherwise the colour under transparent pixels bleeds into the edges.
    image = Image.fromarray(rgba).convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(image.convert("RGBA"))


def _within(rgba: np.ndarray, side: int) -> np.ndarray:
    height, width = rgba.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return rgba
    return resized_cutout(rgba, (max(1, round(width * scale)), max(1, round(height * scale))))


def open_objects(url: str, storage: Storage, side: int) -> Objects:
    """The objects of the table at ``url``; pictures are not read yet, but all are there.

    Args:
        storage: lends its S3 options, not its place.
        side: see ``Objects``.

    Raises:
        UserError: no table there, not of this kind, without rows, or naming a picture that is missing.
    """
    folder, name = folder_and_name(url)
    root = storage.resolve(folder)
    try:
        data = root.read_bytes(name, 0, LARGEST_TABLE + 1)
    except FileNotFoundError:
        raise UserError(f"no such table of objects: {url}") from None
    except IsADirectoryError:
        raise UserError(f"{url} is a folder: name the table of objects (objects.jsonl) in it") from None
    if len(data) > LARGEST_TABLE:
        raise UserError(f"the table of objects {url} has more than {LARGEST_TABLE} bytes")
    kinds = _kinds(data, url)
    if not kinds:
        raise UserError(f"the table of objects {url} has no rows")
    sizes = _sizes(root, (cutout.path for kind in kinds for cutout in kind.cutouts), url)
    digest = hashlib.sha256(data + json.dumps(sorted(sizes.items())).encode()).hexdigest()
    return Objects(root, kinds, digest, side)


def _sizes(root: Storage, paths: Iterable[str], url: str) -> dict[str, int]:
    wanted = dict.fromkeys(paths)
    found: dict[str, int] = {}
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in wanted):
        found.update((file.path, file.size) for file in root.list(folder) if file.path in wanted)
    for path in wanted:
        if path not in found:
            raise UserError(f"{url} names {path}, which is not there: {root.url_of(path)}")
    return found


def _kinds(data: bytes, url: str) -> list[Kind]:
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"the table of objects {url} is not JSON lines in UTF-8") from None
    kinds: dict[str, Kind] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        kind = _kind(line, f"{url} line {number}")
        before = kinds.get(kind.name)
        if before is None:
            kinds[kind.name] = kind
        else:
            cutouts = before.cutouts + kind.cutouts
            kinds[kind.name] = Kind(before.name, before.plural, before.category, cutouts)
    return list(kinds.values())


def _kind(line: str, place: str) -> Kind:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object")
    for field in ("path", "name"):
        if not is_text(row.get(field)) or not row[field].strip():
            raise UserError(f"{place} has no {field}: an object needs path and name")
    for field in ("plural", "category"):
        if not is_text(row.get(field, "")):
            raise UserError(f"{place}: {field} is no text")
    path, name = row["path"], " ".join(row["name"].split())
    if path.startswith("/") or "://" in path or ".." in path.split("/") or "\0" in path:
        raise UserError(f"{place}: the path {path!r} is not one below the table's folder")
    color = row.get("color", _ASIDE)
    if color not in (None, _ASIDE, *NAMES):
        raise UserError(f"{place}: color {color!r} is none of {', '.join(NAMES)}")
    return Kind(name, row.get("plural") or plural(name), row.get("category", ""), (CutOut(path, color),))
