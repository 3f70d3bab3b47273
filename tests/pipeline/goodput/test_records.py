"""The records of a run's time are durable, survive what they must, and say what was done again."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.goodput import records
from pipeline.goodput.accounting import account
from pipeline.goodput.records import AttemptRecorder, LifeRecorder, read_records
from pipeline.training.clock import Clock
from sharding.errors import StorageFault
from sharding.storage import Storage, open_storage


def test_an_inner_phase_is_not_counted_for_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()

    def passes(seconds: float, error: type[Exception] | None = None) -> None:
        now[0] += seconds
        if error is not None:
            raise error

    passes(1)
    clock.step(7)
    with clock.phase("step"):
        passes(2)
        with clock.phase("data"):
            passes(4)
            assert (clock.now.step, clock.now.phase, clock.now.since) == (7, "data", 103.0)
        passes(8)
        with pytest.raises(KeyError), clock.phase("checkpoint"):
            passes(16, KeyError)
        assert clock.now.phase == "step"
    passes(32)
    assert dict(clock.seconds()) == {"other": 33, "step": 10, "data": 4, "checkpoint": 16}


def test_another_thread_never_sees_half_of_a_change() -> None:
    clock, seen, over = Clock("0"), [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(clock.now)

    thread = threading.Thread(target=watch)
    thread.start()
    for step in range(1, 2000):
        clock.step(step)
        with clock.phase(str(step)):
            pass
    over.set()
    thread.join()
    assert all(moment.phase in ("0", str(moment.step)) for moment in seen)


def _train(run: Storage, first: int, last: int, *, dies: bool = False, skips: int = 0) -> None:
    recorder = AttemptRecorder(run, 2)
    recorder.__enter__()
    with recorder.clock.phase("resume"):
        pass
    for step in range(first, last + 1):
        with recorder.step(step):
            with recorder.clock.phase("data"):
                pass
            recorder.computed(10.0, 100.0, "made up")
            if step == skips:
                recorder.skip()
    recorder.write()  # as the thread does from time to time
    recorder._over.set()
    recorder._thread.join()
    if not dies:
        recorder.__exit__(None, None, None)


def test_steps_that_were_reached_before_count_as_redone_and_not_as_work(tmp_path: Path) -> None:
    run = open_storage(tmp_path)
    with LifeRecorder(run) as life:
        _train(run, 1, 8, dies=True)
        _train(run, 5, 12, skips=10)
        life.evaluating()
    lives, attempts = read_records(run)
    assert [(each.step, each.redone, each.skipped, each.flops) for each in attempts] == [
        (8, 0, 0, 80.0),
        (12, 4, 1, 30.0),
    ]
    assert attempts[1].seconds["redone"] > 0
    assert attempts[0].began < attempts[0].first_step < attempts[0].seen
    assert attempts[1].seconds["skipped"] > 0
    found = account(lives, attempts)
    assert found is not None
    assert (found.step, found.redone, found.skipped) == (12, 4, 1)
    assert found.wall == pytest.approx(lives[0].seen - lives[0].began, abs=1e-3)
    assert found.seconds["evaluation"] > 0


def test_time_in_a_phase_that_never_ended_is_not_lost(tmp_path: Path) -> None:
    run = open_storage(tmp_path)
    recorder = AttemptRecorder(run, 1)
    with recorder.clock.phase("resume"):
        time.sleep(0.02)
        recorder.write()
    [attempt] = read_records(run)[1]
    assert attempt.seconds["start"] == pytest.approx(attempt.seen - attempt.began, abs=1e-4)


def test_a_driver_that_goes_on_began_with_its_process_but_not_before_the_last_one_ended(
    tmp_path: Path,
) -> None:
    run = open_storage(tmp_path)
    with LifeRecorder(run):
        pass
    with LifeRecorder(run):
        pass
    first, second = sorted(read_records(run)[0], key=lambda life: life.began)
    assert second.began == first.seen  # this process is older


def test_nobody_but_worker_0_and_a_driver_that_trains_leaves_a_record(tmp_path: Path) -> None:
    with LifeRecorder(None) as life, AttemptRecorder(None, 2) as recorder, recorder.step(1):
        life.evaluating()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_passed_over_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = open_storage(tmp_path)
    _train(run, 1, 3)
    [file] = run.list(records.FOLDER)
    cut = json.loads(run.read_bytes(file.path))
    del cut["began"]
    run.write_bytes(f"{records.FOLDER}/attempt-1.json", json.dumps(cut).encode())
    run.write_bytes(f"{records.FOLDER}/driver-1.json", b"{")
    lives, attempts = read_records(run)
    assert (len(lives), len(attempts)) == (0, 1)
    assert "attempt-1.json is damaged" in caplog.text
    assert "driver-1.json is damaged" in caplog.text


def test_a_storage_that_stays_away_stops_nobody_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_storage(tmp_path)
    recorder = AttemptRecorder(run, 1)

    def fail(*_: Any) -> None:
        raise StorageFault("no answer")

    monkeypatch.setattr(Storage, "write_bytes", fail)
    with recorder:
        recorder.write()
        recorder.write()
    assert caplog.text.count("no answer") == 1
