"""Images with phrases and their regions, from pickles read as data (:mod:`.pickles`).

Two layouts:

* ALIGN-BENCH's own, as the evaluation scripts of SCL's authors read it (https://github.com/IIGROUP/SCL): a folder of
  pickles, ``pkls/NAME.pkl`` belonging to ``images/NAME.jpg``; each ``{"caption": text, "annotation": {phrase:
  [{"bbox_mask": (x1, y1, x2, y2), "pixel_mask": [height, width]}, ...]}}``. Where in the caption a phrase stands is
  found by its words.
* one pickle of all images: a list of ``{"image": path, "caption": text, "phrases": [{"phrase": text, "span":
  [first, end), "boxes": [[x1, y1, x2, y2], ...], "mask": [height, width]}, ...]}``, or a dict of the same by path.

Boxes and masks are in pixels of the image as it is stored, right and lower ends of boxes excluded.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation.tasks.alignment.pickles import read_plain_pickle
from pipeline.evaluation.tasks.annotations import require
from pipeline.evaluation.tasks.pictures import ImageAddress
from sharding.errors import UserError
from sharding.names import hidden
from sharding.sources.base import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.alignment.config import AlignmentTask
    from sharding.storage import Storage

_MOST_BYTES = 1 << 30  # of one pickle
_MOST_BOXES = 2000  # of one image: a file may mention the same one any number of times

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Phrase:
    """Some words of a caption and where in the image is what they name.

    Args:
        text: the words.
        span: [first, end) in the caption, characters; None where only the words are known.
        boxes: (x1, y1, x2, y2), pixels.
        masks: [height, width] of numbers, zero outside: one for each box, or one for all of them.
    """

    text: str
    span: tuple[int, int] | None
    boxes: tuple[Box, ...]
    masks: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of the benchmark; ``key`` is unique in it."""

    key: str
    image: ImageAddress
    caption: str
    phrases: tuple[Phrase, ...]


class AlignmentData:
    """The annotated images of a task; those of a folder are read one file at a time.

    Args:
        storage: the job's.
        task: which files; its limit counts.

    Raises:
        UserError: files that are not there; of one pickle also what iterating raises.
    """

    def __init__(self, storage: Storage, task: AlignmentTask) -> None:
        self._task = task
        self._images = storage.resolve(task.images)
        self._images.check(write=False)
        self._files: list[str] = []
        self._read: list[AnnotatedImage] = []
        if task.annotations.endswith(".pkl"):
            folder, name = require(storage, task.annotations, "annotations")
            self._read = _several(_plain(folder, name), task.images, folder.url_of(name))[: task.limit]
            return
        self._folder = storage.resolve(task.annotations)
        self._folder.check(write=False)
        self._files = [path for path, _ in self._folder.list() if path.endswith(".pkl") and not hidden(path)][
            : task.limit
        ]
        if not self._files:
            raise UserError(f"annotations: there are no .pkl files below {self._folder.url}")

    def __len__(self) -> int:
        return len(self._files) or len(self._read)

    def __iter__(self) -> Iterator[AnnotatedImage]:
        """In the order of the files' paths, or of the file.

        Raises:
            UserError: a pickle that is refused, or something else in it than the layouts have, by its place.
        """
        yield from self._read
        if not self._files:
            return
        known = {
            stem: path
            for stem, suffix, path in ((*posixpath.splitext(path), path) for path, _ in self._images.list())
            if suffix.lower() in IMAGE_SUFFIXES and not hidden(path)
        }
        for path in self._files:
            stem = posixpath.splitext(path)[0]
            value = _plain(self._folder, path)
            yield _one(
                value,
                stem,
                ImageAddress(self._task.images, known.get(stem, f"{stem}.jpg")),
                self._folder.url_of(path),
            )


def _plain(folder: Storage, name: str) -> Any:
    url = folder.url_of(name)
    if folder.size(name) > _MOST_BYTES:
        raise UserError(f"annotations: {url} has more than {_MOST_BYTES >> 20} MiB")
    return read_plain_pickle(folder.read_bytes(name), url)


