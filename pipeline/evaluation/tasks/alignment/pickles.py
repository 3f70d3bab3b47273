"""Pickles of arrays and plain values, read as data: nothing in a file is ever called.

``pickle.load`` runs what a file tells it to run, and ALIGN-BENCH is published as pickles. So a small machine walks
through the opcodes and knows how to build numbers, texts, lists, tuples, dicts, sets and NumPy's arrays and scalars,
by itself. A file that names anything else is refused as a whole.

The machine is also bounded where an unpickler is not. An array is a view of bytes in the file, and must have as many
as its shape says; what was built once is held once, however often the file mentions it; the memo is a dict, so a
far-off number costs nothing; opcodes are counted, since one byte can make an object of two hundred. Keys of dicts and
members of sets are texts and numbers: hashing a deep nest of tuples would overflow the stack.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.errors import UserError

_MOST_OPCODES = 5_000_000
_MOST_DIMENSIONS, _LONGEST_DIMENSION = 8, 1 << 40

_PLAIN_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
#: What a file may name, by how NumPy and Python of any version call it.
_NAMES = {
    **{f"numpy.{core}.multiarray._reconstruct": "array" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": "array of a buffer" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": "scalar" for core in ("core", "_core")},
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "bytes",  # protocol 2 writes bytes as text
    **{f"{module}.{name}": name for module in ("builtins", "__builtin__") for name in ("set", "bytes")},
}
_DTYPE = re.compile(r"(b1|[iu][1248]|f[248])")


class _NotPlain(ValueError):
    """Something that has no place in a pickle of arrays and plain values."""


@dataclass(frozen=True)
class _Callable:
    """A name of the file, standing for one of the values of ``_NAMES``."""

    kind: str


@dataclass
class _DType:
    code: str
    order: str = "="

    def build(self, state: Any) -> None:
        """From ``(version, byte order, ...)``; the rest is of records, whose code is refused."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise _NotPlain(f"a dtype with the state {_short(state)}")
        self.order = state[1]

    def made(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """An array that is being built; ``values`` once it is."""

    values: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """From ``(version, shape, dtype, whether the first index runs fastest, bytes)``."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise _NotPlain(f"an array with the state {_short(state)}")
        _, shape, dtype, fortran, data = state
        self.values = _array_of(data, dtype, shape, "F" if fortran else "C")


def read_plain_pickle(data: bytes, url: str) -> Any:
    """What one pickle holds.

    Args:
        data: the whole file.
        url: for errors.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, set, read-only ``numpy.ndarray`` of numbers, and
        what holds them.

    Raises:
        UserError: it is no pickle, is cut short, or holds anything else; names the file and what it was.
    """
    try:
        value = _Machine().run(data)
        _check(value)
        return value
    except _NotPlain as error:
        raise UserError(
            f"{url} is refused: it holds {error}; a file of annotations holds NumPy's arrays of numbers and plain "
            "values only"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{url} is no pickle, or a damaged one: {error}") from None


class _Machine:
    """The stack of an unpickler, and what each opcode does to it."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._set_aside: list[list[Any]] = []
        self._memo: dict[Any, Any] = {}

    def run(self, data: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if number == _MOST_OPCODES:
                raise _NotPlain(f"more than {_MOST_OPCODES} opcodes")
            if name == "STOP":
                return self._stack.pop()
            if name in _PLAIN_VALUES:
                self._stack.append(argument)
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif not (
                self._constant(name)
                or self._container(name)
                or self._memory(name, argument)
                or self._called(name, argument)
            ):
                raise _NotPlain(f"the opcode {name}")
        raise ValueError("it does not end")

    def _constant(self, name: str) -> bool:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                self._stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self._stack.append(name == "NEWTRUE")
            case "MARK":
                self._set_aside.append(self._stack)
                self._stack = []
            case "POP":
                self._stack.pop()
            case "POP_MARK":
                self._since_mark()
            case _:
                return False
        return True

    def _container(self, name: str) -> bool:
        match name:
            case "LIST" | "TUPLE":
                items = self._since_mark()
                self._stack.append(items if name == "LIST" else tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(self._stack) < count:
                    raise ValueError("a tuple of more than there is")
                self._stack[-count:] = [tuple(self._stack[-count:])]
            case "DICT":
                items = self._since_mark()
                self._stack.append(_put({}, items))
            case "APPEND":
                item = self._stack.pop()
                self._top(list).append(item)
            case "APPENDS":
                items = self._since_mark()
                self._top(list).extend(items)
            case "ADDITEMS":
                items = self._since_mark()
                self._top(set).update(_key(item) for item in items)
            case "SETITEM":
                value, key = self._stack.pop(), self._stack.pop()
                _put(self._top(dict), [key, value])
            case "SETITEMS":
                items = self._since_mark()
                _put(self._top(dict), items)
            case _:
                return False
        return True

    def _memory(self, name: str, argument: Any) -> bool:
        match name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                known = self._memo[argument]
                # An array was noted before it was built.
                built = isinstance(known, _Array) and known.values is not None
                self._stack.append(known.values if built else known)
            case _:
                return False
        return True

    def _called(self, name: str, argument: Any) -> bool:
        match name:
            case "GLOBAL":
                self._stack.append(_named(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = self._stack.pop(), self._stack.pop()
                self._stack.append(_named(f"{module}.{attribute}"))
            case "REDUCE":
                arguments, callable_ = self._stack.pop(), self._stack.pop()
                self._stack.append(_result(callable_, arguments))
            case "BUILD":
                state, built = self._stack.pop(), self._stack[-1]
                if not isinstance(built, _DType | _Array):
                    raise _NotPlain(f"a state for {_short(built)}")
                built.build(state)
                if isinstance(built, _Array):
                    self._stack[-1] = built.values
            case _:
                return False
        return True

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._set_aside.pop()
        return items

    def _top(self, kind: type) -> Any:
        top = self._stack[-1]
        if type(top) is not kind:
            raise ValueError(f"items for {_short(top)}, which is no {kind.__name__}")
        return top


def _named(path: str) -> _Callable:
    if path not in _NAMES:
        raise _NotPlain(_short(path))
    return _Callable(_NAMES[path])


def _key(value: Any) -> str | int | float:
    if not isinstance(value, str | int | float):
        raise _NotPlain(f"{_short(value)} as the key of a dict or in a set")
    return value


def _put(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value
    return target


def _result(called: Any, arguments: Any) -> Any:
    """What calling would have given."""
    if not isinstance(called, _Callable) or not isinstance(arguments, tuple):
        raise _NotPlain(f"a call of {_short(called)}")
    match called.kind, arguments:
        case "array", (_Callable("ndarray"), _, _):
            return _Array()
        case "array of a buffer", (data, dtype, shape, order, *_):
            return _array_of(data, dtype, shape, order)
        case "dtype", (str(code), *_) if _DTYPE.fullmatch(code):
            return _DType(code)
        case "dtype", (code, *_):
            raise _NotPlain(f"an array of {_short(code)}")
        case "scalar", (dtype, data):
            return _array_of(data, dtype, (), "C").item()
        case "bytes", (str(text), "latin1"):
            return text.encode("latin-1")
        case "bytes", ():
            return b""
        case "set", ():
            return set()
        case "set", (list(items),):
            return {_key(item) for item in items}
    raise _NotPlain(f"a call of {called.kind} with {_short(arguments)}")


def _array_of(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A read-only view of ``data`` (of a byte array: of a copy)."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise _NotPlain(f"an array of {_short(data)}")
    if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        raise _NotPlain(f"an array of the shape {_short(shape)}")
    if not all(type(side) is int and 0 <= side < _LONGEST_DIMENSION for side in shape):
        raise _NotPlain("an array of a shape that is none")
    kind = dtype.made()
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of the shape {shape} in {len(data)} bytes")
    return np.frombuffer(bytes(data), dtype=kind).reshape(shape, order=order)


def _check(value: Any) -> None:
    """That no name and nothing half-built is left in it, each list and dict looked at once."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, _Callable | _DType | _Array):
            raise _NotPlain(f"{_short(one)} by itself")
        if isinstance(one, list | tuple | dict) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, dict) else one)


def _short(value: Any) -> str:
    if isinstance(value, _Callable):
        return value.kind
    text = value if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
