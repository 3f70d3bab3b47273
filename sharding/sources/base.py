"""What every source yields, and what a source is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict
from urllib.parse import unquote

_json = json.JSONEncoder(separators=(",", ":")).encode  # made once: it is called for every row of a corpus

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".heic", ".heif", ".hif",
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ogv", ".flv", ".ts", ".gif", ".webp")


class Member(TypedDict):
    """Where in a container a text lies: ``offset`` and ``size`` in bytes. A dict, as Parquet gives it back."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Input:
    """One sample as the source lists it; nothing of its media has been read yet.

    Args:
        address: of the media: a path relative to the source's base, an absolute path, or a url. Of media in a
            container: what records call it.
        captions: texts known from the listing (a table's).
        sidecar: path, relative to the base, of the file that holds the captions (a folder's).
        not_text: how many captions were given that are no text.
        problem: a cause of dropping that the listing already found, e.g. ``"bad-row"``.
        container: the file that holds the media, as addresses are written (a tar).
        offset: of the media in its container, in bytes.
        size: of the media in bytes, where the listing knows it; another size later is a fault.
        row: the number of the row that holds the media (Hugging Face).
        texts: the members of the container that hold the captions.
    """

    address: str
    captions: list[str] = field(default_factory=list)
    sidecar: str | None = None
    not_text: int = 0
    problem: str | None = None
    container: str | None = None
    offset: int | None = None
    size: int | None = None
    row: int | None = None
    texts: list[Member] = field(default_factory=list)


class Hasher(Protocol):
    """What ``hashlib`` objects are."""

    def update(self, data: bytes, /) -> None: ...


class Source(Protocol):
    """A corpus. A new kind of source implements this and is named in ``sources.open_source``."""

    @property
    def base(self) -> str:
        """Url that relative addresses and sidecars are relative to."""

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """The samples in a fixed order, streamed; ``hasher`` is fed what identifies the listing.

        Raises:
            UserError: the source is missing, empty of rows, or not what the configuration says.
        """


def feed(hasher: Hasher, *parts: Any) -> None:
    """Feed one line of JSON, so that no two different listings give the same bytes."""
    hasher.update(_json(parts).encode() + b"\n")


def folder_and_name(url: str) -> tuple[str, str]:
    """The folder's url and the file's name in it, of a file's normalised url."""
    folder, _, name = url.rpartition("/")
    # A file:// url is percent-encoded; paths within a storage are not.
    return folder, unquote(name) if url.startswith("file://") else name


def texts_of(value: Any) -> tuple[list[str], int]:
    """(texts, how many items are no text) of a caption cell: a text, a list of texts, or nothing."""
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    texts = [item for item in items if isinstance(item, str) and _encodable(item)]
    return texts, len(items) - len(texts)


def _encodable(text: str) -> bool:
    # JSON may spell half a surrogate pair, which no UTF-8 file can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
