"""Promises of the guard: whatever a decoder does costs one input, and what happens to its process costs none."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sharding.errors import BadData
from sharding.guard import DecoderBug, Guard, Part, shared_guard

DECODER = "tests.sharding.decoders:Misbehaving"


def _any(facts: dict) -> None:
    """Want every input."""


@pytest.fixture(params=[_any, None], ids=["asked", "unasked"])
def wanted(request: pytest.FixtureRequest):
    """What is submitted with an input: a question about its header, or none."""
    return request.param


def _guard(timeout_s: float = 30, memory_mb: float = 1024) -> Guard:
    return Guard(DECODER, {"name": "it"}, timeout_s=timeout_s, memory_mb=memory_mb)


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = _guard()
    yield guard
    guard.close()


@pytest.fixture
def hasty() -> Iterator[Guard]:
    guard = _guard(timeout_s=0.2, memory_mb=512)
    yield guard
    guard.close()


def _outcome(guard: Guard, data: bytes, wanted=_any) -> list[Part] | str:
    try:
        return guard.result(guard.submit(data, wanted))
    except BadData as fault:
        return fault.cause


def _outcomes(guard: Guard, inputs: list[bytes], wanted=_any) -> list[list[Part] | str]:
    """Of all inputs, submitted together."""
    outcomes: list[list[Part] | str] = []
    for job in [guard.submit(data, wanted) for data in inputs]:
        try:
            outcomes.append(guard.result(job))
        except BadData as fault:
            outcomes.append(fault.cause)
    return outcomes


def _good(data: bytes) -> list[Part]:
    return [({"size": len(data)}, data[::-1])]


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_many_inputs_on_their_way_are_answered_in_their_order(guard, wanted):
    inputs = [b"input %d" % number + bytes(number * 5000) for number in range(60)]
    assert _outcomes(guard, inputs, wanted) == [_good(data) for data in inputs]


def test_inputs_and_parts_larger_than_any_socket_buffer_pass(guard, wanted):
    inputs = [bytes([65 + number]) * 8_000_000 for number in range(4)]
    assert _outcomes(guard, inputs, wanted) == [_good(data) for data in inputs]
    parts = _outcome(guard, b"many 9", wanted)
    assert [(facts["part"], len(data), data[0]) for facts, data in parts] == [
        (number, 1_000_000, number) for number in range(9)
    ]


def test_an_unwanted_input_is_not_decoded_and_the_header_is_asked_about_once(guard, tmp_path):
    marker = tmp_path / "decoded"
    seen = []

    def refuse(facts):
        seen.append(facts)
        raise BadData("too-small", "5 pixels")

    assert _outcome(guard, f"crash-once {marker}".encode(), refuse) == "too-small"
    assert [facts["name"] for facts in seen] == ["it"]
    assert _outcome(guard, b"next") == _good(b"next")
    assert not marker.exists()


def test_bad_data_in_header_or_pixels_is_told_with_its_cause_and_costs_no_process(guard):
    assert _outcome(guard, b"good") == _good(b"good")
    pid = guard.pid
    assert _outcomes(guard, [b"bad-header", b"bad", b"good"]) == [
        "decode-failed", "decode-failed", _good(b"good"),
    ]  # fmt: skip
    assert guard.pid == pid


def test_an_input_that_nobody_asks_about_is_decoded_without_its_header(guard):
    """The header of ``bad-header`` cannot be read, and its parts can."""
    assert _outcome(guard, b"bad-header", None) == _good(b"bad-header")
    assert _outcomes(guard, [b"good", b"bad", b"next"], None) == [
        _good(b"good"), "decode-failed", _good(b"next"),
    ]  # fmt: skip


@pytest.mark.parametrize("data", [b"crash", b"exit"])
def test_a_crashing_input_that_nobody_asks_about_costs_itself_only(guard, data):
    inputs = [b"one", b"two", data, b"three", b"four"]
    expected = [_good(item) for item in inputs]
    expected[2] = "decode-crashed"
    assert _outcomes(guard, inputs, None) == expected


@pytest.mark.parametrize("data", [b"crash", b"header-crash", b"exit"])
def test_a_crashing_input_costs_itself_and_none_of_those_around_it(guard, data):
    inputs = [b"one", b"two", data, b"three", b"four"]
    expected = [_good(item) for item in inputs]
    expected[2] = "decode-crashed"
    assert _outcomes(guard, inputs) == expected


@pytest.mark.parametrize("byte", [0, 5, 255])
def test_a_child_that_answers_nonsense_is_not_believed(guard, byte, wanted):
    assert _outcomes(guard, [b"one", b"garbage %d" % byte, b"two"], wanted) == [
        _good(b"one"), "decode-crashed", _good(b"two"),
    ]  # fmt: skip


def test_the_signal_of_a_crash_is_named(guard):
    with pytest.raises(BadData, match="SIGSEGV"):
        guard.result(guard.submit(b"crash", _any))
    with pytest.raises(BadData, match="exit status 3"):
        guard.result(guard.submit(b"exit", _any))


@pytest.mark.parametrize("data", [b"sleep 600", b"spin"])
def test_a_hanging_input_is_given_up_and_the_next_ones_are_decoded(hasty, data, wanted):
    inputs = [b"one", data, b"two", b"three"]
    assert _outcomes(hasty, inputs, wanted) == [
        _good(b"one"),
        "decode-timeout",
        _good(b"two"),
        _good(b"three"),
    ]


def test_time_is_allowed_for_each_part_and_while_nobody_waits(hasty):
    job = hasty.submit(b"sleep 0.3", _any)
    time.sleep(1.5)  # more than four times the limit, in which the parent did other things
    assert hasty.result(job) == _good(b"sleep 0.3")


def test_an_input_that_needs_too_much_memory_is_dropped_as_that(hasty):
    assert _outcomes(hasty, [b"one", b"allocate 700", b"allocate 100"]) == [
        _good(b"one"), "decode-memory", _good(b"allocate 100"),
    ]  # fmt: skip


def test_an_input_whose_process_was_killed_once_gives_what_it_always_gives(guard, tmp_path, wanted):
    data = f"crash-once {tmp_path / 'killed'}".encode()
    inputs = [b"one", data, b"two"]
    first = _outcomes(guard, inputs, wanted)
    assert (tmp_path / "killed").exists()
    assert first == _outcomes(guard, inputs, wanted)
    assert len(first[1]) == 3


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_process_that_is_killed_or_stopped_from_outside_condemns_no_input(hasty, sent):
    assert _outcome(hasty, b"first") == _good(b"first")
    before = hasty.pid
    os.kill(before, sent)  # idle
    assert _outcome(hasty, b"second") == _good(b"second")
    job = hasty.submit(b"sleep 0.4", _any)
    after = hasty.submit(b"sleep 0.1", _any)
    os.kill(hasty.pid, sent)  # at work
    assert hasty.result(job) == _good(b"sleep 0.4")
    assert hasty.result(after) == _good(b"sleep 0.1")
    assert hasty.pid != before
    assert _gone(before)


def test_an_input_that_was_starved_once_is_tried_again(hasty, tmp_path):
    data = f"sleep-once {tmp_path / 'slept'}".encode()
    assert _outcome(hasty, data) == _good(data)
    assert (tmp_path / "slept").exists()


def test_a_bug_of_the_decoder_is_raised_with_its_traceback(guard):
    with pytest.raises(DecoderBug, match=r"decoders\.py(.|\n)*KeyError: 'nonsense'"):
        guard.result(guard.submit(b"bug", _any))
    assert _outcome(guard, b"next") == _good(b"next")


def test_a_decoder_that_cannot_be_loaded_is_an_error_and_not_bad_data():
    with pytest.raises(DecoderBug, match="does not start: it ended by exit status 1"):
        Guard("tests.sharding.nowhere:Decoder", {}, timeout_s=1, memory_mb=512).submit(b"x", _any)


def test_the_child_knows_no_credentials_and_keeps_its_cpus(guard, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hidden")
    ((facts, _),) = _outcome(guard, b"environment")
    assert "hidden" not in facts["environment"].values()
    assert "PATH" in facts["environment"]
    ((facts, _),) = _outcome(guard, b"affinity")
    assert facts["cpus"] == sorted(os.sched_getaffinity(0))


def test_the_child_loads_the_decoder_and_little_else(guard):
    source = "import sharding.guarded, sharding.media.worker, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.split()
    assert not {"ray", "torch", "pyarrow", "pandas", "transformers"} & set(loaded)


def test_closing_ends_the_child_and_the_guard_can_be_used_again(guard):
    job = guard.submit(b"sleep 600", _any)
    pid = guard.pid
    assert guard.busy
    guard.close()
    assert _gone(pid)
    assert not guard.busy
    with pytest.raises(RuntimeError, match="closed"):
        guard.result(job)
    assert _outcome(guard, b"again") == _good(b"again")


def test_tasks_of_one_process_share_a_child_until_another_configuration_comes():
    options = {"timeout_s": 30, "memory_mb": 512}
    first = shared_guard(DECODER, {"name": "a"}, **options)
    assert _outcome(first, b"x") == _good(b"x")
    pid = first.pid
    again = shared_guard(DECODER, {"name": "a"}, **options)
    assert (again.pid, _outcome(again, b"y")) == (pid, _good(b"y"))
    other = shared_guard(DECODER, {"name": "b"}, **options)
    assert _outcome(other, b"z") == _good(b"z")
    assert _gone(pid)
    other.close()


ORPHANS = """
import time
from sharding.guard import Guard
guard = Guard({decoder!r}, {{"name": "it"}}, timeout_s=600, memory_mb=512)
guard.result(guard.submit(b"first", lambda facts: None))
job = guard.submit({data!r}, lambda facts: None)
print(guard.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("data", [b"header-spin", b"header-sleep"])
def test_a_parent_that_is_killed_leaves_no_orphan_even_one_that_hangs(data):
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS.format(decoder=DECODER, data=data)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.Process(child).ppid() == parent.pid
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while not _gone(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