def _several(value: Any, images: str, url: str) -> list[AnnotatedImage]:
    named: list[tuple[str, Any, str]] = []
    if isinstance(value, dict):
        named = [(_text(key, f"{url}: a key"), one, f"{url}, {key!r}") for key, one in value.items()]
    elif isinstance(value, list):
        for number, one in enumerate(value):
            place = f"{url}, item {number}"
            named.append((_text(_member(one, "image", place), f"{place}, 'image'"), one, place))
    else:
        raise UserError(f"{url} must hold a list of images, or a dict, not {type(value).__name__}")
    if not named:
        raise UserError(f"annotations: {url} has no images")
    found: list[AnnotatedImage] = []
    seen: dict[str, int] = {}
    for path, one, place in named:
        seen[path] = seen.get(path, 0) + 1
        key = path if seen[path] == 1 else f"{path}#{seen[path]}"
        found.append(_one(one, key, ImageAddress(images, path), place))
    return found


def _one(value: Any, key: str, image: ImageAddress, place: str) -> AnnotatedImage:
    caption = _text(_member(value, "caption", place), f"{place}, 'caption'")
    if "annotation" in value:
        phrases = _published(value["annotation"], place)
    else:
        given = _member(value, "phrases", place)
        phrases = tuple(
            _phrase(one, caption, f"{place}, phrase {number}")
            for number, one in enumerate(_items(given, place))
        )
    if sum(len(phrase.boxes) for phrase in phrases) > _MOST_BOXES:
        raise UserError(f"{place} has more than {_MOST_BOXES} boxes")
    return AnnotatedImage(key, image, caption, phrases)


def _published(value: Any, place: str) -> tuple[Phrase, ...]:
    if not isinstance(value, dict):
        raise UserError(f"{place}, 'annotation' is no dict but {type(value).__name__}")
    phrases = []
    for text, regions in value.items():
        where = f"{place}, {text!r}"
        regions = _items(regions, where)
        phrases.append(
            Phrase(
                text=_text(text, where),
                span=None,
                boxes=tuple(_box(_member(one, "bbox_mask", where), where) for one in regions),
                masks=tuple(_mask(_member(one, "pixel_mask", where), where) for one in regions),
            )
        )
    return tuple(phrases)


def _phrase(value: Any, caption: str, place: str) -> Phrase:
    span = _items(_member(value, "span", place), f"{place}, 'span'")
    if (
        len(span) != 2
        or not all(isinstance(end, int) for end in span)
        or not 0 <= span[0] < span[1] <= len(caption)
    ):
        raise UserError(f"{place}, 'span' is not [first, end) within the caption's {len(caption)} characters")
    boxes = _items(_member(value, "boxes", place), f"{place}, 'boxes'")
    return Phrase(
        text=_text(_member(value, "phrase", place), f"{place}, 'phrase'"),
        span=(span[0], span[1]),
        boxes=tuple(_box(box, place) for box in boxes),
        masks=(_mask(_member(value, "mask", place), place),),
    )


def _member(value: Any, key: str, place: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise UserError(f"{place} has no {key!r}")
    return value[key]


def _items(value: Any, place: str) -> Sequence[Any]:
    if isinstance(value, np.ndarray) and value.ndim:
        return value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{place} must be a list that is not empty, not {type(value).__name__}")
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place} must be text, and not empty")
    return value


def _box(value: Any, place: str) -> Box:
    numbers = _items(value, f"{place}: a box")
    if len(numbers) != 4 or not all(isinstance(one, int | float) and np.isfinite(one) for one in numbers):
        raise UserError(f"{place}: a box must be four numbers, x1, y1, x2, y2")
    x1, y1, x2, y2 = (int(one) for one in numbers)
    return x1, y1, x2, y2


def _mask(value: Any, place: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 2:
        raise UserError(f"{place}: a mask must be an array [height, width]")
    return value
