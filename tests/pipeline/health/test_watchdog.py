"""A training that stands still says who stands where, and the worker that hangs is ended."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cluster.workers import WorkerContext
from pipeline.training import loop
from pipeline.training.clock import Clock, Moment
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.watchdog import Standing, Watchdog, hanging
from pipeline.training.loop import train
from sharding.storage import open_storage
from tests.pipeline.health.small import Faults, SmallSubject, free_port, join_group, small_course
from tests.pipeline.health.test_training import Case, _NoMetrics, plan_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FileBoard:
    """A board of files, for workers without Ray."""

    folder: Path

    def post(self, topic: str, note: Any) -> None:
        part = self.folder / f"{topic.replace('/', '-')}.part-{os.getpid()}-{threading.get_ident()}"
        part.write_text(json.dumps([topic, note]))
        part.rename(self.folder / f"{topic.replace('/', '-')}.json")

    def read(self, timeout_s: float = 5.0, *, within_s: float = math.inf) -> dict[str, Any]:
        files = [file for file in self.folder.glob("*.json") if time.time() - file.stat().st_mtime < within_s]
        return dict(json.loads(file.read_text()) for file in files)


def _standing(rank: int, step: int, phase: str) -> Standing:
    return Standing(rank, "0, here", step, phase, 60.0, hangs=True)


def test_whoever_is_furthest_behind_is_the_one_that_hangs() -> None:
    ahead = _standing(0, 7, "forward and backward")
    assert hanging([ahead, _standing(1, 7, "data"), _standing(2, 7, "optimizer")]).rank == 1
    assert hanging([ahead, _standing(1, 6, "optimizer"), _standing(2, 7, "data")]).rank == 1
    assert hanging([ahead, _standing(1, 7, "forward and backward")]).rank == 0


def test_long_phases_may_take_long_and_others_may_not(tmp_path: Path) -> None:
    context = WorkerContext(0, 1, 0, 1, 0, CPU)
    config = HealthBlock(hang_s=60, long_phase_s=600)
    dog = Watchdog(config, Clock(), context, open_storage(tmp_path), None, print)

    def hangs(seconds: float, phase: str, *, long: bool = False) -> bool:
        standing = dog._look(Moment(3, phase, time.monotonic() - seconds, long))
        return standing is not None and standing.hangs

    assert dog._look(Moment(3, "data", time.monotonic())) is None
    assert hangs(61, "data")
    assert not hangs(31, "data")
    assert not hangs(300, "checkpoint")
    assert hangs(601, "checkpoint")
    assert not hangs(300, "forward and backward", long=True)
    assert hangs(601, "forward and backward", long=True)


def test_all_that_stand_are_named_their_stacks_kept_and_the_one_that_hangs_is_ended(tmp_path: Path) -> None:
    run = open_storage(tmp_path / "run")
    (tmp_path / "board").mkdir()
    board: Any = FileBoard(tmp_path / "board")
    told: list[tuple[int, str]] = []
    ended: list[int] = []
    over = threading.Event()
    with ExitStack() as stack:
        for rank, phase in enumerate(("forward and backward", "data", "optimizer")):
            phases = Clock()
            phases.now = Moment(7, phase, time.monotonic())

            def warn(message: str, rank: int = rank) -> None:
                told.append((rank, message))

            def kill(rank: int = rank) -> None:
                ended.append(rank)
                over.set()

            context = WorkerContext(rank, 4, rank, 4, 0, CPU)
            dog = Watchdog(HealthBlock(hang_s=3.0), phases, context, run, board, warn, kill)
            stack.enter_context(dog)
        assert over.wait(timeout=120)
    assert ended[0] == 1
    assert [rank for rank, _ in told] == [0]
    [(_, message)] = told
    assert "Hanging, as it seems: worker 1 (node 0, " in message
    for part in ("step 7, forward and backward, for", "step 7, data, for", "step 7, optimizer, for"):
        assert part in message
    assert message.endswith("; 1 others are silent or move")
    for rank in range(3):
        text = run.read_bytes(f"health/hang-step-00000007-worker-{rank}.txt").decode()
        assert "test_all_that_stand_are_named" in text  # where the main thread of this process is


def _sleeps_in_its_loader(rank: int, port: int, root: str) -> None:
    os.setsid()  # so that the test finds what it leaves behind
    folder = Path(root)
    loop.MetricLogger = _NoMetrics  # type: ignore[assignment, misc]
    context = join_group(rank, 2, port)
    plan = plan_of(Case({}, {}), folder, 2)
    course = small_course(2, steps=12, loader_processes=1)
    changes = {
        "course": course,
        "subject": SmallSubject(course, 5, Faults(rank=1, asleep_in=7, sleeps=300.0)),
        "board": FileBoard(folder / "board"),
        "health": HealthBlock(hang_s=15.0),
    }
    train(context, type(plan)(**{**vars(plan), **changes}))


@pytest.mark.slow
def test_a_worker_whose_loader_hangs_is_named_shown_in_its_stacks_and_killed(tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    spawned = multiprocessing.spawn(
        _sleeps_in_its_loader, args=(free_port(), str(tmp_path)), nprocs=2, join=False
    )
    either = (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)
    with pytest.raises(either):  # the one that is killed, or the other, whose connection is gone
        spawned.join(timeout=300)
    for process in spawned.processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert spawned.processes[1].exitcode == -signal.SIGKILL
    message = FileBoard(tmp_path / "board").read()["warning"]
    assert "Hanging, as it seems: worker 1 (node 0, " in message
    assert "step 7, data, for" in message
    stacks = open_storage(tmp_path / "run").read_bytes("health/hang-step-00000007-worker-1.txt").decode()
    assert "in _train_step" in stacks
    loader = stacks.partition("loader process")[2]
    assert "in __getitems__" in loader
