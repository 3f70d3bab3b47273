"""``glscl scenes``: writes evaluation sets made of scenes, and a record of them last.

::

    scenes-started.json    what is being made: a second run goes on only with the same
    retrieval/ video/ vqa/ nlvr2/ classification/ alignment/
    scenes.json            what was made, how many files, their digest: written last, so what has it is whole
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.progress import show_progress
from pipeline.scenes.request import TASKS, Request
from sharding.errors import UserError
from sharding.scenes.config import SceneRules, Split
from sharding.storage import Storage, StorageConfig, normalise_url, open_storage

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.progress import Task as Shown

RECORD = "scenes.json"
_STARTED = "scenes-started.json"
_FORMAT = {"format": "glscl-scenes", "version": 1}
BUNDLED = Path(__file__).parents[1] / "demo" / "corpus" / "objects.jsonl"
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


def splits_of(texts: list[str], count: int) -> dict[Split, int]:
    """``["train=1000", "test"]`` -> 1000 of train and ``count`` of test, in the order train, val, test."""
    found: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in _SPLITS:
            raise UserError(f"--split {text}: is none of {', '.join(_SPLITS)}")
        if number and not number.isdecimal():
            raise UserError(f"--split {text}: {number!r} is no count")
        if name in found:
            raise UserError(f"--split {name} is given twice")
        found[name] = int(number) if number else count
        if found[name] < 1:
            raise UserError(f"--split {text}: the count must be at least 1, not {found[name]}")
    return {split: found[split] for split in _SPLITS if split in found}


def scenes(
    out: str,
    console: Console,
    objects: str | None,
    splits: list[str] | None,
    count: int,
    tasks: list[str] | None,
    seed: int,
    rules: list[str] | None,
    dissent: float,
    endpoint_url: str | None,
) -> None:
    """The verb, as the command line gives its options.

    Raises:
        UserError: an option that is wrong, or as ``write_scenes``.
    """
    storage = open_storage(StorageConfig(url=normalise_url(out), endpoint_url=endpoint_url))
    given = dict(rule.partition("=")[::2] for rule in rules or ())
    if "split" in given:
        raise UserError("--rule split: use --split")
    try:
        request = Request.model_validate(
            {
                "objects": normalise_url(objects or str(BUNDLED)),
                "splits": splits_of(splits or list(_SPLITS), count),
                "tasks": tuple(task for task in TASKS if tasks is None or task in tasks),
                "rules": {**given, "seed": seed},
                "dissent": dissent,
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{place}: {problem['msg']}") from None
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise UserError(f"--task {unknown[0]}: is none of {', '.join(TASKS)}")
    write_scenes(storage, request, console)


def write_scenes(storage: Storage, request: Request, console: Console) -> dict[str, Any]:
    """Make the sets, or find them made. Returns the record.

    Raises:
        UserError: no objects, too few of them, or another thing in the folder.
    """
    from pipeline.scenes.sets import Part, writer_of
    from pipeline.scenes.sink import Sink
    from sharding.scenes.generator import Scenes, largest_side
    from sharding.scenes.objects import open_objects

    objects = open_objects(request.objects, storage, largest_side(request.rules))
    parts = [
        Part(split, Scenes(_rules(request.rules, split), objects), count)
        for split, count in request.splits.items()
    ]
    # The same objects give the same scenes, wherever they lie.
    wanted = request.model_dump(mode="json", exclude={"objects": True, "rules": {"split"}})
    wanted = {**_FORMAT, "request": wanted, "objects": objects.digest}
    record = _record(storage, wanted)
    if record is not None:
        console.print(f"{storage.url} holds these scenes already: {record['files']} files", highlight=False)
        return record
    _begin(storage, wanted)
    started = time.monotonic()
    with Sink(storage) as sink:
        for task in request.tasks:
            total = sum(request.splits.values())
            with show_progress(console, task, total) as shown:
                writer_of(task)(parts, sink, request, _Steps(shown))
    record = {**wanted, "files": sink.files, "bytes": sink.bytes, "digest": sink.digest}
    storage.write_json(RECORD, record)
    storage.delete(_STARTED)
    seconds = time.monotonic() - started
    console.print(
        f"{storage.url}: {sink.files} files, {sink.bytes / 1e6:.1f} MB in {seconds:.1f} s", highlight=False
    )
    return record


class _Steps:
    """Shows how far one task's set is; called after each image, video or statement."""

    def __init__(self, shown: Shown) -> None:
        self._shown, self._done, self._began = shown, 0, time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        self._shown.update(self._done, f"{rate:.1f} per second")


def _rules(rules: SceneRules, split: Split) -> SceneRules:
    return SceneRules.model_validate(rules.model_dump() | {"split": split})


def _record(storage: Storage, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the same request, or None where there is none."""
    if not storage.exists(RECORD):
        return None
    record = storage.read_json(RECORD)
    if not isinstance(record, dict) or any(record.get(key) != value for key, value in wanted.items()):
        raise UserError(f"{storage.url_of(RECORD)} is of other scenes: write these to another folder")
    return record


def _begin(storage: Storage, wanted: dict[str, Any]) -> None:
    """Leave word of what is being made; files that something else left would count as part of it."""
    storage.check(write=True)
    if storage.exists(_STARTED):
        if storage.read_json(_STARTED) != wanted:
            raise UserError(
                f"{storage.url} holds part of other scenes ({_STARTED}): finish those, or remove the folder"
            )
        return
    for task in TASKS:
        found = next(iter(storage.list(task)), None)
        if found is not None:
            raise UserError(
                f"{storage.url_of(found.path)} is in the way: write the scenes to an empty folder"
            )
    storage.write_json(_STARTED, wanted)
