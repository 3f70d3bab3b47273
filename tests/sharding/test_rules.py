"""Promises of rules over an index: they pick what they say, and a mistake in one is named with its place."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sharding.errors import UserError
from sharding.index import index_table
from sharding.rules import parse_rule
from tests.sharding.test_index import ROW

ROWS = index_table(
    [
        replace(ROW, key="a", width=100, height=50, duration=0.5, source="https://one.org/a.png"),
        replace(ROW, key="b", width=200, height=50, duration=1.5, source='https://two.org/it\'s "b".png'),
        replace(ROW, key="c", width=300, height=90, duration=2.5, source="file:///c.png"),
    ]
)


def picked(rule: str, table: pa.Table = ROWS) -> str:
    return "".join(table.filter(pc.fill_null(parse_rule(rule)(table), False))["key"].to_pylist())


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("width < 200", "a"),
        ("width <= 200", "ab"),
        ("200 < 300 or width", None),
        ("width > 2e2", "c"),
        ("width>=200", "bc"),
        ("width = 200", "b"),
        ("width == 200", "b"),
        ("width != 200", "ac"),
        ("duration < 1.5", "a"),
        ("height > -1", "abc"),
        ("key = 'a'", "a"),
        ("source contains 'one.org'", "a"),
        ("source startswith 'file:'", "c"),
        ("source contains 'it''s'", "b"),
        ('source contains """b"""', "b"),
        ("key in ('a', 'c')", "ac"),
        ("width in (100, 300.0)", "ac"),
        ("not width in (100, 300)", "b"),
        ("width < 150 or width > 250 and height > 100", "a"),
        ("(width < 150 or width > 250) and height > 80", "c"),
        ("NOT width < 150 AND NOT (width > 250)", "b"),
        ("not not width < 150", "a"),
    ],
)
def test_a_rule_picks_the_samples_it_describes(rule, keys):
    if keys is None:
        with pytest.raises(UserError):
            parse_rule(rule)
    else:
        assert picked(rule) == keys


def test_a_column_without_value_fits_no_comparison_with_it():
    column = pa.array([1.0, None, 3.0], pa.float32())
    table = ROWS.set_column(ROWS.column_names.index("width"), "width", column)
    assert picked("width < 2", table) == "a"
    assert picked("not width < 2", table) == "c"
    assert picked("not width in (1)", table) == "c"
    assert picked("width < 2 or height = 50", table) == "ab"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "expected a column .* at character 1"),
        ("wdith < 3", "expected a column .*width.* at character 1"),
        ("width", "expected an operator .* at character 6"),
        ("width < ", "expected a number or a text in quotes at character 9"),
        ("width < 'x'", "width is a number at character 9"),
        ("key = 3", "key is a text, which stands in quotes at character 7"),
        ("width contains 'x'", "width is a number: it has no 'contains'"),
        ("width < 3 height > 2", "expected 'and', 'or' or the end at character 11"),
        ("(width < 3", r"expected '\)' at character 11"),
        ("width in 3", r"expected '\(' at character 10"),
        ("key = 'open", "cannot be read at character 6"),
        ("width < 3; import os", "cannot be read at character 10"),
        ("__import__('os') = 1", "expected a column"),
        ("not " * 60 + "width < 3", "nested too deeply"),
        ("(" * 60 + "width < 3" + ")" * 60, "nested too deeply"),
    ],
)
def test_a_mistake_in_a_rule_is_named_with_its_place(rule, message):
    with pytest.raises(UserError, match=message):
        parse_rule(rule)
