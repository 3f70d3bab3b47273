"""YAML as a job's file and ``--set`` use it: plain data by YAML 1.2's core schema, bounded, each key once.

PyYAML by itself follows YAML 1.1, where ``1e-05`` and ``5e8`` are text, ``no`` is false, ``010`` is 8, ``12:30:45`` is
45045 and ``2024-01-01`` a date, and where the last of two equal keys wins without a word. Here

* plain scalars have the types of the core schema (https://yaml.org/spec/1.2.2/#103-core-schema): null, ``true`` and
  ``false``, whole numbers (decimal, ``0o17``, ``0x1f``), numbers with ``.`` or an exponent, else text
* a key is the text that stands there, whatever it looks like; a key that stands twice in a mapping is a fault
* merge keys (``<<``) stay; tags, recursive anchors, NUL and halves of surrogate pairs are refused
* size, depth, and what aliases expand to are limited: the time of reading is linear in the size of the file

PyYAML scans, parses and composes; its constructors, which make objects, are not used. No message quotes a value: it
may be a password.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from sharding.errors import UserError

#: Bytes of a file; PyYAML reads about 300 KB in a second.
LARGEST_FILE = 2**20
#: Values of a file, each as often as aliases name it.
_MOST_VALUES = 100_000
_DEEPEST = 50
_PIPE_PATIENCE_S = 30.0
#: Whole numbers beyond are none that a seed, a count of steps or a size in bytes can be.
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1

_STANDARD = "tag:yaml.org,2002:"
_MERGE = f"{_STANDARD}merge"
_BOMS = (  # the longer first: that of UTF-16 begins as that of UTF-32 does
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class _Resolver(BaseResolver):
    """Types of plain scalars by the core schema, and the merge key of YAML 1.1."""


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", "<<", "<"),
):
    _Resolver.add_implicit_resolver(
        _STANDARD + _tag, re.compile(rf"(?:{_pattern})\Z"), list(_first.replace("\0", ""))
    )
_Resolver.add_implicit_resolver(f"{_STANDARD}null", re.compile(r"\Z"), [""])


class _Nodes(Reader, Scanner, Parser, Composer, _Resolver):
    """PyYAML's own way from text to nodes, not deeper than is read."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            _refuse(self.peek_event().start_mark, f"is nested more than {_DEEPEST} deep")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Fault(Exception):
    """What is wrong, one line for each place."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines)
        self.lines = lines


def read_yaml(path: str | Path) -> Any:
    """The plain data of a YAML file, or of a pipe that one is written to.

    Raises:
        UserError: one line for each fault, naming the file and the line.
    """
    return parse_content(read_content(path), path)


def parse_content(content: bytes, path: str | Path) -> Any:
    """The plain data of what ``read_content`` gave; raises as ``read_yaml``."""
    return parse_yaml(_decoded(content, Path(path)), str(path))


def parse_yaml(text: str, origin: str, place: str = "") -> Any:
    """The plain data of a YAML document: dicts with text as keys, lists, text, numbers, booleans, None.

    Args:
        text: one document.
        origin: what it is, for messages.
        place: dotted, of the document in the job; empty: it is the job.

    Raises:
        UserError: one line for each fault.
    """
    try:
        node = _composed(text)
        return None if node is None else _Plain(node, place, one_line="\n" not in text).value
    except _Fault as fault:
        raise UserError("\n".join(f"{origin}: {line}" for line in fault.lines)) from None


def read_content(path: str | Path) -> bytes:
    """The bytes of a job's file, or of a pipe, which gives them once.

    Raises:
        UserError: it cannot be read, or is larger than a job's file.
    """
    source = Path(path)
    try:
        with open(os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            content = b""
            while len(content) <= LARGEST_FILE and (part := _part(file.fileno(), source)):
                content += part
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such job file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{source}: cannot be read: {reason}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{source}: is larger than {LARGEST_FILE >> 10} KiB, which no job's file is")
    return content


def _part(descriptor: int, source: Path) -> bytes:
    """What comes next of a file, or of a pipe whose writer may be slow; nothing at the end."""
    deadline = time.monotonic() + _PIPE_PATIENCE_S
    while time.monotonic() < deadline:
        select.select([descriptor], [], [], _PIPE_PATIENCE_S)
        try:
            return os.read(descriptor, 1 << 16)
        except BlockingIOError:
            continue
    raise UserError(f"{source}: is a pipe, and nobody wrote to it for {_PIPE_PATIENCE_S:g} s")


def _decoded(content: bytes, source: Path) -> str:
    encoding = next((name for mark, name in _BOMS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"line {line}" if encoding == "utf-8" else f"byte {error.start}"
        raise UserError(f"{source}: {where}: is not {encoding.upper()}: save the file as UTF-8") from None


def _composed(text: str) -> Node | None:
    """The document's nodes; None: there is no document."""
    nodes = None
    try:
        nodes = _Nodes(text)
        node: Node | None = nodes.get_single_node()
        return node
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"#x{error.character:04x}"
        raise _Fault([f"line {line}: holds the character {character}, which YAML does not allow"]) from None
    except yaml.MarkedYAMLError as error:
        _refuse(error.problem_mark or error.context_mark, f"is not YAML: {_problem(error)}")
    except (ValueError, OverflowError):  # of numbers in escapes ("\UFFFFFFFF") and directives (%YAML)
        _refuse(None if nodes is None else nodes.get_mark(), "is not YAML: a number in it is out of range")


