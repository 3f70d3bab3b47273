"""The pre-trained weights a run begins with: files named in the job, imported before the first step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist
from torch import Tensor

from model import GLSCLForPreTraining, WeightImportError, plan_import
from pipeline.training.partitioned import is_partitioned, whole
from sharding.errors import UserError
from sharding.storage import Storage

logger = logging.getLogger(__name__)


def load_weights(
    model: GLSCLForPreTraining, sources: list[str], storage: Storage, scratch: Path, *, tell: bool
) -> None:
    """Import each of ``sources`` in turn, later ones over earlier ones.

    Into a partitioned model (ZeRO 3) worker 0 reads alone and hands over a parameter at a time: collective.

    Args:
        sources: addresses of files (``s3://``, ``file://``, a path) or, on this machine, of folders; relative
            ones lie in ``storage``.
        scratch: folder for the copies of remote files, of this process alone.
        tell: log what came from where.

    Raises:
        UserError: a source is missing, or does not fit the model; on every worker.
    """
    for source in sources:
        if is_partitioned(model):
            _hand_over(model, source, storage, scratch, tell=tell)
        else:
            _put(model, _read(model, source, storage, scratch, tell=tell))
    shutil.rmtree(scratch, ignore_errors=True)


def _read(
    model: GLSCLForPreTraining, source: str, storage: Storage, scratch: Path, *, tell: bool
) -> dict[str, Tensor]:
    """The value of each parameter that the file is for."""
    folder, name = _parent(source)
    place = storage.resolve(folder) if folder else storage
    local = place.local_path(name)
    try:
        if local is None:
            local = scratch / name
            place.download(name, local)
        plan = plan_import(model, local)
    except FileNotFoundError:
        raise UserError(f"model.weights: there is no {place.url_of(name)}") from None
    except WeightImportError as error:
        raise UserError(f"model.weights: {error}") from None
    if tell:
        logger.info("%s", plan.report)
    return plan.values


def _hand_over(
    model: GLSCLForPreTraining, source: str, storage: Storage, scratch: Path, *, tell: bool
) -> None:
    values: dict[str, Tensor] = {}
    told: list[object] = [None, ""]  # names of what is loaded, or the fault
    if dist.get_rank() == 0:
        try:
            values = _read(model, source, storage, scratch, tell=tell)
            told = [list(values), ""]
        except UserError as error:
            told = [None, str(error)]
    dist.broadcast_object_list(told, src=0)
    names, fault = told
    if not isinstance(names, list):
        raise UserError(str(fault))
    _put(model, {name: values.get(name) for name in names})


def _put(model: GLSCLForPreTraining, values: dict[str, Tensor] | dict[str, Tensor | None]) -> None:
    """Overwrite parameters; None: another worker has the value."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            with whole([parameters[name]]):
                if value is not None:
                    parameters[name].copy_(value)


def _parent(source: str) -> tuple[str, str]:
    folder, _, name = source.rstrip("/").rpartition("/")
    return folder, PurePosixPath(name).name
