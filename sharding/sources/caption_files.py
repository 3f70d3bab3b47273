"""Captions in one JSON file: COCO's own format, and Karpathy's splits.

Such a file is one JSON value, so it is read whole while it is listed, and may have ``LARGEST_JSON`` bytes at
most. Larger corpora are tables.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from sharding.errors import BadData, UserError
from sharding.names import Skipped, escape_name
from sharding.sources.addresses import Address, below_base, remote_url
from sharding.sources.base import Hasher, Input, feed, folder_and_name, identity, texts_of
from sharding.sources.config import CocoSource, KarpathySource
from sharding.sources.rows import json_fault
from sharding.storage import Storage

# Python's objects take several times the bytes of the JSON they come from.
LARGEST_JSON = 512 << 20
_MOST_DIGITS = 100


class CocoListing:
    """The images of a COCO captions file in its order, each with its captions in the order of annotations.

    An image without captions is listed without; an annotation of an image that the file does not list, and
    an entry that is not of the format, are listed as ``bad-row``.
    """

    def __init__(self, config: CocoSource, storage: Storage) -> None:
        folder, self._name = folder_and_name(config.path)
        self._config = config
        self._file = storage.resolve(folder)
        self._base = self._file if config.images is None else storage.resolve(config.images)
        self.skipped = Skipped()  # nothing is listed

    @property
    def base(self) -> str:
        return self._base.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Addresses and captions identify the listing, not the media's contents."""
        content = read_json(self._file, self._name)
        url = self._file.url_of(self._name)
        images, annotations = list_in(content, "images", url), list_in(content, "annotations", url)
        captions: dict[Any, list[Any]] = defaultdict(list)
        strays: list[int] = []
        for number, annotation in enumerate(annotations):
            image = annotation.get("image_id") if isinstance(annotation, dict) else None
            if _is_key(image):
                captions[image].append(annotation.get("caption"))
            else:
                strays.append(number)
        for item in self._images(images, captions):
            feed(hasher, identity(item), item.captions, item.not_text, item.problem)
            yield item
        # What no image took.
        for place, reason in [
            *((f"annotations[{number}]", "it names no image") for number in strays),
            *((f"image {_short(key)}", "annotations of an image that is not listed") for key in captions),
        ]:
            where = f"{escape_name(self._name)}:{place}"
            stray = Input(address=where, problem="bad-row", reason=reason)
            feed(hasher, stray.address, [], 0, stray.problem)
            yield stray
        if not images:
            raise UserError(f"empty corpus: {url} lists no images")

    def _images(self, images: list[Any], captions: dict[Any, list[Any]]) -> Iterator[Input]:
        field = self._config.url_field or "file_name"
        seen: set[Any] = set()
        for number, image in enumerate(images):
            key = image.get("id") if isinstance(image, dict) else None
            place = f"{escape_name(self._name)}:images[{number}]"
            if not _is_key(key) or key in seen:
                reason = "its id stands twice" if _is_key(key) else "it has no id"
                yield Input(address=place, problem="bad-row", reason=reason)
                continue
            seen.add(key)
            texts, not_text = texts_of(captions.pop(key, []))
            address = image.get(field)
            made = remote_url if self._config.url_field else below_base
            yield _named(address, made, place, captions=texts, not_text=not_text)


def _is_key(value: Any) -> bool:
    """Whether it is an image's id: true would be equal to 1."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def _short(key: int | str) -> str:
    return escape_name(str(key))[:100]


class KarpathyListing:
    """The images of a Karpathy JSON file in its order; ``where`` the splits asked for."""

    def __init__(self, config: KarpathySource, storage: Storage) -> None:
        folder, self._name = folder_and_name(config.path)
        self._config = config
        self._file = storage.resolve(folder)
        self._base = storage.resolve(config.images)
        self.skipped = Skipped()  # nothing is listed

    @property
    def base(self) -> str:
        return self._base.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Addresses and captions identify the listing, not the media's contents."""
        content = read_json(self._file, self._name)
        url = self._file.url_of(self._name)
        images, wanted = list_in(content, "images", url), self._config.splits
        there = {_split(image) for image in images if isinstance(image, dict) and "split" in image}
        missing = sorted(set(wanted or ()) - there)
        if missing:
            names = ", ".join(sorted(map(escape_name, there))) or "none"
            raise UserError(f"{url} has no split {missing[0]!r}; it has {names}")
        if not images:
            raise UserError(f"empty corpus: {url} lists no images")
        for number, image in enumerate(images):
            if isinstance(image, dict) and wanted is not None and _split(image) not in wanted:
                continue
            item = _karpathy_input(image, f"{escape_name(self._name)}:images[{number}]")
            feed(hasher, identity(item), item.captions, item.not_text, item.problem)
            yield item


def _split(image: dict[str, Any]) -> str:
    split = image.get("split")
    return split if isinstance(split, str) else f"({type(split).__name__})"


def _karpathy_input(image: Any, place: str) -> Input:
    if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
        return Input(address=place, problem="bad-row")
    path = [image.get("filepath", ""), image.get("filename")]  # Flickr's files have no filepath
    name = None if texts_of(path)[1] or not path[1].strip() else "/".join(filter(None, path))
    raw = [item.get("raw") if isinstance(item, dict) else item for item in image["sentences"]]
    texts, not_text = texts_of(raw)
    return _named(name, below_base, place, captions=texts, not_text=not_text)


def _named(name: Any, made: Callable[[str], Address], place: str, **fields: Any) -> Input:
    """The input whose media the file names; ``bad-address`` at its place in the file, where it names none."""
    if not isinstance(name, str) or texts_of(name)[1]:
        return Input(address=place, problem="bad-address")
    try:
        return Input.at(made(name.strip()), **fields)
    except BadData as fault:
        return Input(address=place, problem=fault.cause, reason=fault.detail)


def read_json(folder: Storage, name: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is not there, too large, not JSON or no object.
    """
    url = folder.url_of(name)
    try:
        size = folder.size(name)
    except FileNotFoundError:
        raise UserError(f"no such file: {url}") from None
    if size > LARGEST_JSON:
        raise UserError(f"{url} has {size} bytes; above {LARGEST_JSON} make it a table of JSON lines")
    data = folder.read_bytes(name)  # its errors are UserErrors, and so ValueErrors, of their own
    try:
        # Bytes that are not UTF-8 become half surrogates, and cost the texts that hold them (``texts_of``).
        encoding = json.detect_encoding(data)
        content = json.loads(
            data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict"),
            parse_int=_number,
        )
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{url} is not JSON{place}: {json_fault(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{url} is not a JSON object")
    return content


def _number(digits: str) -> int | float:
    """A whole number; infinite where it has more digits than Python reads, so that it costs its entry alone."""
    return int(digits) if len(digits) <= _MOST_DIGITS else math.inf


def list_in(content: dict[str, Any], key: str, url: str) -> list[Any]:
    """A list of the object; UserError, naming the file at ``url``, if it has none of this name."""
    value = content.get(key)
    if not isinstance(value, list):
        raise UserError(f"{url} has no list {key!r}: it is not of this source's kind")
    return value
