"""``glscl`` as a user calls it, without a process of its own: most of one's time would be the start."""

from __future__ import annotations

import logging
import sys
import threading  # noqa: F401 - its hook is put back
from collections.abc import Callable, Iterator

import pytest

from pipeline.cli import main

#: Called with the arguments of the command line, gives (exit code, what was printed on both streams).
Glscl = Callable[..., tuple[int, str]]


@pytest.fixture
def glscl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Glscl]:
    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["glscl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    for hooks in ("sys", "threading"):  # main sets them for the life of its process
        monkeypatch.setattr(f"{hooks}.excepthook", sys.modules[hooks].excepthook)
    rooms = [logging.getLogger(room) for room in ("pipeline", "sharding", "cluster", "model")]
    levels = [room.level for room in rooms]
    yield call
    for room, level in zip(rooms, levels, strict=True):
        room.setLevel(level)
