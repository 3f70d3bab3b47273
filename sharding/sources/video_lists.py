"""The lists of clips that text-to-video retrieval is measured on: MSR-VTT's and LSMDC's.

Both are read whole before anything is listed: a clip's sentences need not stand together.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sharding.captions import is_text
from sharding.errors import UserError
from sharding.names import NOT_LISTED, Skipped, escape_name
from sharding.sources.addresses import BelowBase, below_base
from sharding.sources.base import VIDEO_SUFFIXES, Hasher, Input, feed, folder_and_name, texts_of
from sharding.sources.caption_files import list_in, read_json
from sharding.sources.config import LsmdcSource, MsrVttSource
from sharding.sources.rows import table_rows, text_lines
from sharding.storage import Storage

# What a clip may be called: its name becomes part of a path, which must not lead out of the folder.
_CLIP = re.compile(r"(?!\.)(?:[^/\\\x00-\x1f.]|\.(?!\.))+")
_LSMDC_COLUMNS = 6  # clip, four times, sentence


# Where a clip's file lies, and its bytes where they are known.
_Place = tuple[BelowBase, int | None]


@dataclass
class _Rows:
    """What a list says: sentences of each clip in the order in which the clips first appear, and bad rows."""

    sentences: dict[str, list[Any]] = field(default_factory=dict)
    bad: list[tuple[int | str, str]] = field(
        default_factory=list
    )  # line, or place in another file, and reason

    def add(self, line: int, clip: Any, sentences: list[Any], reason: str = "") -> None:
        """One row; ``reason``: why it cannot be read, if it cannot."""
        if isinstance(clip, str) and is_text(clip) and _CLIP.fullmatch(clip):
            self.sentences.setdefault(clip, []).extend(sentences)
        else:
            self.bad.append((line, reason or "it names no clip"))


class MsrVttListing:
    """Clips in the order of the list, each with its sentences; a row without a good ``video_id`` is ``bad-row``."""

    def __init__(self, config: MsrVttSource, storage: Storage) -> None:
        self._config = config
        folder, self._name = folder_and_name(config.path)
        self._file = storage.resolve(folder)
        self._storage, self._videos = storage, storage.resolve(config.videos)
        self.skipped = Skipped()  # nothing is listed

    @property
    def base(self) -> str:
        return self._videos.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Addresses and sentences identify the listing, not the clips' contents."""
        rows = self._rows()
        if self._config.annotations is not None:
            annotated = self._annotated(self._config.annotations, rows)
            rows.sentences = {clip: annotated.get(clip, []) for clip in rows.sentences}
        addresses: dict[str, _Place] = {clip: (below_base(f"{clip}.mp4"), None) for clip in rows.sentences}
        yield from _listed(rows, addresses, self._name, self._file.url_of(self._name), hasher)

    def _rows(self) -> _Rows:
        url = self._file.url_of(self._name)
        wanted = ["video_id"] if self._config.annotations is not None else ["video_id", "sentence"]
        rows = _Rows()
        try:
            with self._file.open(self._name) as stream:
                for row in table_rows(stream, url, None, wanted, address_column="video_id"):
                    cells = row.cells or {}
                    rows.add(row.number, cells.get("video_id"), [cells.get("sentence")], row.reason)
        except FileNotFoundError:
            raise UserError(f"no such file: {url}") from None
        except UserError as error:
            if "has no column 'sentence'" in str(error):
                raise UserError(f"{error}; give its sentences as source.annotations") from None
            raise
        return rows

    def _annotated(self, path: str, rows: _Rows) -> dict[str, list[Any]]:
        """All sentences of each clip in the annotations file; one of no clip is a bad row."""
        folder, name = folder_and_name(path)
        file = self._storage.resolve(folder)
        found: dict[str, list[Any]] = defaultdict(list)
        url = file.url_of(name)
        for number, sentence in enumerate(list_in(read_json(file, name), "sentences", url)):
            clip = sentence.get("video_id") if isinstance(sentence, dict) else None
            if isinstance(clip, str):
                found[clip].append(sentence.get("caption"))
            else:
                rows.bad.append((f"{name}:sentences[{number}]", "it has no video_id"))
        return found


class LsmdcListing:
    """Clips in the order of the list, each with its sentences, wherever below ``videos`` their files lie.

    A row that has not six columns in UTF-8, or names no clip, is ``bad-row``; a clip without a file is listed where
    LSMDC has it, ``FILM/CLIP.avi``, and found missing there.
    """

    def __init__(self, config: LsmdcSource, storage: Storage) -> None:
        folder, self._name = folder_and_name(config.path)
        self._file = storage.resolve(folder)
        self._videos = storage.resolve(config.videos)
        self.skipped = Skipped()

    @property
    def base(self) -> str:
        return self._videos.url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Names and sizes of the files and the sentences identify the listing."""
        rows = self._rows()
        self._videos.check(write=False)
        files = self._files(rows.sentences)
        addresses = {
            clip: files.get(clip) or (below_base(f"{_film(clip)}/{clip}.avi"), None)
            for clip in rows.sentences
        }
        yield from _listed(rows, addresses, self._name, self._file.url_of(self._name), hasher)

    def _rows(self) -> _Rows:
        url, rows = self._file.url_of(self._name), _Rows()
        try:
            with self._file.open(self._name) as stream:
                for number, line in text_lines(stream, url):
                    columns = [] if line is None else line.rstrip("\r\n").split("\t")
                    if line is not None and not line.strip():
                        continue
                    if len(columns) >= _LSMDC_COLUMNS:
                        reason = "" if is_text(line) else "it is not UTF-8"
                    else:
                        reason = "it is too long" if line is None else f"it has {len(columns)} columns"
                    rows.add(number, None if reason else columns[0], columns[-1:], reason)
        except FileNotFoundError:
            raise UserError(f"no such file: {url}") from None
        return rows

    def _files(self, clips: dict[str, list[Any]]) -> dict[str, _Place]:
        """Path below ``videos`` and size of each clip's file."""
        found: dict[str, _Place] = {}
        self.skipped.clear()
        for path, size in self.skipped.visible(self._videos.list(others=self.skipped.add_other)):
            clip, suffix = posixpath.splitext(posixpath.basename(path))
            if suffix.lower() not in VIDEO_SUFFIXES:
                self.skipped.add_file(path)
            elif clip not in clips:
                self.skipped.add(NOT_LISTED)
            elif clip in found:
                raise UserError(
                    f"{self._videos.url} has two files of clip {clip}: {found[clip][0].path} and {path}"
                )
            else:
                found[clip] = BelowBase(path), size
        return found


def _film(clip: str) -> str:
    """``3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675`` is of ``3009_BATTLE_LOS_ANGELES``."""
    return clip.rpartition("_")[0] or clip


def _listed(
    rows: _Rows, addresses: dict[str, _Place], name: str, url: str, hasher: Hasher
) -> Iterator[Input]:
    if not rows.sentences:
        raise UserError(f"empty corpus: {url} lists no clips")
    for clip, sentences in rows.sentences.items():
        texts, not_text = texts_of(sentences)
        address, size = addresses[clip]
        feed(hasher, address.path, size, texts, not_text)
        yield Input.at(address, captions=texts, not_text=not_text, size=size)
    for place, reason in rows.bad:
        where = escape_name(place if isinstance(place, str) else f"{name}:{place}")
        item = Input(address=where, problem="bad-row", reason=reason)
        feed(hasher, item.address, None, [], 0, item.problem)
        yield item
