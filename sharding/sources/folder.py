"""Media in a folder or under a prefix, captions in sidecar files."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator

from sharding.captions import caption_lines
from sharding.errors import BadData, UserError
from sharding.manifest import Modality
from sharding.sources.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Hasher, Input, feed, texts_of
from sharding.sources.config import FolderSource
from sharding.storage import Storage


class FolderListing:
    """All media files below a folder, in the order of their paths."""

    def __init__(self, config: FolderSource, modality: Modality, storage: Storage) -> None:
        self._config = config
        self._suffixes = IMAGE_SUFFIXES if modality == "image" else VIDEO_SUFFIXES
        self._modality = modality
        self._root = storage.resolve(config.path)

    @property
    def base(self) -> str:
        return self._root.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Names and sizes of media and sidecars identify the listing."""
        self._root.check(write=False)
        found = False
        for path, size in self._root.list():
            stem, suffix = posixpath.splitext(path)
            if suffix == self._config.captions:
                feed(hasher, path, size)
            elif suffix.lower() in self._suffixes:
                feed(hasher, path, size)
                found = True
                yield Input(address=path, sidecar=stem + self._config.captions, size=size)
        if not found:
            raise UserError(
                f"empty corpus: no {self._modality} files ({' '.join(self._suffixes)}) below {self._root.url}"
            )


def parse_sidecar(data: bytes, suffix: str) -> tuple[list[str], int]:
    """(captions, how many items are no text) of a sidecar file.

    Raises:
        BadData: ``caption-not-text``: neither UTF-8 text nor JSON of the expected form.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData("caption-not-text", f"not UTF-8: {error.reason}") from None
    if suffix == ".txt":
        return caption_lines(text), 0
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData("caption-not-text", f"not JSON: {error}") from None
    if not isinstance(value, dict) or not {"caption", "captions"} & value.keys():
        raise BadData("caption-not-text", 'JSON without the key "caption" or "captions"')
    return texts_of(value["captions"] if "captions" in value else value["caption"])
