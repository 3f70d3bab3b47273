"""Processes start under any TMPDIR, and their sockets are private and do not stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharding import forkserver as sockets

ROOT = Path(__file__).parents[2]
_PROGRAM = """
import os, signal, stat, sys, tempfile
from multiprocessing import process
from pathlib import Path
from sharding.forkserver import forkserver

def work(queue):
    queue.put((tempfile.gettempdir(), process.current_process()._config["tempdir"]))

if __name__ == "__main__":
    for _ in range(2):  # the second finds the server and the folder as they are
        context = forkserver()
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        temporary, folder = queue.get()
        child.join()
    assert temporary == tempfile.gettempdir() == os.environ["TMPDIR"], temporary
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert list(Path(folder).glob("listener-*"))
    print(folder, flush=True)
    if sys.argv[1:]:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def start(tmp_path: Path, temporary: str, *arguments: str) -> Path:
    """Runs the program with this TMPDIR; the folder of its sockets."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    os.makedirs(temporary, exist_ok=True)
    ended = subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**os.environ, "TMPDIR": temporary, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout, ended.stderr
    assert "Traceback" not in ended.stderr
    return Path(ended.stdout.strip())


@pytest.mark.parametrize("length", [71, 72, 76, 200])
def test_processes_start_below_a_folder_of_any_length_and_clear_away_their_sockets(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    own = str(tmp_path_factory.getbasetemp() / "t")
    temporary = own + "_" * (length - len(os.fsencode(own)))
    assert len(os.fsencode(temporary)) == length
    folder = start(tmp_path, temporary)
    assert not folder.exists()
    assert folder.is_relative_to(temporary) == (length <= 71)


def test_processes_start_below_a_folder_with_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    folder = start(tmp_path, str(tmp_path / "my scratch, für später 一時"))
    assert not folder.exists()


def test_what_a_killed_process_leaves_is_removed_by_whoever_looks_and_nothing_of_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_places", lambda: [str(tmp_path)])
    living = sockets._new_folder()
    short = tmp_path.parent / "k"
    killed = start(tmp_path, str(short), "die")
    assert killed.exists()
    monkeypatch.setattr(sockets, "_places", lambda: [str(tmp_path), str(killed.parent)])
    sockets.remove_abandoned_sockets()
    assert not killed.exists()
    assert living.exists()


def test_where_no_folder_is_short_enough_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_places", lambda: ["/proc/nothing"])
    with pytest.raises(sockets.UserError, match=r"TMPDIR is .* give TMPDIR a shorter path"):
        sockets._new_folder()
