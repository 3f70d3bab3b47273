"""Names of files: which of them are no part of a corpus, how records write them, and what was passed over.

A folder that people work in holds more than a corpus: metadata of macOS (``._0.jpg``, ``__MACOSX/``), checkpoints of
notebooks, thumbnails of a NAS, and deleted files. ``hidden`` is the one rule for all of them, in folders, among tables
and tars, and among the members of tars.

A name may hold anything: line ends, bytes that are not UTF-8 (which Python gives as lone surrogates), half a
surrogate pair. ``escape_name`` writes it as text of one line that every record, terminal and page can hold, and
``unescape_name`` gives the name again::

    caf<E9>.jpg   ->  caf\\xe9.jpg        a byte that is not UTF-8, or a control character
    a<U+2028>b    ->  a\\u2028b           a line separator, a mark of text direction, a lone surrogate
    C:\\xe9.jpg    ->  C:\\x5cxe9.jpg      a backslash where it would be taken for such an escape
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

HIDDEN = "hidden"
NO_SUFFIX = "no-suffix"
UNUSED_CAPTION = "unused-caption"  # no media file has its name, or another spelling of it is taken
NOT_LISTED = "not-in-the-list"
NOT_A_FILE = "not-a-file"
OTHER = "other"

# Besides all that begins with a dot (._NAME, .DS_Store, .Trash-1000, .ipynb_checkpoints, .git).
_FOLDERS = frozenset(
    {
        "__macosx",  # in zips made by macOS
        "@eadir", "#recycle", "#snapshot",  # Synology
        "@recycle", "@recently-snapshot", ".@__thumb",  # QNAP
        "$recycle.bin", "system volume information",  # Windows
        "lost+found",  # what fsck found: fragments without their names
    }
)  # fmt: skip
_FILES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"})
_SUFFIX = re.compile(r"\.[a-z0-9_+-]{1,12}")
_MOST_REASONS = 100

# What ``escape_name`` writes, and nothing else: no escape stands for a slash or a dot.
_WRITTEN = r"x([01][0-9a-f]|5c|7f|[89a-f][0-9a-f])|u(00[89][0-9a-f]|202[89a-e]|206[6-9]|d[89a-f][0-9a-f]{2})"
_ESCAPE = re.compile(rf"\\(?:{_WRITTEN})")
# Control characters, line ends, marks that turn the direction of text around, and surrogates; and a backslash where
# what follows would make an escape of it.
_TO_ESCAPE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]" + rf"|\\(?={_WRITTEN})")


def hidden(path: str) -> bool:
    """Whether a file is no part of a corpus, by its path below the folder (or in the tar) that a job names.

    Hidden is what begins with a dot or lies in such a folder, what lies in a folder of a system's own (``__MACOSX``,
    ``@eaDir``, ``$RECYCLE.BIN``, ``lost+found``, ...), and ``Thumbs.db`` and the like. Where the job's own path leads
    through such a folder, that does not count. ``.`` and ``..``, which may be parts of an S3 key, hide nothing.
    """
    *folders, name = path.split("/")
    return (
        any(folder.casefold() in _FOLDERS for folder in folders)
        or any(part.startswith(".") and part not in (".", "..") for part in (*folders, name))
        or name.casefold() in _FILES
    )


class Skipped:
    """Counts the files that a listing passes over, by reason: ``hidden``, or their suffix (``.pdf``).

    Of a folder: files = inputs + ``sidecars`` + sum of ``counts``.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.sidecars = 0  # files that are no inputs, but hold captions of inputs

    def clear(self) -> None:
        """Count from zero: a source may be listed again."""
        self._counts.clear()
        self.sidecars = 0

    def add(self, reason: str, number: int = 1) -> None:
        """Count files under a reason; under ``other`` where there are a hundred different ones."""
        known = reason in self._counts or len(self._counts) < _MOST_REASONS
        self._counts[reason if known else OTHER] += number

    def add_file(self, path: str) -> None:
        """Count a file that is of no kind the source reads, under its suffix."""
        suffix = posixpath.splitext(path)[1].lower()
        self.add(suffix if _SUFFIX.fullmatch(suffix) else NO_SUFFIX)

    def visible(self, paths: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        """Of listed (path, size) those that are not hidden; the others are counted."""
        for path, size in paths:
            if hidden(path):
                self.add(HIDDEN)
            else:
                yield path, size

    def add_other(self, path: str, _: str) -> None:
        """Count what is there but is no file (``others`` of ``Storage.list``)."""
        self.add(HIDDEN if hidden(path) else NOT_A_FILE)

    def merge(self, counts: Mapping[str, int]) -> None:
        """Count what another listing passed over."""
        for reason, number in counts.items():
            self.add(reason, number)

    def counts(self) -> dict[str, int]:
        """Files by reason, the most frequent first."""
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))


def escape_name(name: str) -> str:
    """The name as text of one line that UTF-8 can hold, from which ``unescape_name`` makes it again."""
    return _TO_ESCAPE.sub(lambda match: _escaped(ord(match[0])), name)


def unescape_name(text: str) -> str:
    """The name of which ``escape_name`` made this text."""

    def character(match: re.Match[str]) -> str:
        if match[1] is None:
            return chr(int(match[2], 16))
        value = int(match[1], 16)
        return chr(value if value < 0x80 else 0xDC00 + value)  # as os.fsdecode gives bytes that are not UTF-8

    return _ESCAPE.sub(character, text)


def _escaped(code: int) -> str:
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
