"""The contact sheet of a dataset: small pictures of some kept samples, and of some dropped ones by cause.

Which ones is decided by a hash of their place in the input (the smallest win), so the sheet is the same whatever
the number of workers and however often a run was killed; and a sheet of parts is made of the sheets of the parts.

    task: watch -> keep / drop -> save     work/contact/000007.json
    driver: load -> plus                   a bounded number of pictures, whatever the number of tasks
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sharding.errors import BadData
from sharding.guard import shared_guard
from sharding.manifest import Modality
from sharding.media.info import Encoded
from sharding.seeds import derive_seed
from sharding.sources.fetch import Fetched
from sharding.sources.folder import parse_sidecar
from sharding.storage import Storage

#: Pictures on a whole sheet: of kept samples, and of dropped inputs of one cause.
KEPT, DROPPED = 48, 8

# Media held until a task ends; larger ones become thumbnails at once, though others may win in the end.
_HELD_BYTES = 1 << 20
_TEXT = 240


@dataclass(frozen=True)
class Picture:
    """One sample or input: ``title`` is its caption, where it has one; ``detail`` says more, its address too.

    ``thumbnail``: a JPEG, empty where there is nothing to show. ``rank`` decides which pictures are chosen.
    """

    rank: int
    key: str
    title: str
    detail: str
    thumbnail: bytes = b""


@dataclass(frozen=True)
class ContactSheet:
    """Pictures of kept samples, and of dropped inputs by cause; each list by ascending rank."""

    kept: list[Picture] = field(default_factory=list)
    dropped: Mapping[str, list[Picture]] = field(default_factory=dict)

    def plus(self, other: ContactSheet) -> ContactSheet:
        """The sheet of the samples of both, as large as a whole sheet may be."""
        causes = sorted({*self.dropped, *other.dropped})
        both = {cause: [*self.dropped.get(cause, []), *other.dropped.get(cause, [])] for cause in causes}
        return ContactSheet(
            kept=_first([*self.kept, *other.kept], KEPT),
            dropped={cause: _first(pictures, DROPPED) for cause, pictures in both.items()},
        )

    def without(self, causes: Mapping[str, str]) -> ContactSheet:
        """With the kept samples of some keys moved to those dropped by the cause that ``causes`` gives them."""
        moved = ContactSheet([picture for picture in self.kept if picture.key not in causes], self.dropped)
        for picture in self.kept:
            if picture.key in causes:
                moved = moved.plus(ContactSheet(dropped={causes[picture.key]: [picture]}))
        return moved

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``from_json`` makes the same sheet of it."""
        dropped = {cause: [_to_json(picture) for picture in found] for cause, found in self.dropped.items()}
        return {"kept": [_to_json(picture) for picture in self.kept], "dropped": dropped}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ContactSheet:
        dropped = {cause: [_from_json(item) for item in found] for cause, found in value["dropped"].items()}
        return cls([_from_json(item) for item in value["kept"]], dropped)

    def save(self, storage: Storage, path: str) -> None:
        storage.write_json(path, self.to_json())

    @classmethod
    def load(cls, storage: Storage, path: str) -> ContactSheet:
        """An empty sheet where there is none: somebody removed the dataset's work folder."""
        try:
            return cls.from_json(storage.read_json(path))
        except FileNotFoundError:
            return cls()


def _first(pictures: list[Picture], limit: int) -> list[Picture]:
    return sorted(pictures, key=lambda picture: (picture.rank, picture.key))[:limit]


def _to_json(picture: Picture) -> dict[str, Any]:
    return {**asdict(picture), "thumbnail": base64.b64encode(picture.thumbnail).decode()}


def _from_json(value: Mapping[str, Any]) -> Picture:
    return Picture(**{**value, "thumbnail": base64.b64decode(value["thumbnail"])})


@dataclass(frozen=True)
class _Chosen:
    picture: Picture
    media: bytes | None  # what the thumbnail is still to be made of
    modality: Modality


