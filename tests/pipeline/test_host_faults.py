"""Threads, leases, accounts and runs outlast what befalls a host: its disks, its clock, copies of its folders."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.lease
from pipeline import errors, patience, scratch
from pipeline.cli import main
from pipeline.evaluation import actor
from pipeline.export.source import find_run
from pipeline.goodput.accounting import Attempt, Life, account
from pipeline.goodput.records import AttemptRecorder, LifeRecorder, read_records
from pipeline.lease import hold
from pipeline.runs import load_run_job, open_run_folder
from pipeline.training.checkpoints import writer
from pipeline.training.clock import Clock
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.watchdog import Watchdog
from pipeline.watch import Watch
from sharding.errors import StorageFault, StorageRefused, UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.test_lease import another_driver
from tests.pipeline.trained_run import make_trained_run

FULL = StorageFault("cannot write it: No space left on device", OSError(errno.ENOSPC, "No space left"))
FAULTS = [
    FULL,
    StorageRefused("cannot write it: Permission denied", OSError(errno.EACCES, "Permission denied")),
    UserError("s3://bucket: credentials refused"),
    OSError(errno.EIO, "Input/output error"),
]


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "runs" / "a")


def fail(error: Exception) -> Any:
    def call(*arguments: Any, **options: Any) -> None:
        raise error

    return call


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Disks


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_lease_that_cannot_be_renewed_warns_once_and_beats_again_when_it_can(
    run: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    monkeypatch.setattr(pipeline.lease, "BEAT_S", 0.02)
    beats = lambda: run.read_json("driver/00000001.alive.json")["beats"]  # noqa: E731
    with hold(run) as lease:
        with monkeypatch.context() as patch:
            tried: list[int] = []
            patch.setattr(
                Storage,
                "write_json",
                lambda *arguments: tried.append(1) or fail(fault)(),  # type: ignore[func-returns-value]
            )
            wait_for(lambda: len(tried) > 3)
        before = beats()
        wait_for(lambda: beats() > before + 2)
        assert lease._thread.is_alive()
    assert caplog.text.count("could not be renewed") == 1
    assert caplog.text.count("renewed again") == 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_lease_that_cannot_be_let_go_does_not_hide_why_the_run_ended(
    run: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    def ends() -> None:
        with hold(run):
            monkeypatch.setattr(Storage, "write_json", fail(fault))
            raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        ends()
    assert "could not be let go" in caplog.text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_the_account_and_the_watch_go_on_after_any_fault_of_the_storage(
    run: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    monkeypatch.setattr("pipeline.goodput.records.INTERVAL_S", 0.02)
    monkeypatch.setattr("pipeline.watch._PROGRESS_S", 0.01)
    monkeypatch.setattr("pipeline.watch._CHECKPOINTS_S", 0.0)
    nothing: Any = SimpleNamespace(read=dict)
    looked: list[int] = []

    def look() -> None:
        looked.append(1)
        if len(looked) < 5:
            raise fault

    watch = Watch(nothing, run, nothing, nothing, nothing, nothing)
    monkeypatch.setattr(watch, "look_at_checkpoints", look)
    with LifeRecorder(run) as life, watch:
        wait_for(lambda: read_records(run)[0])
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write_bytes", fail(fault))
            time.sleep(0.1)
        seen = read_records(run)[0][0].seen
        wait_for(lambda: read_records(run)[0][0].seen > seen and len(looked) > 7)
        assert life._thread.is_alive()
    assert caplog.text.count("could not be recorded") == 1
    assert caplog.text.count("could not be looked at") == 1


def test_what_an_evaluation_found_waits_for_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_AGAIN_S", 0.0)
    tries: list[int] = []

    class FullLedger:
        def __init__(self, run: Any) -> None:
            pass

        def finish(self, outcome: str, result: object) -> str:
            tries.append(1)
            if len(tries) < 4:
                raise FULL
            return outcome

    monkeypatch.setattr(actor, "Ledger", FullLedger)
    evaluator = object.__new__(actor.EvaluationActor)
    evaluator._evaluate = lambda assignment: "found"  # type: ignore[assignment, return-value]
    assignment: Any = SimpleNamespace(
        run=None, task=SimpleNamespace(name="t"), outcome=lambda result: f"outcome of {result}"
    )
    assert evaluator.evaluate(assignment) == "outcome of found"
    assert len(tries) == 4


@pytest.mark.parametrize("how", ["save_pretrained", "safetensors", "refused"])
def test_a_full_scratch_disk_is_waited_for_and_then_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from safetensors import SafetensorError

    monkeypatch.setattr(patience, "_AGAIN_S", 0.0)
    error = {
        "save_pretrained": OSError(errno.ENOSPC, "No space left on device"),
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device"),
        "refused": PermissionError(errno.EACCES, "Permission denied"),
    }[how]
    context: Any = SimpleNamespace(rank=0)
    snapshot = writer._Snapshot(4, "checkpoints/step-4", {}, {}, {}, {})
    checkpoints = writer.CheckpointWriter(open_storage(tmp_path / "run"), context, tmp_path / "scratch")
    monkeypatch.setattr(writer, "write_pieces", fail(error))
    monkeypatch.setattr(writer, "_SCRATCH_PATIENCE_S", 0.05)
    with pytest.raises(StorageRefused if how == "refused" else StorageFault) as caught:
        checkpoints._upload(None, snapshot)
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'scratch'}")
    assert "TMPDIR" in message
    assert message.endswith(("No space left on device", "Permission denied"))
    monkeypatch.setattr(writer, "write_pieces", lambda path, *rest: path.write_bytes(b"pieces"))
    assert list(checkpoints._upload(None, snapshot)) == ["state/worker-00000.safetensors"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "error: /data/x: Permission denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/y"),
            "error: /tmp/y: No space left on device",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "error: too many open files: a process may have "),
    ],
)
def test_an_error_of_the_system_ends_the_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, line: str
) -> None:
    monkeypatch.setattr("pipeline.cli._load", fail(error))
    monkeypatch.setattr(sys, "argv", ["glscl", "validate", __file__])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_too_many_open_files_are_told_however_they_show() -> None:
    for error in (
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError(
            "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"
        ),
        RuntimeError("received 0 items of ancdata"),
    ):
        assert "ulimit -n" in str(errors.too_many_files(error))
    assert errors.too_many_files(OSError(errno.ENOSPC, "No space left on device")) is None


def test_a_fault_that_a_loader_process_met_is_told_in_one_line() -> None:
    from torch._utils import ExceptionWrapper

    from pipeline.training.loading import in_one_line

    for fault in (
        FULL,
        UserError("s3://bucket: access denied: check it"),
        StorageFault("s3://a: StorageFault: b"),
    ):
        try:
            raise fault
        except (StorageFault, UserError):
            travels = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(type(fault)) as caught, in_one_line():
            travels.reraise()
        assert str(caught.value) == str(fault)
    with pytest.raises(UserError, match=r"^as it is$"), in_one_line():
        raise UserError("as it is")


# Folders for temporary files


@pytest.mark.parametrize("variable", ["TMPDIR", "TMP"])
def test_a_folder_for_temporary_files_that_cannot_serve_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    scratch.check_scratch()
    monkeypatch.setenv(variable, str(tmp_path))
    scratch.check_scratch()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder, why in (("nothing", "does not exist"), ("file", "is no folder")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
        with pytest.raises(UserError, match=f"{variable}.*{folder}, which {why}"):
            scratch.check_scratch()
    monkeypatch.setenv(variable, str(tmp_path))
    for number, why in (
        (errno.ENOSPC, "No space left"),
        (errno.EROFS, "Read-only"),
        (errno.EACCES, "denied"),
    ):
        monkeypatch.setattr(scratch.tempfile, "TemporaryFile", fail(OSError(number, os.strerror(number))))
        with pytest.raises(UserError, match=f"{variable}.*cannot be written: .*{why}"):
            scratch.check_scratch()


# Copies


def test_a_run_copied_to_another_name_is_refused_in_one_line_whatever_opens_it(tmp_path: Path) -> None:
    made = make_trained_run(tmp_path)
    checkpoint = made.checkpoint(4, tmp_path / "scratch")
    folder = tmp_path / "storage/runs"
    shutil.copytree(folder / "tiny", folder / "tiny-2")
    copy = open_storage(folder / "tiny-2")
    before = copy.read_bytes("run.json")
    for act in (
        lambda: open_run_folder(made.job.model_copy(update={"name": "tiny-2"}), made.root, {}),
        lambda: load_run_job(copy.url),
        lambda: find_run(copy.url),
        lambda: find_run(copy.url_of(checkpoint.path)),
    ):
        with pytest.raises(UserError) as caught:
            act()
        message = str(caught.value)
        assert "runs/tiny-2 holds the run 'tiny' (run.json), not 'tiny-2'" in message
        assert "copied or renamed" in message
        assert "\n" not in message
    assert copy.read_bytes("run.json") == before
    assert open_run_folder(made.job, made.root, {}).key.startswith("tiny-")
    # Moved, or copied as a whole storage, it is the run it was.
    shutil.copytree(tmp_path / "storage", tmp_path / "moved")
    there = open_run_folder(made.job, open_storage(tmp_path / "moved"), {})
    assert there.key == open_run_folder(made.job, made.root, {}).key
    # What the documents say about branching off.
    (folder / "tiny-2/run.json").unlink()
    branch = open_run_folder(made.job.model_copy(update={"name": "tiny-2"}), made.root, {})
    assert branch.key.startswith("tiny-2-")
    assert branch.tracking_run is None


_COPY = """
import sys
from pipeline.scratch import only_copy
from sharding.storage import open_storage
with only_copy(sys.argv[1], open_storage(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_of_two_copies_of_a_storage_one_is_trained_at_a_time_on_a_machine(tmp_path: Path) -> None:
    first, second = (open_storage(tmp_path / name / "runs/a") for name in ("one", "two"))
    key = f"a-{os.getpid()}"
    assert scratch.scratch_folder(key, first) != scratch.scratch_folder(key, second)
    assert scratch.scratch_folder(key, first) == scratch.scratch_folder(key, open_storage(first.url))
    process = subprocess.Popen(
        [sys.executable, "-c", _COPY, key, first.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, scratch.only_copy(key, second):
            pass
        message = str(caught.value)
        assert f"{second.url} is a copy of a run that is being trained now" in message
        assert f"({first.url}, by process {process.pid})" in message
        with scratch.only_copy(f"{key}-other", second):
            pass
    finally:
        process.kill()
        process.wait()
    for _ in range(2):  # killed, or ended in good order: it binds nobody
        with scratch.only_copy(key, second):
            pass


def test_a_link_where_the_lock_is_to_be_is_refused_and_what_it_leads_to_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    mine.write_text("what I wrote")
    lock = tmp_path / f"glscl-a-{os.getuid()}.lock"
    lock.symlink_to(mine)
    with (
        pytest.raises(UserError, match=r"glscl-a-.*\.lock \(below TMPDIR\) is a link: remove it") as caught,
        scratch.only_copy("a", open_storage(tmp_path / "runs/a")),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert mine.read_text() == "what I wrote"


# Clocks


class SetClock:
    """``time.time`` as it is after the clock was set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        true, true_ns, created = time.time, time.time_ns, psutil.Process.create_time
        monkeypatch.setattr(time, "time", lambda: true() + self.ahead)
        monkeypatch.setattr(time, "time_ns", lambda: true_ns() + int(self.ahead * 1e9))
        # The kernel tells when it booted by the present clock.
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + self.ahead)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    return SetClock(monkeypatch)


@pytest.mark.parametrize("ahead", [3600.0, -20 * 365 * 86400.0])
def test_a_living_driver_is_not_taken_for_dead_when_the_clock_is_set(
    run: Storage, clock: SetClock, ahead: float
) -> None:
    with another_driver(run):
        clock.ahead = ahead
        with pytest.raises(UserError, match="is being run by process"), hold(run):
            pass


def test_an_account_is_of_the_time_that_passed_however_often_the_clock_is_set(
    tmp_path: Path, clock: SetClock
) -> None:
    run = open_storage(tmp_path)
    began = time.monotonic()
    for ahead in (0.0, 3600.0, -3600.0, 20 * 365 * 86400.0, -20 * 365 * 86400.0):
        clock.ahead += ahead
        with LifeRecorder(run) as life, AttemptRecorder(run, 1) as recorder:
            for step in (1, 2):
                with recorder.step(step):
                    time.sleep(0.01)
                clock.ahead -= 5400.0
            life.evaluating()
            time.sleep(0.01)
    lives, attempts = read_records(run)
    assert (len(lives), len(attempts)) == (5, 5)
    found = account(lives, attempts)
    assert found is not None
    assert found.wall <= time.monotonic() - began + 1e-3
    assert found.seconds["compute"] >= 0.02
    assert found.seconds["redone"] >= 4 * 0.02
    assert found.seconds["down"] < 1
    in_order = sorted(lives, key=lambda life: life.began)
    assert all(one.seen <= other.began for one, other in itertools.pairwise(in_order))


MOMENT = st.floats(-4e9, 4e9) | st.floats(0, 100)
SPAN = st.tuples(MOMENT, st.floats(0, 1e6))
CAUSE = st.sampled_from(["compute", "data", "redone", "start", "checkpoint"])


@given(
    st.lists(st.tuples(SPAN, st.none() | st.floats(0, 1e6)), max_size=5),
    st.lists(st.tuples(SPAN, st.dictionaries(CAUSE, st.floats(0, 1e5))), min_size=1, max_size=5),
)
def test_shares_are_shares_whatever_clocks_of_other_machines_say(lives: Any, attempts: Any) -> None:
    found = account(
        [Life(at, at + long, None if waits is None else at + waits) for (at, long), waits in lives],
        [Attempt(at, at + long, seconds, 1, step=1) for (at, long), seconds in attempts],
    )
    assert found is not None
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert math.isclose(found.wall, sum(found.seconds.values()))
    assert 0.0 <= found.goodput <= 1.0
    spent = sum(seconds.get("compute", 0.0) for _, seconds in attempts)
    assert math.isclose(found.seconds["compute"], spent)
    moments = [at for (at, _), _ in [*lives, *attempts]]
    ends = [at + long for (at, long), _ in [*lives, *attempts]]
    own = sum(max(long, sum(seconds.values())) for (_, long), seconds in attempts)
    assert found.wall <= max(ends) - min(moments) + own + 1.0


def test_which_workers_stand_is_told_by_one_clock(tmp_path: Path, clock: SetClock) -> None:
    asked: list[float] = []

    class Board:
        def read(self, *, within_s: float) -> dict[str, Any]:
            asked.append(within_s)
            return {"standing/1": {**vars(mine), "rank": 1, "phase": "data"}}

    context: Any = SimpleNamespace(rank=0, node_rank=0, world_size=2)
    board: Any = Board()
    dog = Watchdog(HealthBlock(hang_s=10.0), Clock(), context, open_storage(tmp_path), board, print)
    clock.ahead = -7200.0
    moment: Any = SimpleNamespace(step=3, phase="optimizer", since=time.monotonic() - 11, long=False)
    mine = dog._look(moment)
    assert mine is not None
    assert [one.rank for one in dog._standing(mine)] == [0, 1]
    assert asked == [3 * 1.0 + 20.0]


def test_metrics_that_could_not_be_delivered_are_sent_in_the_order_of_their_steps_however_the_clock_is_set(
    tmp_path: Path, clock: SetClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.tracking.config import TrackingConfig
    from pipeline.tracking.logger import MetricLogger

    spool = open_storage(tmp_path / "tracking")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", flush_s=0.05, system_s=1e9)
    away = ConnectionError("away")
    monkeypatch.setattr(MetricLogger, "_connected", fail(away))
    for life in (range(1, 41), range(21, 61)):  # the second began at an older checkpoint
        logger = MetricLogger(config, "key", run_id="id", spool=spool)
        for step in life:
            logger.log(step, {"loss": float(step)})
            if step % 10 == 0:
                clock.ahead -= 3600.0
                assert not logger.flush(0.0)
        assert logger.close(0.0)
    sent: list[int] = []

    class Client:
        def get_run(self, run_id: str) -> Any:
            data = SimpleNamespace(metrics=[])
            return SimpleNamespace(to_proto=lambda: SimpleNamespace(data=data))

        def log_batch(self, run_id: str, metrics: Any) -> None:
            sent.extend(metric.step for metric in metrics)

    monkeypatch.undo()
    monkeypatch.setattr("pipeline.tracking.logger.connect", lambda config: Client())
    assert MetricLogger(config, "key", run_id="id", spool=spool).close(30.0) == 0
    assert sent == list(range(1, 61))
    assert list(spool.list()) == []


@pytest.mark.parametrize("full", [False, True])
def test_metrics_that_a_slow_disk_takes_are_not_counted_as_lost_and_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    from pipeline.tracking.config import TrackingConfig
    from pipeline.tracking.logger import MetricLogger

    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", buffered=1000, flush_s=1e6, system_s=1e9)
    logger = MetricLogger(config, "key", run_id="id", spool=open_storage(tmp_path / "tracking"))
    monkeypatch.setattr(MetricLogger, "_connected", fail(ConnectionError("away")))
    for step in range(400):
        logger.log(step, {"loss": 1.0})
    write = Storage.write_bytes

    def slowly(*arguments: Any) -> None:
        for step in range(400, 1200):  # 200 more than there is room for
            logger.log(step, {"loss": 1.0})
        monkeypatch.setattr(Storage, "write_bytes", write)
        fail(FULL)() if full else write(*arguments)

    monkeypatch.setattr(Storage, "write_bytes", slowly)
    monkeypatch.setattr(logger._wake, "set", lambda: None)  # no other spills meanwhile
    logger._spill()
    assert logger._dropped == (200 if full else 0)
    assert [row.step for row in logger._rows] == list(range(200 if full else 400, 1200))
    assert logger._points == len(logger._rows)
    monkeypatch.undo()


def test_a_request_refused_for_a_wrong_clock_is_made_again() -> None:
    from botocore.exceptions import ClientError

    from sharding.storage_s3 import _understand

    answer: Any = {"Error": {"Code": "RequestTimeTooSkewed"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    assert _understand(ClientError(answer, "PutObject")).transient


def test_a_run_that_was_moved_or_copied_is_told_of_in_mlflows_log(caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.tracking.runs import _tell_of_move

    known: Any = SimpleNamespace(data=SimpleNamespace(tags={"storage": "file:///old/runs/a"}))
    with caplog.at_level(logging.WARNING):
        _tell_of_move(known, {"storage": "file:///old/runs/a"})
        assert caplog.text == ""
        _tell_of_move(known, {"storage": "file:///new/runs/a"})
    assert "file:///old/runs/a" in caplog.text
    assert "file:///new/runs/a" in caplog.text
