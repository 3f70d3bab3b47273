"""Rules over the columns of an index, as ``glscl shards retract --where`` takes them.

::

    width < 200
    score < 0.2 and not (source contains 'example.org')
    extension in ('png', 'webp') or captions == 1

A comparison is ``COLUMN OPERATOR VALUE``. Operators: ``=`` (``==``), ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in
(VALUE, ...)``, and for texts ``contains`` and ``startswith``. Comparisons are joined by ``and``, ``or``, ``not`` and
parentheses. A text stands in single or double quotes, doubled inside a text to mean itself. A sample whose column
has no value (a score that was never given) fits no comparison with it.

The rule becomes an Arrow expression; nothing of it is ever executed as code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sharding.errors import UserError
from sharding.index import INDEX_SCHEMA

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign><=|>=|==|!=|=|<|>|\(|\)|,))""",
    re.VERBOSE,
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal, "==": pc.equal, "!=": pc.not_equal,
    "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip
_TEXT_ONLY: dict[str, Callable[[Any, str], Any]] = {
    "contains": lambda column, text: pc.match_substring(column, pattern=text),
    "startswith": lambda column, text: pc.starts_with(column, pattern=text),
}
_DEEPEST = 50  # parentheses and nots inside one another


class _Token(NamedTuple):
    kind: str  # "number", "text", "word", "sign" or "end"
    text: str
    at: int


def parse_rule(rule: str) -> Callable[[pa.Table], pa.Array | pa.ChunkedArray]:
    """The mask (bool [rows], with nulls where a column has no value) of an index by ``rule``.

    Raises:
        UserError: the rule cannot be read, names no column of an index, or compares a text with a number.
    """
    return _Parser(rule).parse()


class _Parser:
    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._tokens = list(self._split(rule))
        self._next = 0
        self._depth = 0

    def _split(self, rule: str) -> list[_Token]:
        tokens, at = [], 0
        while rule[at:].strip():
            match = _TOKEN.match(rule, at)
            if match is None:
                raise self._fault("cannot be read", at)
            assert match.lastgroup is not None
            tokens.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        return [*tokens, _Token("end", "", len(rule))]

    def parse(self) -> Callable[[pa.Table], pa.Array | pa.ChunkedArray]:
        evaluate = self._any()
        if self._peek().kind != "end":
            raise self._fault("expected 'and', 'or' or the end", self._peek().at)
        return evaluate

    def _any(self) -> Callable[[pa.Table], Any]:
        left = self._all()
        while self._accept("or"):
            left = _joined(pc.or_kleene, left, self._all())
        return left

    def _all(self) -> Callable[[pa.Table], Any]:
        left = self._one()
        while self._accept("and"):
            left = _joined(pc.and_kleene, left, self._one())
        return left

    def _one(self) -> Callable[[pa.Table], Any]:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._fault("is nested too deeply", self._peek().at)
        try:
            if self._accept("not"):
                inner = self._one()
                return lambda table: pc.invert(inner(table))
            if self._accept("("):
                group = self._any()
                self._expect(")")
                return group
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Callable[[pa.Table], Any]:
        column = self._take()
        if column.kind != "word" or column.text not in INDEX_SCHEMA.names:
            raise self._fault(f"expected a column ({', '.join(INDEX_SCHEMA.names)})", column.at)
        name, is_text = column.text, pa.types.is_string(INDEX_SCHEMA.field(column.text).type)
        operator = self._take()
        word = operator.text.lower()
        if word == "in":
            values = pa.array(self._values(name, is_text), pa.string() if is_text else pa.float64())
            return lambda table: _among(_comparable(table[name]), values)
        if word in _TEXT_ONLY:
            if not is_text:
                raise self._fault(f"{name} is a number: it has no {word!r}", operator.at)
            pattern = str(self._value(name, is_text))
            return lambda table: _TEXT_ONLY[word](table[name], pattern)
        if word not in _COMPARE:
            known = ", ".join(["=", "!=", "<", "<=", ">", ">=", "in", *_TEXT_ONLY])
            raise self._fault(f"expected an operator ({known})", operator.at)
        value = pa.scalar(self._value(name, is_text))
        return lambda table: _COMPARE[word](_comparable(table[name]), value)

    def _values(self, column: str, is_text: bool) -> list[str | float]:
        self._expect("(")
        values = [self._value(column, is_text)]
        while self._accept(","):
            values.append(self._value(column, is_text))
        self._expect(")")
        return values

    def _value(self, column: str, is_text: bool) -> str | float:
        token = self._take()
        if token.kind not in ("number", "text"):
            raise self._fault("expected a number or a text in quotes", token.at)
        if is_text != (token.kind == "text"):
            kind = "a text, which stands in quotes" if is_text else "a number"
            raise self._fault(f"{column} is {kind}", token.at)
        if not is_text:
            return float(token.text)
        quote = token.text[0]
        return token.text[1:-1].replace(quote * 2, quote)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _accept(self, text: str) -> bool:
        token = self._peek()
        if token.kind in ("word", "sign") and token.text.lower() == text:
            self._next += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._fault(f"expected '{text}'", self._peek().at)

    def _fault(self, what: str, at: int) -> UserError:
        return UserError(f"rule {self._rule!r}: {what} at character {at + 1}")


def _joined(join: Callable[[Any, Any], Any], left: Any, right: Any) -> Callable[[pa.Table], Any]:
    return lambda table: join(left(table), right(table))


def _among(column: pa.ChunkedArray, values: pa.Array) -> pa.ChunkedArray:
    return pc.if_else(pc.is_valid(column), pc.is_in(column, value_set=values), pa.scalar(None, pa.bool_()))


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers as float64, so that any of them may be compared with any (exact up to 2^53)."""
    return column if pa.types.is_string(column.type) else column.cast(pa.float64())
