"""One driver at a time on a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import pipeline.lease
from pipeline.errors import RunTakenOver
from pipeline.lease import hold
from sharding.errors import UserError
from sharding.storage import Storage, StoredFile

_HOLDER = """
import sys
from pipeline.lease import hold
from sharding.storage import open_storage
with hold(open_storage(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_driver(run: Storage) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run until it is killed, or its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, run.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    from sharding.storage import open_storage

    return open_storage(tmp_path / "runs" / "a")


def pretend_elsewhere(run: Storage, number: int, **beat: Any) -> None:
    """A lease as another machine's driver leaves it."""
    record = {
        "host": "elsewhere",
        "machine": "another",
        "pid": 1,
        "started_s": 0.0,
        "since": "2026-01-01T00:00:00",
    }
    run.write_json(f"driver/{number:08d}.json", record)
    run.write_json(f"driver/{number:08d}.alive.json", {"beats": 1, "released": False, **beat})


def test_a_second_driver_is_refused_while_the_first_lives_and_not_after_it_was_killed(run: Storage) -> None:
    with another_driver(run) as first:
        with pytest.raises(UserError) as caught, hold(run):
            pass
        message = str(caught.value)
        assert f"{run.url} is being run by process {first.pid} on {socket.gethostname()} since 20" in message
        assert "\n" not in message
        first.kill()
        first.wait()
        with hold(run, silence_s=3600):  # its process is gone: nothing is waited for
            pass


def test_a_run_that_was_let_go_is_free_and_keeps_who_had_it(run: Storage) -> None:
    for number in (1, 2, 3):
        with hold(run):
            names = [file.path for file in run.list("driver")]
            assert names == [
                *(f"driver/{former:08d}.json" for former in range(1, number)),
                f"driver/{number:08d}.alive.json",
                f"driver/{number:08d}.json",
            ]


@pytest.mark.parametrize("overtakers", [1, 2])
def test_a_driver_that_others_overtake_while_it_looks_is_refused(
    run: Storage, monkeypatch: pytest.MonkeyPatch, overtakers: int
) -> None:
    """A listing may miss what is created meanwhile, and does miss what is deleted."""
    pretend_elsewhere(run, 1, released=True)
    look = Storage.list

    def slow_look(storage: Storage, prefix: str = "") -> Iterator[StoredFile]:
        monkeypatch.setattr(Storage, "list", look)  # for the others, and from then on
        seen = list(look(storage, prefix))
        for _ in range(overtakers - 1):
            with hold(run):
                pass
        others.enter_context(hold(run))
        yield from (file for file in seen if storage.exists(file.path))

    with ExitStack() as others:
        monkeypatch.setattr(Storage, "list", slow_look)
        with pytest.raises(UserError, match="taken by another driver"), hold(run):
            pass


def test_a_process_of_the_same_number_is_not_taken_for_the_driver(run: Storage) -> None:
    pretend_elsewhere(run, 1)
    record = run.read_json("driver/00000001.json")
    own = {"machine": pipeline.lease._machine(), "pid": os.getpid(), "started_s": time.time() - 86400}
    run.write_json("driver/00000001.json", record | own)
    with hold(run, silence_s=3600) as lease:
        assert lease.fence.number == 2


def test_a_lease_of_an_older_version_on_this_machine_holds_while_its_heart_beats(run: Storage) -> None:
    """Its ``started`` are seconds since the epoch, not since the machine's start."""
    pretend_elsewhere(run, 1)
    record = run.read_json("driver/00000001.json")
    del record["started_s"]
    record |= {"machine": pipeline.lease._machine(), "pid": os.getpid(), "started": time.time()}
    run.write_json("driver/00000001.json", record)
    with beating(run), pytest.raises(UserError, match="is being run by process"), hold(run, silence_s=60):
        pass
    with hold(run, silence_s=0.5) as lease:
        assert lease.fence.number == 2


def test_another_machines_driver_is_dead_once_it_is_silent(run: Storage) -> None:
    pretend_elsewhere(run, 4)
    with hold(run, silence_s=0.5) as lease:
        assert lease.fence.number == 5


@contextmanager
def beating(run: Storage) -> Iterator[None]:
    """The heart of the first lease beats."""
    over = threading.Event()

    def beat() -> None:
        for beats in range(2, 10_000):
            run.write_json("driver/00000001.alive.json", {"beats": beats, "released": False})
            if over.wait(0.05):
                return

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()


def test_another_machines_driver_lives_while_its_heart_beats(run: Storage) -> None:
    pretend_elsewhere(run, 1)
    with (
        beating(run),
        pytest.raises(UserError, match="is being run by process 1 on elsewhere"),
        hold(run, silence_s=60),
    ):
        pass


def test_of_many_at_once_exactly_one_gets_a_dead_drivers_run(run: Storage) -> None:
    pretend_elsewhere(run, 1, released=True)
    got, refused = [], []
    together = threading.Barrier(8)
    everybody_tried = threading.Barrier(8)

    def take() -> None:
        together.wait()
        try:
            with hold(run):
                got.append(1)
                everybody_tried.wait()
        except UserError:
            refused.append(1)
            everybody_tried.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)


def test_a_driver_taken_for_dead_hears_of_it_and_its_workers_write_no_more(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.lease, "BEAT_S", 0.05)
    told = threading.Event()
    with hold(run) as lease:
        lease.fence.check()
        lease.when_lost(lambda reason: told.set())
        pretend_elsewhere(run, 2)
        assert told.wait(60)
        with pytest.raises(RunTakenOver, match="another driver has taken the run over"):
            lease.fence.check()
    assert not json.loads(run.read_bytes("driver/00000002.alive.json"))["released"], (
        "it was not ours to let go"
    )
