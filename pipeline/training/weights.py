"""The pre-trained weights a run begins with: files named in the job, imported before the first step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path, PurePosixPath

from model import GLSCLForPreTraining, WeightImportError, import_weights
from sharding.errors import UserError
from sharding.storage import Storage

logger = logging.getLogger(__name__)


def load_weights(
    model: GLSCLForPreTraining, sources: list[str], storage: Storage, scratch: Path, *, tell: bool
) -> None:
    """Import each of ``sources`` in turn, later ones over earlier ones.

    Args:
        sources: addresses of files (``s3://``, ``file://``, a path) or, on this machine, of folders; relative
            ones lie in ``storage``.
        scratch: folder for the copies of remote files, of this process alone.
        tell: log what came from where.

    Raises:
        UserError: a source is missing, or does not fit the model.
    """
    for source in sources:
        folder, name = _parent(source)
        place = storage.resolve(folder) if folder else storage
        local = place.local_path(name)
        try:
            if local is None:
                local = scratch / name
                place.download(name, local)
            report = import_weights(model, local)
        except FileNotFoundError:
            raise UserError(f"model.weights: there is no {place.url_of(name)}") from None
        except WeightImportError as error:
            raise UserError(f"model.weights: {error}") from None
        if tell:
            logger.info("%s", report)
    shutil.rmtree(scratch, ignore_errors=True)


def _parent(source: str) -> tuple[str, str]:
    folder, _, name = source.rstrip("/").rpartition("/")
    return folder, PurePosixPath(name).name
