"""Images of classes as folders: which there are, and what the classes are called."""

from __future__ import annotations

import itertools
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.evaluation.tasks.annotations import require
from pipeline.evaluation.tasks.pictures import ImageAddress
from sharding.captions import is_text
from sharding.errors import UserError
from sharding.names import hidden
from sharding.sources.base import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from pipeline.evaluation.tasks.classification.config import ClassificationTask
    from sharding.storage import Storage


@dataclass(frozen=True)
class Labelled:
    """An image and the number of its class."""

    image: ImageAddress
    label: int


@dataclass(frozen=True)
class Classes:
    """C classes in the order of their folders' names.

    Args:
        names: [C], as a prompt says them.
        images: of all classes; with a limit one of each class in turn.
    """

    names: list[str]
    images: list[Labelled]


def load_classes(storage: Storage, task: ClassificationTask) -> Classes:
    """The classes and their images.

    Raises:
        UserError: no folder, images outside of the classes' folders, a class without images, fewer than two
            classes, names that are missing, not text or the same.
    """
    root = storage.resolve(task.images)
    root.check(write=False)
    folders: dict[str, list[str]] = {}
    for path, _ in root.list():
        if hidden(path):
            continue
        folder, below, _ = path.partition("/")
        if not below:
            if _is_image(path):
                raise UserError(
                    f"images: {root.url_of(path)} is in no class: each class has a folder below {root.url}"
                )
            continue
        images = folders.setdefault(folder, [])
        if _is_image(path):
            images.append(path)
    empty = [folder for folder, images in folders.items() if not images] + _bare_folders(root, folders)
    if empty:
        raise UserError(f"images: the folder of class {sorted(empty)[0]!r} below {root.url} has no images")
    if len(folders) < 2:
        raise UserError(
            f"images: {root.url} has {len(folders)} folders with images: two classes are needed at least"
        )
    ordered = sorted(folders)
    labelled = [
        [Labelled(ImageAddress(task.images, path), label) for path in folders[folder]]
        for label, folder in enumerate(ordered)
    ]
    return Classes(_names(storage, task, ordered), _limited(labelled, task.limit))


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _bare_folders(root: Storage, known: dict[str, list[str]]) -> list[str]:
    """Folders without any file: a folder of this machine has them, an object store cannot."""
    local = root.local_path("")
    if local is None:
        return []
    with os.scandir(local) as scan:
        return [
            entry.name
            for entry in scan
            if entry.is_dir() and entry.name not in known and not hidden(f"{entry.name}/")
        ]


def _limited(classes: list[list[Labelled]], limit: int | None) -> list[Labelled]:
    if limit is None:
        return [one for images in classes for one in images]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*classes))
    return list(itertools.islice((one for one in in_turn if one is not None), limit))


def _names(storage: Storage, task: ClassificationTask, folders: Sequence[str]) -> list[str]:
    names = {folder: folder.replace("_", " ") for folder in folders}
    if task.class_names is not None:
        names = _given_names(storage, task.class_names)
    folder_of: dict[str, str] = {}
    for folder in folders:
        if folder not in names:
            raise UserError(f"class_names: {task.class_names} has no name for the folder {folder!r}")
        other = folder_of.setdefault(names[folder], folder)
        if other != folder:
            raise UserError(f"class_names: {other!r} and {folder!r} have the same name, {names[folder]!r}")
    return [names[folder] for folder in folders]


def _given_names(storage: Storage, address: str) -> dict[str, str]:
    place, file = require(storage, address, "class_names")
    try:
        known = place.read_json(file)
    except ValueError as error:
        raise UserError(f"class_names: {error}") from None
    if not isinstance(known, dict) or not all(is_text(name) and name for name in known.values()):
        raise UserError(
            f"class_names: {place.url_of(file)} must be an object with a name, which is text, for each folder"
        )
    return known
