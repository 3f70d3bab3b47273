"""Media in a folder or under a prefix, captions in sidecar files."""

from __future__ import annotations

import itertools
import json
import posixpath
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sharding.captions import caption_lines
from sharding.errors import BadData, UserError
from sharding.manifest import Modality
from sharding.names import UNUSED_CAPTION, Skipped, escape_name, hidden
from sharding.sources.addresses import BelowBase
from sharding.sources.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Hasher, Input, described_captions, feed
from sharding.sources.config import FolderSource
from sharding.storage import ExactPath, Storage

# Files that wait for a sidecar of a name that begins like theirs (IMG.JPG, IMG.0001.jpg ..., IMG.txt); beyond that the
# storage is asked.
_MOST_WAITING = 10_000


@dataclass
class _Stem:
    """The files of one name: ``sidecars`` by their suffix as it is spelt."""

    name: str
    media: bool = False
    sidecars: dict[str, str] = field(default_factory=dict)
    sidecar: str | None = None  # decided once no more files of this name can come


class FolderListing:
    """All media files below a folder, in the order of their paths.

    A suffix may be in any case. Of several sidecars of one name that which is spelt as configured is taken, else the
    first.
    """

    def __init__(self, config: FolderSource, modality: Modality, storage: Storage) -> None:
        self._captions = config.captions
        self._suffixes = IMAGE_SUFFIXES if modality == "image" else VIDEO_SUFFIXES
        self._modality = modality
        self._root = storage.resolve(config.path)
        self.skipped = Skipped()

    @property
    def base(self) -> str:
        return self._root.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Names and sizes of media and sidecars identify the listing.

        A link to nothing that is named like a medium is a ``missing-file``, and a folder that cannot be read an
        ``unreadable-folder``; both come last.
        """
        self._root.check(write=False)
        self.skipped.clear()
        broken: list[Input] = []
        found = False
        for item in self._media(hasher, lambda path, why: self._other(path, why, broken)):
            found = True
            yield item
        for item in broken:
            feed(hasher, item.address, item.problem)
            yield item
        if not found and not broken:
            skipped = ", ".join(f"{reason} {number}" for reason, number in self.skipped.counts().items())
            raise UserError(
                f"empty corpus: no {self._modality} files ({' '.join(self._suffixes)}) below {self._root.url}"
                + (f"; passed over: {skipped}" if skipped else "")
            )

    def _media(self, hasher: Hasher, others: Callable[[str, str], None]) -> Iterator[Input]:
        """The media with their sidecars, streamed.

        Files come sorted by path, so that all of one name stand together but for those of longer names that begin
        with it (``a.jpg``, ``a.b.jpg``, ``a.txt``): the names that may still get files are a stack.
        """
        stems: list[_Stem] = []
        waiting: deque[tuple[str, int, _Stem]] = deque()
        for path, size in self.skipped.visible(self._root.list(others=others)):
            name, suffix = posixpath.splitext(path)
            is_sidecar, is_media = suffix.lower() == self._captions.lower(), suffix.lower() in self._suffixes
            if not is_sidecar and not is_media:
                self.skipped.add_file(path)
                continue
            feed(hasher, path, size)
            while stems and not path.startswith(f"{stems[-1].name}."):
                self._close(stems.pop())
            if not stems or stems[-1].name != name:
                stems.append(_Stem(name))
            stem = stems[-1]
            if is_sidecar:
                stem.sidecars[suffix] = path
            else:
                stem.media = True
                waiting.append((path, size, stem))
            if len(waiting) > _MOST_WAITING and waiting[0][2].sidecar is None:
                waiting[0][2].sidecar = self._asked(waiting[0][2])
            yield from self._decided(waiting)
        while stems:
            self._close(stems.pop())
        yield from self._decided(waiting)

    def _decided(self, waiting: deque[tuple[str, int, _Stem]]) -> Iterator[Input]:
        while waiting and waiting[0][2].sidecar is not None:
            path, size, stem = waiting.popleft()
            assert stem.sidecar is not None
            yield Input.at(BelowBase(path), sidecar=BelowBase(stem.sidecar), size=size)

    def _close(self, stem: _Stem) -> None:
        """Decide on the sidecar of a name that gets no more files, and count those that are not taken."""
        if stem.sidecar is None:
            default = stem.name + self._captions  # not there: the fetcher says so
            stem.sidecar = stem.sidecars.get(self._captions) or next(iter(stem.sidecars.values()), default)
        used = stem.media and stem.sidecar in stem.sidecars.values()
        self.skipped.sidecars += used
        if len(stem.sidecars) > used:
            self.skipped.add(UNUSED_CAPTION, len(stem.sidecars) - used)

    def _asked(self, stem: _Stem) -> str:
        """The sidecar of a name that may still get files: as ``_close`` will find it."""
        letters = [sorted({letter.upper(), letter.lower()}) for letter in self._captions]
        spelt = sorted("".join(chosen) for chosen in itertools.product(*letters))
        for suffix in (self._captions, *spelt):
            if self._root.exists(ExactPath(stem.name + suffix)):
                return stem.name + suffix
        return stem.name + self._captions

    def _other(self, path: str, why: str, broken: list[Input]) -> None:
        suffix = posixpath.splitext(path)[1].lower()
        if not hidden(path) and path.endswith("/"):
            broken.append(
                Input(escape_name(path), problem="unreadable-folder", reason=f"{escape_name(path)} {why}")
            )
        elif not hidden(path) and suffix in self._suffixes:
            broken.append(
                Input(escape_name(path), problem="missing-file", reason=f"{escape_name(path)} is {why}")
            )
        else:
            self.skipped.add_other(path, why)


def parse_sidecar(data: bytes, name: str) -> tuple[list[str], int]:
    """(captions, how many items are no text) of a sidecar file; its name's suffix says what it is.

    Raises:
        BadData: ``caption-not-text``: neither UTF-8 text nor JSON of the expected form.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData("caption-not-text", f"not UTF-8: {error.reason}") from None
    if name.lower().endswith(".txt"):
        return caption_lines(text), 0
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData("caption-not-text", f"not JSON: {error}") from None
    if not isinstance(value, dict) or not {"caption", "captions"} & value.keys():
        raise BadData("caption-not-text", 'JSON without the key "caption" or "captions"')
    return described_captions(value)
