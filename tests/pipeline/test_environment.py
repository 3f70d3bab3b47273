"""Whatever the variables of terminal and home hold, a command starts, or says in one line what is missing."""

from __future__ import annotations

import getpass
import io
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import environment
from pipeline.cli import console
from pipeline.environment import columns, settle_home, settle_output
from sharding.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "width"),
    [
        *[
            ("", 100),
            ("abc", 100),
            ("0", 100),
            ("-5", 100),
            ("80", 100),
            ("1e3", 100),
            ("²", 100),
            ("٣٠٠", 100),
        ],
        *[("200", 200), (" 200\n", 200), ("+0200", 200), ("99999", 1000), ("9" * 5000, 100), ("120.5", 100)],
    ],
)
def test_columns_widen_the_output_where_they_are_a_number(
    monkeypatch: pytest.MonkeyPatch, text: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", text)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    settle_output()
    assert columns() == width
    assert console().width == width


def test_variables_of_sizes_are_sizes_or_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("COLUMNS", "²"), ("LINES", "x"), ("TERMINAL_WIDTH", " 120 ")):
        monkeypatch.setenv(name, text)
    settle_output()
    assert "COLUMNS" not in os.environ
    assert "LINES" not in os.environ
    assert os.environ["TERMINAL_WIDTH"] == "120"


def test_output_takes_every_character_and_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    settle_output()
    print("±→ \ud800", flush=True)
    print("nowhere", file=sys.stderr)
    assert sink.getvalue() == b"\\xb1\\u2192 \\ud800\n"


def nobody(number: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {number}")


@pytest.mark.parametrize("home", [None, "", "/nonexistent", "file"])
def test_a_home_is_made_up_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, home: str | None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    ends: list[tuple[Path, int]] = []
    monkeypatch.setattr(environment.atexit, "register", lambda _, *arguments: ends.append(arguments))
    settle_home()
    made_up = Path(os.environ["HOME"])
    assert Path.home() == made_up
    assert made_up.is_dir()
    assert getpass.getuser() == str(os.getuid())
    assert len(caplog.records) == 1
    assert f"{made_up} is in its place" in caplog.text
    settle_home()
    assert len(ends) == 1  # it is a home now
    environment._remove(made_up, os.getpid() + 1)
    assert made_up.is_dir()
    environment._remove(*ends[0])
    assert not made_up.exists()


def test_the_home_of_the_user_serves_where_the_variable_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = pwd.struct_passwd(("u", "x", 1, 1, "", str(tmp_path), ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: entry)
    monkeypatch.setenv("HOME", "/nonexistent")
    settle_home()
    assert os.environ["HOME"] == str(tmp_path)


def test_a_home_that_is_there_stays_though_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("HOME", str(tmp_path))
    settle_home()
    assert os.environ["HOME"] == str(tmp_path)


def test_no_place_for_a_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(environment.tempfile, "mkdtemp", full)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(
        UserError, match=r"which HOME says, is no folder, and no folder can be made .*: set HOME"
    ):
        settle_home()


def test_a_command_in_a_hostile_environment_ends_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, which takes a second or two: variables are read while modules are imported."""
    gone = tmp_path / "gone"
    gone.mkdir()
    variables = {"COLUMNS": "²", "LINES": "", "TERMINAL_WIDTH": "x", "TERM": "dumb", "FORCE_COLOR": "1"}
    variables |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    code = "import os, sys; os.rmdir(os.getcwd()); sys.argv[1:] = ['validate', 'ü.yaml']; "
    code += "from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gone,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: the current directory cannot be used (No such file or directory): change to another\n"
    )
