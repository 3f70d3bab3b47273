"""What every source yields, and what a source is."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict
from urllib.parse import unquote

from sharding.captions import is_text
from sharding.errors import BadData, UnreadableObject
from sharding.names import Skipped
from sharding.sources.addresses import Address, BelowBase, LocalFile, S3Object, WebUrl, shown
from sharding.storage import ExactPath

_json = json.JSONEncoder(separators=(",", ":")).encode  # made once: it is called for every row of a corpus

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".heic", ".heif", ".hif",
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ogv", ".flv", ".ts", ".gif", ".webp")


# Faults of the one path that was named, not of the storage.
_UNREADABLE = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ, errno.EINVAL,
        errno.EIO, errno.ENXIO,
    }
)  # fmt: skip


class Member(TypedDict):
    """Where in a container a text lies: ``offset`` and ``size`` in bytes. A dict, as Parquet gives it back."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Input:
    """One sample as the source lists it; nothing of its media has been read yet.

    Args:
        address: what records and people call it: one line, without secrets. Nothing is opened by it.
        captions: texts known from the listing (a table's).
        media: where the media lie: a file of their own, or the tar that holds them. None where there is nothing to
            open by an address: the input has a ``problem``, a ``row``, or is made.
        sidecar: the file that holds the captions (a folder's).
        not_text: how many captions were given that are no text.
        problem: a cause of dropping that the listing already found, e.g. ``"bad-row"``.
        reason: of the problem, in words; of captions that are no text, where they stand.
        offset: of the media in the tar, in bytes; None where the file is the media.
        size: of the media in bytes, where the listing knows it; another size later is a fault.
        row: the number of the row that holds the media (Hugging Face).
        texts: the members of the container that hold the captions.
    """

    address: str
    captions: list[str] = field(default_factory=list)
    media: Address | None = None
    sidecar: BelowBase | None = None
    not_text: int = 0
    problem: str | None = None
    reason: str | None = None
    offset: int | None = None
    size: int | None = None
    row: int | None = None
    texts: list[Member] = field(default_factory=list)

    @classmethod
    def at(cls, media: Address, **fields: Any) -> Input:
        """The input whose media are a file of their own."""
        return cls(address=shown(media), media=media, **fields)


class Hasher(Protocol):
    """What ``hashlib`` objects are."""

    def update(self, data: bytes, /) -> None: ...


class Source(Protocol):
    """A corpus. A new kind of source implements this and is named in ``sources.open_source``."""

    @property
    def base(self) -> str:
        """Url that ``BelowBase`` addresses are relative to."""

    @property
    def skipped(self) -> Skipped:
        """The files that the last whole listing passed over."""

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """The samples in a fixed order, streamed; ``hasher`` is fed what identifies the listing.

        Raises:
            UserError: the source is missing, empty of rows, or not what the configuration says.
        """


class UnreadableFile(BadData):
    """A file that the storage does not give, for a reason of its own; other files may be fine."""


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what keeps a single file from being read into its cause.

    Args:
        name: of the file, for the message.

    Raises:
        UnreadableFile: ``archived``, ``access-denied``, ``encrypted``, ``no-such-bucket``, ``wrong-region``,
            ``bad-address``, ``unreadable-file``.
    """
    try:
        yield
    except UnreadableObject as error:
        raise UnreadableFile(error.cause, str(error)) from None
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise UnreadableFile("unreadable-file", f"{name}: {error.strerror}") from None
        raise


def unreadable(place: str, fault: UnreadableFile) -> Input:
    """A whole tar or table that cannot be read: one bad input, in place of the unknown number in it."""
    return Input(address=place, problem=fault.cause, reason=fault.detail)


def feed(hasher: Hasher, *parts: Any) -> None:
    """Feed one line of JSON, so that no two different listings give the same bytes."""
    hasher.update(_json(parts).encode() + b"\n")


def identity(item: Input) -> str:
    """What names the input in the digest of its listing: also the parts of a url that are not shown."""
    match item.media:
        case None:
            return item.address
        case BelowBase(path) | LocalFile(path):
            return path
        case WebUrl(url):
            return url
        case S3Object(bucket, key):
            return f"s3://{bucket}/{key}"


def folder_and_name(url: str) -> tuple[str, str]:
    """The folder's url and the file's name in it, of a file's normalised url."""
    folder, _, name = url.rpartition("/")
    if url.startswith("file://"):  # percent-encoded; paths within a storage are not
        return folder, unquote(name, errors="surrogateescape")
    whole = folder.rstrip(
        "/"
    )  # a folder's url ends without a slash: of several, all but one belong to the name
    return whole, ExactPath(folder[len(whole) :] + name)


def described_captions(value: dict[str, Any]) -> tuple[list[str], int]:
    """(captions, how many items are no text) of JSON: of ``captions`` if it holds any, else of ``caption``."""
    return texts_of(value.get("captions") or value.get("caption"))


def texts_of(value: Any) -> tuple[list[str], int]:
    """(texts, how many items are no text) of a caption cell: a text, a list of texts, or nothing."""
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    texts = [item for item in items if is_text(item)]
    return texts, len(items) - len(texts)
