"""Weight files, read without running anything they contain.

Read are safetensors (one file, or shards with an index), torch's zip archives (``torch.save``, Lightning's
``.ckpt``, TorchScript), torch's older format through ``torch.load(weights_only=True)``, and folders in
transformers' layout.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.importers.archive import DAMAGED_ZIP, StoredTensor, Thing, TorchArchive, script_tensors
from model.importers.errors import WeightImportError

_IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
#: Where training scripts keep the weights among other things.
_SECTIONS = ("state_dict", "model")
#: First bytes of torch's format before 1.6.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: What torch's unpickler of the old format trips over in damaged bytes, beside its own ``UnpicklingError``.
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, OverflowError, ImportError, struct.error),
)
_CONVERT = "load it where you trust it and save its state_dict() with safetensors.torch.save_file"


class Weights(NamedTuple):
    """``tensors`` by name, and ``others``: what stood among them and is no tensor, with what it is."""

    tensors: dict[str, Tensor]
    others: dict[str, str]


def read_weights(path: Path) -> Weights:
    """Read the file or folder ``path``.

    Of a file that holds more than weights only ``state_dict`` (or ``model``) is read.

    Raises:
        WeightImportError: nothing there, damaged, or in a format that cannot be read without running code.
    """
    if path.is_dir():
        found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise WeightImportError(f"the folder {path} has none of {', '.join(_IN_FOLDERS)}")
        path = found[0]
    if not path.is_file():
        raise WeightImportError(f"there is no file {path}")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return Weights(_read_safetensors(path), {})
    if is_zipfile(path):
        return _read_archive(path)
    with path.open("rb") as file:
        start = file.read(len(_OLD_TORCH))
    if start != _OLD_TORCH:
        raise WeightImportError(f"{path} is neither a safetensors file nor one that torch wrote")
    return _read_old_torch(path)


def weights_among(content: object, where: str) -> Weights:
    """The weights of a loaded object: a mapping of names to tensors, or one that has such a section.

    Raises:
        WeightImportError: there is no such mapping, or it has no tensor.
    """
    return _among(content, where, lambda value: value if isinstance(value, Tensor) else None)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightImportError(f"{path} is damaged: {error}") from error


def _read_shards(index: Path) -> Weights:
    try:
        table: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightImportError(f"{index} is no index of shards: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise WeightImportError(f"{index} names the shard {shard!r}: only safetensors beside it are read")
        if not (index.parent / shard).is_file():
            raise WeightImportError(f"{index} names the shard {shard}, which is not beside it")
        tensors |= _read_safetensors(index.parent / shard)
    lost = sorted(set(table) - set(tensors))
    if lost:
        raise WeightImportError(f"{index} names tensors that its shards do not have", missing=lost)
    return Weights(tensors, {})


def _read_archive(path: Path) -> Weights:
    try:
        opened = ZipFile(path)
    except DAMAGED_ZIP as error:
        raise WeightImportError(f"{path} is damaged: {error}") from error
    with opened:
        archive = TorchArchive(opened, path)
        content = archive.content
        if isinstance(content, Thing):
            if not archive.is_script:
                raise WeightImportError(
                    f"{path} holds an object of {content.path}, not its weights: {_CONVERT}"
                )
            content = dict(script_tensors(content))

        def tensor(value: object) -> Tensor | None:
            return archive.tensor(value) if isinstance(value, StoredTensor) else None

        return _among(content, str(path), tensor)


def _read_old_torch(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise WeightImportError(
            f"{path} is damaged or holds more than weights ({reason}): {_CONVERT}"
        ) from error
    return weights_among(content, str(path))


def _among(content: object, where: str, tensor: Callable[[Any], Tensor | None]) -> Weights:
    if isinstance(content, Mapping):
        content = next(
            (content[name] for name in _SECTIONS if isinstance(content.get(name), Mapping)), content
        )
    if not isinstance(content, Mapping):
        raise WeightImportError(
            f"{where} holds {_described(content)} where a mapping of names to tensors is due"
        )
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    for name, value in content.items():
        loaded = tensor(value)
        if loaded is None:
            others[str(name)] = _described(value)
        else:
            tensors[str(name)] = loaded
    if not tensors:
        raise WeightImportError(f"{where} has no tensor among {', '.join(others) or 'nothing'}")
    return Weights(tensors, others)


def _described(value: object) -> str:
    return value.path if isinstance(value, Thing) else type(value).__name__