def _problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words without what it quotes of the file, but for single characters."""
    problem = error.problem or error.context or "it cannot be read"
    if problem.startswith("found undefined alias"):
        return "an alias (*...) without its anchor; text that begins with * needs quotes"
    if problem.startswith("but found another document"):
        return "there is a second document (---): a job is one"
    if problem.startswith("found duplicate anchor"):
        return "an anchor (&...) stands twice"
    if problem.startswith("found undefined tag handle") or "tag" in problem:
        return "a tag (!...) that is not known; text that begins with ! needs quotes"
    if "'\\t'" in problem:
        return "a tab where spaces belong"
    words = f"{error.context}, {problem}" if error.context else problem
    return re.sub(r"'[^']{3,}'", "...", " ".join(words.split()))


def _refuse(mark: Any, message: str) -> NoReturn:
    raise _Fault([f"line {mark.line + 1}: {message}" if mark is not None else message])


class _Plain:
    """Plain data of nodes, after all that could be wrong with them was looked for.

    Attributes:
        value: of the document.
    """

    def __init__(self, root: Node, place: str, *, one_line: bool) -> None:
        self._one_line = one_line
        self._faults: list[str] = []
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()
        self._check(root, place)
        if self._faults:
            raise _Fault(self._faults)
        self.value = self._value(root)

    def _check(self, node: Node, place: str) -> int:
        """How many values the node stands for, aliases followed; notes its faults, once."""
        if (known := self._sizes.get(id(node))) is not None:
            return known
        if id(node) in self._open:
            _refuse(
                node.start_mark, f"{place or 'the document'} holds itself (an alias of what it stands in)"
            )
        self._open.add(id(node))
        size = 1
        if isinstance(node, ScalarNode):
            self._check_scalar(node, place)
        elif isinstance(node, SequenceNode):
            if node.tag != f"{_STANDARD}seq":
                _refuse_tag(node)
            for number, item in enumerate(node.value):
                size += self._check(item, f"{place}.{number}" if place else str(number))
        else:
            assert isinstance(node, MappingNode)
            if node.tag != f"{_STANDARD}map":
                _refuse_tag(node)
            self._check_keys(node, place)
            for key, item in node.value:
                size += 1 + self._check(item, place if key.tag == _MERGE else _below(place, key.value))
                if key.tag == _MERGE:
                    _check_merge(item)
        if size > _MOST_VALUES:
            _refuse(
                node.start_mark,
                f"{place or 'the document'} has more than {_MOST_VALUES} values, aliases followed",
            )
        self._open.remove(id(node))
        self._sizes[id(node)] = size
        return size

    def _check_keys(self, node: MappingNode, place: str) -> None:
        first: dict[str, ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                _refuse(
                    key.start_mark,
                    f"{place or 'the document'} has a list or a block for a key; it must be text",
                )
            if key.tag != _MERGE:
                self._check_scalar(key, place)
            if not key.value:
                _refuse(key.start_mark, f"{place or 'the document'} has an empty key")
            if key.value in first:
                self._faults.append(self._twice(first[key.value], key, _below(place, key.value)))
            else:
                first[key.value] = key

    def _twice(self, first: ScalarNode, second: ScalarNode, name: str) -> str:
        before, now = first.start_mark, second.start_mark
        hint = "; to merge several: <<: [*first, *second]" if second.tag == _MERGE else ""
        if before.line == now.line:
            line = "" if self._one_line else f"line {now.line + 1}, "
            return f"{name} stands twice: {line}characters {before.column + 1} and {now.column + 1}{hint}"
        return f"{name} stands twice: lines {before.line + 1} and {now.line + 1}{hint}"

    def _check_scalar(self, node: ScalarNode, place: str) -> None:
        kind = node.tag.removeprefix(_STANDARD)
        if kind not in ("null", "bool", "int", "float", "str", "merge"):
            _refuse_tag(node)
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
            _refuse(
                node.start_mark,
                f"{place or 'a value'} holds a NUL, or half of a surrogate pair",
            )
        problem = None
        try:
            value = _scalar(kind, node.value)
        except (ValueError, KeyError):  # "!!int x", or thousands of digits
            value, problem = None, "is not what its tag says, or has too many digits"
        if isinstance(value, int) and not _SMALLEST <= value <= _LARGEST:
            problem = "is beyond the whole numbers of 64 bits"
        if isinstance(value, float) and value - value != 0:
            problem = "is infinite or no number: give a finite one"
        if problem:
            self._faults.append(f"line {node.start_mark.line + 1}: {place or 'the value'} {problem}")

    def _value(self, node: Node) -> Any:
        if isinstance(node, ScalarNode):
            return _scalar(node.tag.removeprefix(_STANDARD), node.value)
        if isinstance(node, SequenceNode):
            return [self._value(item) for item in node.value]
        assert isinstance(node, MappingNode)
        return dict(self._items(node))

    def _items(self, node: MappingNode) -> Iterator[tuple[str, Any]]:
        """Merged items before the mapping's own, so that its own win; of several merged mappings the first wins."""
        for key, item in node.value:
            if key.tag == _MERGE:
                for merged in reversed(item.value if isinstance(item, SequenceNode) else [item]):
                    yield from self._items(merged)
        for key, item in node.value:
            if key.tag != _MERGE:
                yield key.value, self._value(item)


def _scalar(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind == "float":
        return float(re.sub(r"\.(?=[iInN])", "", text))
    return text


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _check_merge(item: Node) -> None:
    merged = item.value if isinstance(item, SequenceNode) else [item]
    if not all(isinstance(one, MappingNode) for one in merged):
        _refuse(item.start_mark, "<< merges blocks; this is none")


def _refuse_tag(node: Node) -> NoReturn:
    name = f" ({node.tag.removeprefix(_STANDARD)})" if node.tag.startswith(_STANDARD) else ""
    _refuse(
        node.start_mark,
        f"is not YAML of plain data: a tag{name} makes other values; text that begins with ! needs quotes",
    )
