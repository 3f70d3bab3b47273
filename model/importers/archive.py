"""Tensors out of torch's zip archives (``torch.save`` and TorchScript) without unpickling.

The pickle inside is read as data: a small machine walks its opcodes and builds plain containers, tensor
descriptions, and an inert :class:`Thing` in place of every other object. Nothing that the file names is
imported or called, so that hyper-parameters, callbacks and script classes next to the weights do no harm and
need not be installed.
"""

from __future__ import annotations

import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from model.importers.errors import WeightImportError

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
#: What ``zipfile`` raises over damaged bytes: offsets out of the file, unknown methods, sizes that are not there.
DAMAGED_ZIP = (
    *(BadZipFile, OSError, RuntimeError, EOFError, ValueError, KeyError, OverflowError),
    *(zlib.error, struct.error),
)
#: Opcodes that push their own argument.
_PLAIN_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)


class _Name(NamedTuple):
    """A class or function that the file names; never looked up."""

    path: str


class _Storage(NamedTuple):
    """Bytes of the archive that tensors look into."""

    key: str
    dtype: torch.dtype
    numel: int


class StoredTensor(NamedTuple):
    """Where a tensor lies in the archive."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Thing:
    """An object of a class that is neither container nor tensor: its class's name and its attributes."""

    path: str
    attributes: dict[str, Any] = field(default_factory=dict)


class TorchArchive:
    """The archive in ``opened``: ``content`` is what was saved, with :class:`StoredTensor` for tensors.

    Raises:
        WeightImportError: no torch archive, or one that is damaged.
    """

    def __init__(self, opened: ZipFile, path: Path) -> None:
        self._zip, self._path = opened, path
        self._read: dict[str, Tensor] = {}
        names = opened.namelist()
        roots = [n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(roots) != 1:
            raise WeightImportError(f"{path} is a zip archive, but none that torch wrote")
        self._root = roots[0]
        #: Saved by ``torch.jit.save``: ``content`` is the root module, a :class:`Thing`.
        self.is_script = f"{self._root}constants.pkl" in names
        order = f"{self._root}byteorder"
        if order in names and self._bytes(order) != b"little":
            raise WeightImportError(f"{path} was written on a big-endian machine: save it on another")
        try:
            self.content = _read_pickle(self._bytes(f"{self._root}data.pkl"))
        # Whatever a malformed stream of opcodes trips over in the machine below.
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightImportError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def _bytes(self, name: str) -> bytes:
        try:
            # So that what is read is never larger than the file, whatever the file says.
            stored = self._zip.getinfo(name).compress_type == ZIP_STORED
            data = self._zip.read(name) if stored else b""
        except DAMAGED_ZIP as error:
            raise WeightImportError(f"{self._path} is damaged at {name}: {error}") from error
        if not stored:
            raise WeightImportError(f"{self._path}: {name} is compressed, as torch never leaves it")
        return data

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor's values, from the archive's bytes.

        Raises:
            WeightImportError: the bytes are not there, or not as many as said.
        """
        storage = stored.storage
        name = f"{self._root}data/{storage.key}"
        if name not in self._read:
            data = bytearray(self._bytes(name))
            if len(data) != storage.numel * storage.dtype.itemsize:
                raise WeightImportError(f"{self._path} is damaged at {name}: {len(data)} bytes")
            self._read[name] = torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0)
        values = self._read[name].to(storage.dtype)
        try:
            return torch.as_strided(values, stored.size, stored.stride, stored.offset)
        except (RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise WeightImportError(f"{self._path} is damaged at {name}: {reason}") from error


def script_tensors(module: Thing, ancestors: tuple[Thing, ...] = ()) -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and buffers of a TorchScript module, named as its ``state_dict`` would name them."""
    for name, value in module.attributes.items():
        if isinstance(value, StoredTensor):
            yield name, value
        elif isinstance(value, Thing) and value not in (*ancestors, module):
            for below, tensor in script_tensors(value, (*ancestors, module)):
                yield f"{name}.{below}", tensor


def _read_pickle(data: bytes) -> Any:
    """Walk the opcodes of one pickle; see the module's docstring for what comes out."""
    stack: list[Any] = []
    set_aside: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, set_aside.pop()
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _PLAIN_VALUES:
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE" as name:
                stack.append(name == "NEWTRUE")
            case "MARK":
                set_aside.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Thing("builtins.set"))
            case "DICT":
                items = since_mark()
                stack.append(dict(zip(items[::2], items[1::2], strict=True)))
            case "LIST":
                items = since_mark()
                stack.append(items)
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "FROZENSET":
                since_mark()
                stack.append(Thing("builtins.frozenset"))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS":
                items = since_mark()
                _extend(stack[-1], items)
            case "ADDITEMS":
                since_mark()
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _update(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[_number(argument)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[_number(argument)])
            case "GLOBAL":
                stack.append(_Name(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, callable_ = stack.pop(), stack.pop()
                stack.append(_result(callable_, arguments))
            case "NEWOBJ_EX":
                stack.pop()
                stack.pop()
                stack.append(_result(stack.pop(), None))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Thing) and isinstance(state, dict):
                    stack[-1].attributes.update(state)
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"opcode {name} has no place in weights")
    raise ValueError("the pickle does not end")


def _number(argument: object) -> int:
    return int(str(argument))


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _update(target: object, items: list[Any]) -> None:
    if isinstance(target, dict):
        target.update(zip(items[::2], items[1::2], strict=True))


def _result(called: object, arguments: Any) -> Any:
    """What calling would have given, where that is a tensor or a dict; an inert thing for all else."""
    path = called.path if isinstance(called, _Name) else type(called).__name__
    if path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        return StoredTensor(storage, offset, tuple(size), tuple(stride))
    if path in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if path == "collections.OrderedDict" and arguments == ():
        return {}
    return Thing(path)


def _storage(identity: Any) -> _Storage | Thing:
    kind, storage_type, key, _, count = identity
    name = storage_type.path.rpartition(".")[2] if isinstance(storage_type, _Name) else ""
    if kind != "storage" or not isinstance(key, str) or not isinstance(count, int):
        raise ValueError("a persistent object that is no storage")
    if name not in _DTYPES:
        return Thing(storage_type.path)
    return _Storage(key, _DTYPES[name], count)
