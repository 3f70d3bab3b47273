"""A run remembers what it began with and which code trained it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline import job as jobs
from pipeline.runs import open_run_folder, read_record
from tests.pipeline.trained_run import make_trained_run


def test_each_change_of_the_code_that_trains_is_recorded_and_a_restart_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trained_run(tmp_path)
    begun: list[Any] = []
    monkeypatch.setattr(jobs, "run_workers", lambda *arguments, **options: begun.append(options["name"]))
    monkeypatch.setattr(jobs, "Board", lambda: None)
    monkeypatch.setattr(jobs, "Watch", lambda *arguments: nullcontext())
    tracker: Any = SimpleNamespace(config=made.job.tracking, run_id=None)
    dispatcher: Any = None
    for commit in ("0123abc", "0123abc", "4567def"):
        monkeypatch.setattr(jobs, "environment_tags", lambda commit=commit: {"commit": commit})
        run = open_run_folder(made.job, made.root, {})  # as a new start finds it
        jobs._train(made.job, run, {}, tracker, dispatcher, Console(quiet=True))
    assert begun == [run.key] * 3
    record = read_record(made.run)
    assert record is not None
    assert record["code"] == [{"commit": "0123abc"}, {"commit": "4567def"}]
