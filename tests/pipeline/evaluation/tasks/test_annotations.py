"""Annotation files are read as JSON would be, row by row, and a bad one is named by its place."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.tasks import annotations
from pipeline.evaluation.tasks.annotations import digest_of, number_of, read_lines, read_rows, text_of
from sharding.errors import UserError
from sharding.storage import Storage, open_storage

ROWS = [
    {"id": 1, "text": "What is it?", "inner": {"rows": [1, 2, {"x": None}]}},
    {"id": -20, "text": 'A "quoted" \\ ] } , 猫 é 👍', "numbers": [1.5e-7, 0, True]},
    {"id": 3, "text": ""},
]
FILE = {"info": {"rows": [{"id": 9}]}, "version": 1.5, "subtype": "val2014", "rows": ROWS, "end": 12345}


@pytest.fixture
def here(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def whole(row: dict[str, Any]) -> dict[str, Any]:
    return row


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", ["compact", "indented", "escaped", "bom"])
def test_rows_are_those_of_the_json_whatever_is_read_at_once(
    here: Storage, monkeypatch: pytest.MonkeyPatch, block: int, form: str
) -> None:
    monkeypatch.setattr(annotations, "_BLOCK", block)
    options: dict[str, Any] = {
        "compact": {"separators": (",", ":"), "ensure_ascii": False},
        "indented": {"indent": 2, "ensure_ascii": False},
        "escaped": {},
        "bom": {"ensure_ascii": False},
    }[form]
    text = json.dumps(FILE, **options)
    here.write_bytes("a.json", text.encode("utf-8-sig" if form == "bom" else "utf-8"))
    rows, header = read_rows(here, "a.json", "data.x", "rows", whole)
    assert rows == ROWS
    assert header == {"version": 1.5, "subtype": "val2014", "end": 12345}


def test_a_file_is_never_held_as_a_whole(here: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharding.storage._BLOCK", 1 << 16)
    rows = [{"id": n, "text": "x" * 1000} for n in range(12_000)]
    here.write_bytes("a.json", json.dumps({"rows": rows}).encode())
    del rows
    tracemalloc.start()
    numbers, _ = read_rows(here, "a.json", "data.x", "rows", lambda row: number_of(row, "id"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = here.size("a.json")
    assert numbers == list(range(12_000))
    assert size > 12_000_000
    assert peak < 6 << 20  # a few blocks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": [{"id": 1}, {"id": "2"}]}', r"a.json, rows\[1\]: 'id' is not a whole number but '2'"),
        ('{"rows": [{"id": 1}, {}]}', r"a.json, rows\[1\] has no 'id'"),
        ('{"rows": [{"id": true}]}', r"rows\[0\]: 'id' is not a whole number"),
        ('{"rows": [1]}', r"rows\[0\] is not an object but int"),
        ('{"rows": [{"id": 1}, {"id": 2', "a.json is not JSON, or cut short"),
        ('{"rows": [{"id": 1} {"id": 2}]}', "is not JSON: '{' where ',' belongs"),
        ('{"rows": [{"id": 1}]', "cut short: it ends too soon"),
        ('{"rows": {"id": 1}}', "a.json has no list 'rows'"),
        ('{"id": 1}', "a.json has no list 'rows'"),
        ("[]", "a.json is not a JSON object with a list 'rows'"),
        ("", "cut short: it ends too soon"),
        ('{"rows": [{"id": 1, "x": "\udcff"}]}', "a.json is not UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_the_row(here: Storage, text: str, message: str) -> None:
    here.write_bytes("a.json", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_rows(here, "a.json", "data.x", "rows", lambda row: number_of(row, "id"))


def test_a_row_without_end_does_not_fill_the_memory(here: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "_LONGEST_ROW", 3000)
    monkeypatch.setattr(annotations, "_BLOCK", 500)
    here.write_bytes("a.json", ('{"rows": [{"id": "' + "x" * 100_000).encode())
    with pytest.raises(UserError, match="cut short"):
        read_rows(here, "a.json", "data.x", "rows", whole)
    here.write_bytes("a.jsonl", b"x" * 10_000)
    with pytest.raises(UserError, match="line 1 is longer than"):
        read_lines(here, "a.jsonl", "data.x", whole)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b"{", "a.json, line 3 is not JSON"),
        (b"[1]", "line 3 is not an object but list"),
        (b'{"text": 3}', "line 3: 'text' is not text but int"),
        (b'{"text": "\\ud800"}', "line 3: 'text' holds half a surrogate pair"),
        (b"{}", "line 3 has no 'text'"),
    ],
)
def test_a_bad_line_is_named(here: Storage, second: bytes, message: str) -> None:
    here.write_bytes("a.json", b'{"text": "a"}\n\n' + second + b"\n")
    with pytest.raises(UserError, match=message):
        read_lines(here, "a.json", "data.x", lambda row: text_of(row, "text"))


def test_lines_without_a_last_line_end_are_all_read(here: Storage) -> None:
    here.write_bytes("a.json", b'{"text": "a"}\n  \n{"text": "b"}')
    assert read_lines(here, "a.json", "data.x", lambda row: text_of(row, "text")) == ["a", "b"]


def test_a_missing_file_is_named_with_the_field(here: Storage) -> None:
    for address in ("no/such.json", f"{here.url}/no/such.json", str(here.local_path("no/such.json"))):
        with pytest.raises(UserError, match=r"^data\.questions: there is no file file://.*no/such\.json$"):
            read_rows(here, address, "data.questions", "questions", whole)


def test_the_digest_changes_with_files_names_and_sizes_and_nothing_else(storage: Storage) -> None:
    storage.write_bytes("q.json", b"questions")
    for name in ("a.jpg", "b.jpg"):
        storage.write_bytes(f"images/{name}", name.encode())

    def digest(**settings: Any) -> str:
        return digest_of(storage, {"data.questions": "q.json"}, {"data.images": "images"}, **settings)

    first = digest()
    assert digest() == first
    assert digest(pattern="x") != first
    storage.write_bytes("other.json", b"x")
    assert digest() == first
    absolute = digest_of(
        storage, {"data.questions": f"{storage.url}/q.json"}, {"data.images": f"{storage.url}/images"}
    )
    assert absolute == first
    seen = {first}
    for change in (
        lambda: storage.write_bytes("q.json", b"questionz"),
        lambda: storage.write_bytes("images/b.jpg", b"longer than it was"),
        lambda: storage.write_bytes("images/c.jpg", b"new"),
        lambda: storage.delete("images/a.jpg"),
    ):
        change()
        assert digest() not in seen
        seen.add(digest())
    with pytest.raises(UserError, match=r"data\.images: there are no files below .*/none"):
        digest_of(storage, {}, {"data.images": "none"})
    with pytest.raises(UserError, match=r"data\.questions: there is no file .*/p\.json"):
        digest_of(storage, {"data.questions": "p.json"}, {})
