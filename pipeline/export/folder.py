"""``glscl export``: a checkpoint as a folder that ``from_pretrained`` opens, with a model card."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipeline.export.card import model_card
from pipeline.export.facts import gather
from pipeline.export.source import find_fine_tuning, find_run, processor_of
from sharding.errors import StorageFault, UserError

CARD = "README.md"


def export(
    address: str,
    folder: Path,
    console: Console,
    *,
    best: str | None = None,
    task: str | None = None,
    license_: str | None = None,
) -> None:
    """Write weights, configuration, processor and model card of a checkpoint to ``folder``.

    The folder appears when it is complete: everything is written beside it, under a hidden name, and renamed.

    Args:
        address, best: see :func:`pipeline.export.source.find_run`.
        folder: must not exist, or be empty.
        task: take the model that the checkpoint was fine-tuned to for this task.
        license_: an identifier of the hub for the card, e.g. ``apache-2.0``.

    Raises:
        UserError: no such checkpoint or fine-tuning, one whose files are not those that were committed, or a
            ``folder`` that holds something or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_occupied(folder)
    source = find_run(address, best)
    with _beside(folder) as work:
        if task is None:
            checkpoint, weights = source.fetch(work)
            place, fine_tuned = source.run.url_of(checkpoint.path), None
        else:
            tuning = find_fine_tuning(source, task)
            checkpoint, weights = tuning.checkpoint, tuning.fetch(work)
            place, fine_tuned = tuning.place.url, tuning.record
        processor_of(source, weights).save_pretrained(weights)
        card = model_card(gather(source, checkpoint, weights, license_, fine_tuned))
        (weights / CARD).write_text(card, encoding="utf-8")
        _refuse_occupied(folder)
        os.replace(weights, folder)
    console.print(
        f"{place} -> {folder} (step {checkpoint.step}, weights verified)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _refuse_occupied(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is no folder: give a new name, or an empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new name, or an empty folder")


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A hidden folder on the file system of ``folder``, removed in the end."""
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield work
    except StorageFault:
        raise
    except OSError as error:  # disk full, or somebody wrote into the folder meanwhile
        raise UserError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