class Collector:
    """Chooses the pictures of one task while its inputs pass by.

    Memory: a few media of at most 1 MiB a list, and the inputs that are between ``watch`` and their verdict.

    Args:
        name: of the task, unique in the dataset.
        modality, input_modality: of the samples, and of the inputs that they are made of.
        tasks: of the dataset; with many of them each contributes few pictures.
    """

    def __init__(self, name: str, modality: Modality, input_modality: Modality, tasks: int) -> None:
        self._name, self._modality, self._input_modality = name, modality, input_modality
        self._limits = _share(KEPT, tasks), _share(DROPPED, tasks)
        self._kept: list[_Chosen] = []
        self._dropped: dict[str, list[_Chosen]] = {}
        self._passing: dict[int, Fetched] = {}

    def watch(self, inputs: Iterable[Fetched]) -> Iterator[Fetched]:
        """The inputs as they are; their bytes are at hand until a verdict on a later row is told."""
        for row, fetched in enumerate(inputs):
            self._passing[row] = fetched
            yield fetched

    def keep(self, row: int, key: str, media: Encoded, captions: list[str], source: str) -> None:
        """Tell that a sample of the input of this row is kept."""
        self._forget_before(row)
        rank = _rank(key)
        if not _wins(self._kept, self._limits[0], rank):
            return  # as nearly all of a large task: nothing is made of them
        info = media.info
        size = f"{info.width} × {info.height}, {len(media.data):,} bytes"
        moving = f", {info.frames} frames, {info.duration:.1f} s" if self._modality == "video" else ""
        picture = _picture(rank, key, captions[0], f"{size}{moving}, {source}")
        self._choose(self._kept, self._limits[0], _Chosen(picture, media.data, self._modality))

    def reject(self, row: int, media: Encoded, captions: list[str], source: str, fault: BadData) -> None:
        """Tell that a sample of the input of this row, ready to be stored, is dropped after all."""
        key = f"{self._name}-{row:06d}"
        picture = _picture(_rank(key), key, captions[0], f"{source}: {fault.detail}")
        chosen = self._dropped.setdefault(fault.cause, [])
        self._choose(chosen, self._limits[1], _Chosen(picture, media.data, self._modality))

    def drop(self, row: int, address: str, fault: BadData) -> None:
        """Tell that the input of this row (or a part of it) is dropped. ``address`` holds no secret."""
        self._forget_before(row)
        chosen = self._dropped.setdefault(fault.cause, [])
        fetched = self._passing.get(row)
        detail = f"{address}: {fault.detail}"
        key = f"{self._name}-{row:06d}"
        picture = _picture(_rank(key), key, "" if fetched is None else _first_caption(fetched), detail)
        media = b"" if fetched is None else fetched.media
        self._choose(chosen, self._limits[1], _Chosen(picture, media, self._input_modality))

    def sheet(self) -> ContactSheet:
        """What was chosen."""
        return ContactSheet(
            kept=[_finished(chosen) for chosen in self._kept],
            dropped={
                cause: [_finished(item) for item in found] for cause, found in sorted(self._dropped.items())
            },
        )

    def _choose(self, chosen: list[_Chosen], limit: int, item: _Chosen) -> None:
        if not _wins(chosen, limit, item.picture.rank):
            return
        if item.media is not None and len(item.media) > _HELD_BYTES:
            item = _Chosen(_finished(item), None, item.modality)
        chosen.append(item)
        chosen.sort(key=lambda one: (one.picture.rank, one.picture.key))
        del chosen[limit:]

    def _forget_before(self, row: int) -> None:
        for done in [number for number in self._passing if number < row]:
            del self._passing[done]


def _rank(key: str) -> int:
    return derive_seed(0, "contact", key)


def _wins(chosen: list[_Chosen], limit: int, rank: int) -> bool:
    return len(chosen) < limit or rank < chosen[-1].picture.rank


def _picture(rank: int, key: str, title: str, detail: str) -> Picture:
    return Picture(rank, key, title[:_TEXT], detail[:_TEXT])


def _finished(chosen: _Chosen) -> Picture:
    if chosen.media is None:
        return chosen.picture
    return replace(chosen.picture, thumbnail=make_thumbnail(chosen.media, chosen.modality))


def _first_caption(fetched: Fetched) -> str:
    texts, sidecar = fetched.input.captions, fetched.input.sidecar
    if fetched.sidecar is not None and sidecar is not None:
        try:
            texts, _ = parse_sidecar(fetched.sidecar, sidecar.path)
        except BadData:
            return ""
    return " ".join(texts[0].split()) if texts else ""


def _share(limit: int, tasks: int) -> int:
    """Pictures of one of ``tasks`` tasks: twice its share, since some tasks have fewer."""
    return min(limit, max(1, -(-2 * limit // tasks)))


def make_thumbnail(data: bytes, modality: Modality) -> bytes:
    """A JPEG of at most 128 pixels a side (of a clip: of its middle frame); empty where it cannot be decoded.

    Made in a decoding process: what was dropped may be what crashes a decoder.
    """
    if not data:
        return b""
    guard = shared_guard(
        "sharding.media.thumbnails:Thumbnailer", {"modality": modality}, timeout_s=30.0, memory_mb=2048
    )
    try:
        ((_, thumbnail),) = guard.result(guard.submit(data, None))
    except BadData:
        return b""
    return thumbnail
