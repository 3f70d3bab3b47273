"""Pickles of arrays are read as NumPy wrote them, and nothing in a pickle is ever called."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluation.tasks.alignment.pickles import read_plain_pickle
from sharding.errors import UserError

RANDOM = np.random.default_rng(0)
MASK = RANDOM.random((5, 7)) > 0.5
PLAIN: dict[str, Any] = {
    "caption": "a fox 猫",
    "annotation": {"fox": [{"bbox_mask": (1, 2.5, -3, 4), "pixel_mask": MASK}]},
    "numbers": [0, -1, 2**80, 1.5e-300, True, None, float("inf")],
    "bytes": b"\x80\x00",
    "empty": [{}, [], (), set(), "", b""],
    "set": {1, "a"},
    "tuples": (1, (2, (3,)), (1, 2, 3, 4)),
    "box": np.array([1.5, 2, 3, 4]),
    "turned": MASK.T,
    "fortran": np.asfortranarray(MASK),
    "every other": MASK[::2, ::3],
    "other bytes first": np.arange(5, dtype=">i4"),
    "no rows": np.zeros((0, 3), np.uint8),
    "no dimension": np.array(3.0),
    "half": np.float16([1.5, 2]),
    "scalar": np.float32(2.5),
    "integer": np.int64(-7),
    "flag": np.bool_(True),
}
PLAIN["again"] = PLAIN["annotation"]
PLAIN["masks"] = [MASK, MASK]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, np.generic):
        return bool(one == other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_arrays_come_back_as_they_were(protocol: int) -> None:
    found = read_plain_pickle(pickle.dumps(PLAIN, protocol), "a.pkl")
    for key, value in PLAIN.items():
        assert same(value, found[key]), key
    assert found["again"] is found["annotation"]
    assert found["masks"][0] is found["masks"][1]
    assert not found["masks"][0].flags.writeable


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


class Custom:
    """Pickles as an object of a class with a state."""

    def __init__(self) -> None:
        self.state = 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "touch {}"), "system"),
        (Calls(builtins.eval, "open('{}', 'w')"), "builtin"),
        (Calls(builtins.exec, "open('{}', 'w')"), "builtin"),
        (Calls(builtins.getattr, "x", "upper"), "getattr"),
        (Calls(np.load, "{}", "r", True), "numpy"),
        (Calls(Path, "/etc"), "pathlib.Path"),
        (Custom(), ""),
        (OrderedDict(a=1), "collections.OrderedDict"),
        (defaultdict(int), "collections.defaultdict"),
        (os.system, "system"),
        (np.array([Custom()]), ""),
        (np.array(["text"]), "an array of U4"),
        (np.array([None, 1]), "an array of O8"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), "an array of V8"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "an array of M8"),
        (np.array([1j]), "an array of c16"),
        (torch.ones(2), "torch._utils._rebuild_tensor_v2"),
        ({(1, 2): 3}, "tuple as the key of a dict"),
        (2j, ".complex"),
        (range(3), "range"),
    ],
    ids=[
        *("os.system", "eval", "exec", "getattr", "numpy.load", "path", "object", "ordered", "defaultdict"),
        *("function", "objects", "texts", "anything", "records", "dates", "complex numbers", "tensor"),
        *("tuple as key", "complex", "range"),
    ],
)
def test_anything_else_is_refused_and_never_called(
    tmp_path: Path, value: Any, name: str, protocol: int
) -> None:
    marker = tmp_path / "called"
    if isinstance(value, Calls):
        function, arguments = value._call
        value = Calls(function, *(str(one).format(marker) for one in arguments))
    data = pickle.dumps({"caption": "x", "annotation": [value]}, protocol)
    with pytest.raises(UserError) as caught:
        read_plain_pickle(data, "s3://b/0.pkl")
    assert str(caught.value).startswith("s3://b/0.pkl is refused: it holds ")
    if protocol > 1:  # the older ones say "copy_reg._reconstructor" of objects
        assert name in str(caught.value)
    assert not marker.exists()


def test_the_markers_of_the_test_before_would_have_been_written(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'called'}")))  # noqa: S301 - our own
    assert (tmp_path / "called").exists()


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _call(name: str, *arguments: bytes) -> bytes:
    module, _, attribute = name.rpartition(".")
    return _text(module) + _text(attribute) + b"\x93(" + b"".join(arguments) + b"tR"


def _long(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _begun(core: str) -> bytes:
    ndarray = _text("numpy") + _text("ndarray") + b"\x93"
    return _call(f"numpy.{core}.multiarray._reconstruct", ndarray, b"K\x00\x85", b"C\x01b")


_ARRAY = _begun("core")
_DTYPE = _call("numpy.dtype", _text("u1"), b"\x89", b"\x88")
_DTYPE += b"(K\x03" + _text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"


def _array(shape: bytes, data: bytes, core: str = "core") -> bytes:
    return (
        b"\x80\x04"
        + _begun(core)
        + b"(K\x01"
        + shape
        + _DTYPE
        + b"\x89C"
        + bytes([len(data)])
        + data
        + b"tb."
    )


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_older_and_newer_numpys_are_read(core: str) -> None:
    found = read_plain_pickle(_array(b"K\x02K\x03\x86", b"abcdef", core), "a.pkl")
    assert found.tolist() == [[97, 98, 99], [100, 101, 102]]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        # Arrays of sizes that their bytes do not have.
        (_array(b"K\x02K\x04\x86", b"abcdef"), "an array of the shape (2, 4) in 6 bytes"),
        (_array(_long(2**39) + b"\x85", b"a"), "in 1 bytes"),
        (_array(_long(2**70) + _long(2**70) + b"\x86", b"a"), "an array of a shape that is none"),
        (_array(_long(-1) + b"\x85", b"a"), "an array of a shape that is none"),
        (_array(b"(" + b"K\x01" * 9 + b"t", b"a"), "an array of the shape tuple"),
        (_array(b"K\x01", b"a"), "an array of the shape int"),
        # A memo at a number that an unpickler would make room for: 16 GiB for the second.
        (b"\x80\x04Nr\xff\xff\xff\x7f0j\xfe\xff\xff\x7f.", "is no pickle, or a damaged one"),
        # A call of what a call gave, a name without a call, an array without content.
        (b"\x80\x04" + _call("builtins.set") + b")R.", "a call of set"),
        (b"\x80\x04" + _text("numpy") + _text("ndarray") + b"\x93.", "ndarray by itself"),
        (b"\x80\x04]" + _text("builtins") + _text("set") + b"\x93a.", "set by itself"),
        (b"\x80\x04" + _ARRAY + b".", "_Array by itself"),
        (b"\x80\x04]}b.", "a state for list"),
        # Objects by other opcodes than those of arrays.
        (b"(S'x'\nios\nsystem\n.", "the opcode STRING"),
        (b"(ios\nsystem\n.", "the opcode INST"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"\x80\x02cbuiltins\nset\n)\x81.", "the opcode NEWOBJ"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"\x80\x04" + _text("x") + b"Q.", "the opcode BINPERSID"),
        (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
        # No pickles.
        (b"", "is no pickle, or a damaged one"),
        (b"\x89PNG\r\n\x1a\n", "a.pkl is"),
        (pickle.dumps(PLAIN)[:-40], "is no pickle, or a damaged one"),
        (b"\x80\x04\x85.", "a tuple of more than there is"),
        (b"\x80\x04.", "is no pickle, or a damaged one"),
        (b"\x80\x04N" + b"u.", "is no pickle, or a damaged one"),
        (b"\x80\x04N(NNu.", "items for NoneType, which is no dict"),
        (b"\x80\x04}(Nu.", "is no pickle, or a damaged one"),
        (b"\x80\x04h\x07.", "is no pickle, or a damaged one"),
    ],
)
def test_what_is_no_plain_pickle_is_named(data: bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_plain_pickle(data, "a.pkl")
    assert str(caught.value).startswith("a.pkl is ")
    assert said in str(caught.value)


def test_a_nest_of_tuples_neither_hashes_nor_recurses() -> None:
    deep = b"\x80\x04)" + b"\x85" * 100_000
    assert read_plain_pickle(deep + b".", "a.pkl") is not None
    with pytest.raises(UserError, match="tuple as the key of a dict"):
        read_plain_pickle(b"\x80\x04}" + deep[2:] + b"Ns.", "a.pkl")
    with pytest.raises(UserError, match="tuple as the key of a dict or in a set"):
        read_plain_pickle(b"\x80\x04\x8f(" + deep[2:] + b"\x90.", "a.pkl")


def test_lists_of_the_same_list_are_looked_at_once() -> None:
    # Forty times a list of two of the one before: 2**40 items to whoever walks through it.
    doubled = b"\x80\x04]\x940" + b"".join(
        b"](h" + bytes([level]) + b"h" + bytes([level]) + b"e\x940" for level in range(40)
    )
    found = read_plain_pickle(doubled + b"h\x28.", "a.pkl")
    assert found[0] is found[1]
    itself = read_plain_pickle(b"\x80\x04]\x94h\x00a.", "a.pkl")
    assert itself[0] is itself


def test_memory_stays_near_the_size_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.tasks.alignment.pickles._MOST_OPCODES", 20_000)
    many = b"\x80\x04](" + b"\x8f" * 1_000_000 + b"e."  # sets, of 216 bytes each
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 20000 opcodes"):
        read_plain_pickle(many, "a.pkl")
    one = np.zeros(1_000_000, np.uint8)
    read_plain_pickle(pickle.dumps([one] * 1000), "a.pkl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_length_beyond_the_end_is_no_reason_to_make_room() -> None:
    for opcode, length in (
        (b"B", struct.pack("<I", 2**32 - 1)),
        (b"\x8e", struct.pack("<Q", 2**62)),
        (b"\x96", struct.pack("<Q", 2**62)),
        (b"\x8b", struct.pack("<i", 2**31 - 1)),
        (b"X", struct.pack("<I", 2**32 - 1)),
    ):
        tracemalloc.start()
        with pytest.raises(UserError, match="is no pickle, or a damaged one"):
            read_plain_pickle(b"\x80\x04" + opcode + length + b"abc.", "a.pkl")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000
