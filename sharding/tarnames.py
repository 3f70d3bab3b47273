"""Which members of a tar make a sample, by their names: one rule for ``source: webdataset`` and ``shards index``.

WebDataset's rule gives the key and the extension: the key ends at the first dot of the last part of the path. The
last part of the extension says what a member is, whatever its case::

    dog.jpg             key dog           extension jpg        media
    2024.06.dog.JPG     key 2024          extension 06.dog.jpg media
    dir/dog.0.txt       key dir/dog       extension 0.txt      text
    dog.json            key dog           extension json       JSON
    __meta__/a.txt                        of the tar, not of a sample
    README              no extension: of no sample
    ._dog.jpg           hidden (sharding.names): of no sample
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from sharding.names import HIDDEN, Skipped, hidden

#: Last parts of the extensions of text members.
TEXT_EXTENSIONS = ("txt", "text", "cap", "caption", "captions")

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_OF_THE_TAR = re.compile(r"__[^/]*__(?=[./]|$)")


def clean_name(name: str) -> str:
    """A member's name without the ``./`` that ``tar .`` puts before it."""
    return name.removeprefix("./")


def is_of_tar(name: str) -> bool:
    """Whether a member describes the tar (``__classnames__.txt``, ``__meta__/...``): it belongs to no sample."""
    return _OF_THE_TAR.match(clean_name(name)) is not None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member; None where it belongs to no sample, as hidden ones do."""
    aside = is_of_tar(name) or hidden(clean_name(name))
    found = None if aside else _NAME.fullmatch(clean_name(name))
    return None if found is None else (found[1], found[2].lower())


def count_aside(name: str, skipped: Skipped) -> None:
    """Count a member that belongs to no sample."""
    if hidden(clean_name(name)):
        skipped.add(HIDDEN)
    else:
        skipped.add_file(name)


def last_part(extension: str) -> str:
    """What a member is: ``txt`` of ``0.txt``."""
    return extension.rpartition(".")[2]


def clips_of(extensions: Collection[str]) -> list[str]:
    """Of the extensions of a key's clips those that are of clips alone, where there are such.

    A GIF or WebP beside ``dog.mp4`` is its thumbnail or preview; alone it may be the clip.
    """
    return [one for one in extensions if last_part(one) not in ("gif", "webp")] or list(extensions)


def of_kind(extensions: Iterable[str], kinds: Collection[str]) -> list[str]:
    """The extensions whose last part is one of ``kinds``; those without a dot alone, where there are such.

    So ``jpg`` is the picture of a key that has ``jpg`` and ``seg.png``, and ``b.jpg`` of one that has nothing else.
    """
    found = [extension for extension in extensions if last_part(extension) in kinds]
    return [extension for extension in found if "." not in extension] or found
