"""YAML is read as plain data by the core schema of YAML 1.2; whatever else it holds is one line, in little time."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import yaml_reader
from pipeline.yaml_reader import LARGEST_FILE, parse_yaml, read_yaml
from sharding.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def refusal(text: str, place: str = "") -> str:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "job.yaml", place)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-05", 1e-5), ("5e8", 5e8), ("1E6", 1e6), ("5.0e8", 5e8), ("-.5", -0.5), ("1.", 1.0), ("+4e+2", 400.0)],
        *[("12", 12), ("-3", -3), ("010", 10), ("0o10", 8), ("0x1F", 31), ("007", 7)],
        *[("1_000", "1_000"), ("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01")],
        *[("no", "no"), ("on", "on"), ("Yes", "Yes"), ("y", "y"), ("true", True), ("FALSE", False), ("tRue", "tRue")],
        *[("~", None), ("null", None), ("", None), ("'1e3'", "1e3"), ('"true"', "true"), ("!!str 3", "3")],
        *[("1e", "1e"), ("e5", "e5"), ("0b1", "0b1"), ("1.2.3", "1.2.3"), ("=", "="), ("<<", "<<")],
    ],
)  # fmt: skip
def test_plain_scalars_have_the_types_of_the_core_schema(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}\n", "job.yaml")["a"]
    assert (found, type(found)) == (value, type(value))


def test_a_key_is_the_text_that_stands_there() -> None:
    assert parse_yaml("{1: a, 2024-01-01: b, no: c, null: d, 1e3: e, 'x y': f, true: g}", "x") == {
        "1": "a", "2024-01-01": "b", "no": "c", "null": "d", "1e3": "e", "x y": "f", "true": "g",
    }  # fmt: skip


def test_merge_keys_stay_and_aliases_are_copies() -> None:
    text = "base: &b {x: 1, y: [1]}\nmore: {y: 2, <<: *b}\nboth: {<<: [{x: 3}, *b]}\nsame: *b\n"
    found = parse_yaml(text, "x")
    assert found["more"] == {"x": 1, "y": 2}
    assert found["both"] == {"x": 3, "y": [1]}
    found["same"]["y"].append(2)
    assert found["base"]["y"] == [1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", "job.yaml: a stands twice: lines 1 and 3"),
        ("a:\n  b: {c: 1, c: 2}", "job.yaml: a.b.c stands twice: line 2, characters 7 and 13"),
        ("a:\n- b: 1\n  'b': 2", "job.yaml: a.0.b stands twice: lines 2 and 3"),
        ('a: 1\n"\\x61": 2', "job.yaml: a stands twice: lines 1 and 2"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}", "to merge several: <<: [*first, *second]"),
    ],
)
def test_a_key_that_stands_twice_is_told_with_its_place_and_both_lines(text: str, told: str) -> None:
    assert told in refusal(text)


def test_each_duplicate_is_a_line_and_one_below_an_override_has_its_whole_name() -> None:
    assert refusal("a: 1\na: 2\nb: {c: 1, c: 2}\n").count("stands twice") == 2
    assert (
        refusal("{a: 1, a: 2}", "train.stages.0")
        == "job.yaml: train.stages.0.a stands twice: characters 2 and 8"
    )


def bomb(item: str, first: str) -> str:
    lines = [f"a: &a {first}"]
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True):
        lines.append(f"{name}: &{name} {item.replace('X', ', '.join([f'*{before}'] * 9))}")
    return "\n".join(lines)


HOSTILE = {
    "recursive list": "&a [*a]",
    "recursive block": "a: &a {b: {c: *a}}",
    "recursive merge": "a: &a {<<: *a}",
    "alias bomb": bomb("[X]", "[1, 2]"),
    "merge bomb": bomb("{<<: [X]}", "{x: 1}"),
    "deep lists": "[" * 100_000,
    "deep blocks": "{a: " * 1000,
    "deep lines": "- " * 50_000 + "a",
    "python object": "a: !!python/object/apply:os.system ['true']",
    "python name": "a: !!python/name:os.system",
    "own tag": "a: !secret x",
    "binary": "a: !!binary aGVsbG8=",
    "set": "a: !!set {x, y}",
    "omap": "a: !!omap [x: 1]",
    "timestamp": "a: !!timestamp 2024-01-01",
    "tagged key": "!!python/name:os.system x: 1",
    "tag of another kind": "a: !!map [1]",
    "tag that lies": "a: !!int x",
    "switch that lies": "a: !!bool yes",
    "list as a key": "? [a, b]\n: 1",
    "block as a key": "{{a: 1}: 2}",
    "empty key": "'': 1",
    "no key": ": 1",
    "merge of a number": "a: {<<: 3}",
    "merge of numbers": "a: {<<: [3]}",
    "two documents": "a: 1\n---\nb: 2",
    "tab": "a:\n\tb: 1",
    "open quote": "a: 'b",
    "open list": "a: [1,",
    "no such alias": "a: *b",
    "anchor twice": "a: &x 1\nb: &x 2",
    "at sign": "a: @b",
    "NUL": "a: \0",
    "bell": "a: \a",
    "NUL in quotes": 'a: "\\0"',
    "half a pair": 'a: "\\ud83d"',
    "half a pair as it is": "a: \ud83d",
    "no such character": 'a: "\\UFFFFFFFF"',
    "version of many digits": f"%YAML {'9' * 5000}.1\n---\na: 1",
    "unknown tag handle": "a: !y!z b",
    "whole number of 65 bits": f"a: {2**64}",
    "whole number of many digits": f"a: {'9' * 5000}",
    "infinite": "a: -.Inf",
    "no number": "a: .nan",
    "too large": "a: 1e999",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_no_job_can_hold_is_one_line_in_little_time(text: str) -> None:
    began = time.monotonic()
    told = refusal(text)
    assert len(told.splitlines()) == 1
    assert told.startswith("job.yaml: ")
    assert len(told) < 200
    assert time.monotonic() - began < 2


def test_no_message_quotes_a_value() -> None:
    for text in (
        'uri: "postgresql://u:hunter22"x@h',
        "key: *hunter22",
        "key: !hunter22 x",
        "key: @hunter22",
        "key: %hunter22",
        "uri: http://u:hunter22: x",
        "a: 'hunter22\nb: 1",
        "- hunter22: [\n}",
    ):
        assert "hunter22" not in refusal(text)


def test_any_text_is_read_or_refused() -> None:
    generator = random.Random(5)
    marks = "ab1: -[]{},&*!?|>'\"%@`#\n\t~<.e\\x0\ud800\0é"
    read = 0
    for _ in range(3000):
        text = "".join(generator.choices(marks, k=generator.randint(0, 30)))
        with suppress(UserError):
            parse_yaml(text, "job.yaml")
            read += 1
    assert 100 < read < 2900


def test_every_encoding_that_yaml_names_is_read(tmp_path: Path) -> None:
    text = "name: grün\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "job.yaml").write_text(text, encoding=encoding)
        assert read_yaml(tmp_path / "job.yaml") == {"name": "grün"}, encoding


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: 1\nb: grün".encode("latin-1"), "line 2: is not UTF-8"),
        (b"\xff\xfea", "is not UTF-16"),
        (b"a: \xed\xa0\x80", "is not UTF-8"),
        (b"#" * (LARGEST_FILE + 1), "is larger than 1024 KiB"),
        (bytes(range(256)), "line 2: is not UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "job.yaml")
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_file_is_one_line_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_reader, "_PIPE_PATIENCE_S", 0.2)
    held, _writer = os.pipe()  # nobody writes, and it stays open
    for place, told in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "there is no such job file"),
        ("a\0b", "null byte"),
        ("x" * 300, "File name too long"),
        ("/dev/zero", "is larger"),
        (f"/dev/fd/{held}", "is a pipe, and nobody wrote to it"),
    ):
        with pytest.raises(UserError, match=told):
            read_yaml(place)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with open(tmp_path / "pipe", "w") as pipe:
            pipe.write("a: ")
            pipe.flush()
            time.sleep(0.1)
            pipe.write("1\n")

    writer = threading.Thread(target=write)
    reader = os.open(
        tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK
    )  # so that there is a reader from the start
    writer.start()
    time.sleep(0.05)
    assert read_yaml(tmp_path / "pipe") == {"a": 1}
    writer.join()
    os.close(reader)


def test_the_projects_own_files_are_the_same_as_ever() -> None:
    for file in [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "pipeline" / "demo").glob("*.yaml")]:
        assert read_yaml(file) == yaml.safe_load(file.read_text("utf-8")), file
