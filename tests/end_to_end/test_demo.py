"""``glscl demo`` on object storage: the whole bundled corpus and all tasks, only the training and the
made-up scenes cut to a few."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from pipeline.evaluation.ledger import Ledger
from sharding.storage import Storage
from tests.end_to_end.command import Command, committed
from tests.fixtures.s3 import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.server]

_MOST_GIB = 8.0
_PAUSE_S = 4.0
_STEPS = (2, 2, 2)


def test_the_demo_runs_on_s3_and_all_its_processes_stay_under_8_gib(
    s3_server: S3Server, tmp_path: Path
) -> None:
    url = s3_server.fresh("demo")
    overrides = [
        part
        for stage, steps in enumerate(_STEPS)
        for name in ("steps", "checkpoint_every")
        for part in ("--set", f"train.stages.{stage}.{name}={steps}")
    ]
    for task in ("1", "2", "3", "4"):  # each once; the sweep over checkpoints is test_evaluations'
        overrides += ["--set", f"evaluate.tasks.{task}.after=end"]
    for task in ("5", "6"):  # VQA and NLVR2, which fine-tune
        overrides += ["--set", f"evaluate.tasks.{task}.fine_tune.steps=2"]
    overrides += ["--set", "evaluate.tasks.6.fine_tune.workers=1"]
    overrides += ["--set", "datasets.scenes.source.count=200"]  # they are made, not of the corpus
    command = Command(
        *(
            "demo",
            "--folder",
            str(tmp_path / "demo"),
            "--storage",
            url,
            "--set",
            "checkpoints.keep_last=3",
            *overrides,
        ),
        log=tmp_path / "log",
        environment=s3_server.environment,
    )
    peak = _Peak(command.process.pid)
    try:
        output = command.succeed()
    finally:
        most = peak.stop()
    assert 1.0 < most < _MOST_GIB
    assert s3_server.secret_key not in output
    assert url in output
    run = Storage(s3_server.config(url)).at("runs/demo")
    assert [checkpoint.step for checkpoint in committed(run)] == [2, 4, 6]
    outcomes = Ledger(run).outcomes()
    assert [outcome.cause for outcome in outcomes] == [None] * len(outcomes)
    assert all(outcome.intervals and Ledger(run).items(outcome) for outcome in outcomes)
    others = {"clips", "scenes", "objects", "regions", "questions", "pairs"}
    assert {(outcome.step, outcome.task) for outcome in outcomes} == {
        *((step, "images") for step in (2, 4, 6)),
        *((6, task) for task in others),
    }
    assert not (tmp_path / "demo" / "storage").exists()


class _Peak:
    """The most memory that a process and all below it held at once: proportional set sizes, now and then.

    Not each second: the kernel counts the pages of forty processes for it, which takes a good part of a core.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """The peak in GiB."""
        self._over.set()
        self._thread.join()
        return self._most / 2**30

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE_S):
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self._most = max(self._most, sum(_proportional_set(process) for process in family))


def _proportional_set(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone between the listing and the look
        return 0
