"""The lists of clips that text-to-video retrieval is measured on: MSR-VTT's and LSMDC's.

Both are read whole before anything is listed: a clip's sentences need not stand together.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sharding.errors import UserError
from sharding.names import NOT_LISTED, Skipped, escape_name
from sharding.sources.addresses import BelowBase, below_base
from sharding.sources.base import VIDEO_SUFFIXES, Hasher, Input, feed, folder_and_name, texts_of
from sharding.sources.caption_files import list_in, read_json
from sharding.sources.config import LsmdcSource, MsrVttSource
from sharding.storage import Storage

# What a clip may be called: its name becomes part of a path, which must not lead out of the folder.
_CLIP = re.compile(r"(?!\.)(?:[^/\\\x00-\x1f.]|\.(?!\.))+")
_LSMDC_COLUMNS = 6  # clip, four times, sentence
_LONGEST_LINE = 1 << 20


# Where a clip's file lies, and its bytes where they are known.
_Place = tuple[BelowBase, int | None]


@dataclass
class _Rows:
    """What a list says: sentences of each clip in the order in which the clips first appear, and bad rows."""

    sentences: dict[str, list[Any]] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)  # by line

    def add(self, line: int, clip: Any, sentences: list[Any]) -> None:
        """One row."""
        if isinstance(clip, str) and _CLIP.fullmatch(clip):
            self.sentences.setdefault(clip, []).extend(sentences)
        else:
            self.bad.append(line)


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
            annotated = self._annotated(self._config.annotations)
            rows.sentences = {clip: annotated.get(clip, []) for clip in rows.sentences}
        addresses: dict[str, _Place] = {clip: (below_base(f"{clip}.mp4"), None) for clip in rows.sentences}
        yield from _listed(rows, addresses, self._name, self._file.url_of(self._name), hasher)

    def _rows(self) -> _Rows:
        url = self._file.url_of(self._name)
        wanted = ["video_id"] if self._config.annotations is not None else ["video_id", "sentence"]
        rows = _Rows()
        try:
            with self._file.open(self._name) as stream:
                reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
                for column in wanted:
                    if column not in (there := reader.fieldnames or ()):
                        other = "" if column == "video_id" else "; give its sentences as source.annotations"
                        raise UserError(
                            f"{url} has no column {column!r}; it has {', '.join(there) or 'none'}{other}"
                        )
                for row in reader:
                    # A row that is too short has None in its last cells, a too long one has the key None.
                    clip = None if None in row else row["video_id"]
                    rows.add(reader.line_num, clip, [row.get("sentence")])
        except FileNotFoundError:
            raise UserError(f"no such file: {url}") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{url} is not a CSV table in UTF-8: {error}") from None
        return rows

    def _annotated(self, path: str) -> dict[str, list[Any]]:
        """All sentences of each clip in the annotations file."""
        folder, name = folder_and_name(path)
        file = self._storage.resolve(folder)
        found: dict[str, list[Any]] = defaultdict(list)
        url = file.url_of(name)
        for number, sentence in enumerate(list_in(read_json(file, name), "sentences", url)):
            if not isinstance(sentence, dict) or not isinstance(sentence.get("video_id"), str):
                raise UserError(f"{url}: sentences[{number}] has no video_id")
            found[sentence["video_id"]].append(sentence.get("caption"))
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
                for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), start=1):
                    if len(line) == _LONGEST_LINE:
                        raise UserError(f"{url} line {number} is longer than {_LONGEST_LINE} bytes")
                    if not line.strip():
                        continue
                    try:
                        columns = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
                    except UnicodeDecodeError:
                        columns = []
                    good = len(columns) >= _LSMDC_COLUMNS
                    rows.add(number, columns[0] if good else None, columns[-1:])
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
    for line in rows.bad:
        item = Input(address=f"{escape_name(name)}:{line}", problem="bad-row")
        feed(hasher, item.address, None, [], 0, item.problem)
        yield item
