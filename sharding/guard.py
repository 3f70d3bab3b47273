"""Decoding in a process of its own, so that a hanging or crashing decoder costs an input and not the task.

A ``Guard`` owns one child (``sharding.guarded``), kept over all inputs of a task and over the tasks of a worker
process. The child gets inputs through a socket and works on them in their order, while the parent fetches the
next ones and writes the former; what comes back is framed bytes and JSON, checked, never unpickled::

    parent   look 1  look 2  make 1  look 3  make 2 ...        several inputs are on their way
    child            header 1  header 2  part 1  header 3  part 2 ...

Between the header and the making the parent is asked whether it wants the input: that is where filters run. Who
asks nothing saves the question.

What ends a child condemns no input: it may have been killed from outside, or starved. The input it was working on
is tried again, alone, in a fresh child; if that one ends too, the input is bad data, by one of these causes:

* ``decode-timeout``: it used ``timeout_s`` of CPU time for one header or one part (so that a loaded machine does
  not condemn what an idle one keeps), or four times as long by the clock;
* ``decode-crashed``: its process died (the signal is in the detail), or answered nonsense;
* ``decode-memory``: it asked for more than ``memory_mb``.

The child knows no credentials (its environment is a short list of names), dies with its parent, and is the first
that the kernel takes when memory runs out.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from sharding import guarded
from sharding.errors import BadData

Part = tuple[dict[str, Any], bytes]
# Called with what the header says; raises BadData where the input is not wanted.
Wanted = Callable[[dict[str, Any]], None]

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "HOME", "PYTHONHOME")
# glibc gives large blocks back to the kernel at once, and each image then pays for its pages again: a third more
# time for a small JPEG.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
_START_S = 120.0
_STARTS = 5
_BLOCK = 1 << 18
_MAX_FACTS = 1 << 20
# A part is a stored image or clip; more than this is nonsense.
_MAX_DATA = 1 << 32
# Requests that the child has not answered: enough that it never waits, few enough for the socket's buffer.
_AHEAD = 3
# By the clock, an input may take so many times what it may take of CPU time.
_PATIENCE = 4


class DecoderBug(RuntimeError):
    """The decoder raised what is neither bad data nor a shortage. The message holds the child's traceback."""


@dataclass(eq=False)
class Job:
    """One input on its way. ``done``: ``parts`` are all there, or ``fault`` says why there are none."""

    number: int
    data: bytes
    wanted: Wanted | None
    parts: list[Part] = field(default_factory=list)
    fault: BadData | None = None
    done: bool = False
    accepted: bool = False
    deaths: int = 0

    def finish(self, fault: BadData | None = None) -> None:
        self.fault, self.done, self.data = fault, True, b""
        if fault is not None:
            self.parts.clear()


class Guard:
    """One decoding child and the inputs that are on their way to it. For one thread, which must outlive it.

    Args:
        decoder: ``"package.module:Class"`` of a ``guarded.Decoder``, imported in the child only.
        settings: keyword arguments of that class, as JSON holds them.
        timeout_s: CPU seconds for one header or one part.
        memory_mb: private memory of the child (RLIMIT_DATA) beyond that of its libraries, what it holds of waiting
            inputs included.
    """

    def __init__(self, decoder: str, settings: dict[str, Any], *, timeout_s: float, memory_mb: float) -> None:
        self._setup = {
            "decoder": decoder, "settings": settings, "memory_bytes": int(memory_mb * 2**20)
        }  # fmt: skip
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._child: _Child | None = None
        self._numbers = 0
        self._waiting: deque[Job] = deque()  # not sent yet
        self._sent: deque[tuple[Job, int]] = deque()  # (job, verb) of what the child has not answered yet
        self._suspect: Job | None = None  # runs alone in a fresh child

    @property
    def pid(self) -> int | None:
        """The child's, while there is one."""
        return None if self._child is None else self._child.process.pid

    def submit(self, data: bytes, wanted: Wanted | None) -> Job:
        """Send an input on its way. The order of submission is the order of finishing.

        Args:
            wanted: is asked once about the input's header; ``None``: it is decoded whatever its header says.
        """
        self._numbers += 1
        job = Job(self._numbers, data, wanted)
        self._waiting.append(job)
        self._exchange(block=False)
        return job

    def result(self, job: Job) -> list[Part]:
        """Wait for a job.

        Raises:
            BadData: what the decoder or ``wanted`` said, or one of the causes above.
            DecoderBug: the decoder has a bug, or its process cannot be started.
        """
        while not job.done:
            if job not in self._waiting and all(job is not sent for sent, _ in self._sent):
                raise RuntimeError("the guard was closed before the job was done")
            self._exchange(block=True)
        if job.fault is not None:
            raise job.fault
        return job.parts

    def close(self) -> None:
        """End the child. Jobs that are not done are forgotten; the guard can be used again."""
        self._waiting.clear()
        self._sent.clear()
        self._suspect = None
        self._end_child()

    @property
    def busy(self) -> bool:
        """Whether jobs are on their way."""
        return bool(self._waiting or self._sent)

    # ------------------------------------------------------------ the conversation

    def _exchange(self, block: bool) -> None:
        """Send what can be sent and take what has come; with ``block``, wait until something has come."""
        if self._child is not None and not self._sent and self._child.process.poll() is not None:
            self._end_child()  # it ended while it had nothing to do
        if self._child is None:
            self._child = self._started()
        child = self._child
        try:
            self._feed(child)
            came = child.transfer(min(1.0, self._timeout_s / 4) if block else 0.0)
            for reply in child.replies():
                self._take(*reply)
            if child.ended:
                raise _Ended("decode-crashed")
            self._feed(child)
            child.write()
            if block and not came:
                self._judge(child)
        except _Ended as end:
            self._bury(end.cause, end.detail)

    def _feed(self, child: _Child) -> None:
        while self._waiting and self._suspect is None and len(self._sent) < _AHEAD:
            job = self._waiting.popleft()
            if job.deaths:
                self._suspect = job
            verb = guarded.MAKE if job.wanted is None else guarded.LOOK
            child.send(verb, job.number, job.data)
            self._sent.append((job, verb))

    def _take(self, kind: int, number: int, facts: dict[str, Any], data: bytes) -> None:
        child = self._child
        assert child is not None
        if not self._sent or self._sent[0][0].number != number:
            raise _Ended("decode-crashed", "its process answered out of turn")
        child.started_on = None
        job, verb = self._sent[0]
        if kind == guarded.PART and verb == guarded.MAKE:
            job.parts.append((facts, data))
            return
        if kind == guarded.MEMORY:
            raise _Ended("decode-memory", f"it needs more than {self._memory_mb:g} MiB")
        self._sent.popleft()
        if kind == guarded.HEADER and verb == guarded.LOOK:
            self._decide(child, job, facts)
        elif kind == guarded.DONE and verb == guarded.MAKE:
            if facts:
                job.parts.append((facts, data))
            self._finish(job)
        elif kind == guarded.BAD:
            self._finish(job, BadData(str(facts.get("cause")), str(facts.get("detail"))))
        elif kind == guarded.BUG:
            self.close()
            raise DecoderBug(str(facts.get("traceback")))
        else:
            self._sent.appendleft((job, verb))
            raise _Ended("decode-crashed", "its process answered nonsense")

    def _decide(self, child: _Child, job: Job, facts: dict[str, Any]) -> None:
        try:
            if not job.accepted and job.wanted is not None:
                job.wanted(facts)
        except BadData as fault:
            child.send(guarded.DROP, job.number)
            self._finish(job, fault)
            return
        job.accepted = True
        child.send(guarded.MAKE, job.number)
        self._sent.append((job, guarded.MAKE))

    def _finish(self, job: Job, fault: BadData | None = None) -> None:
        job.finish(fault)
        if job is self._suspect:
            self._suspect = None

    def _judge(self, child: _Child) -> None:
        """End a child that is silent for too long."""
        if not self._sent:
            return
        clock, used = time.monotonic(), child.cpu_seconds()
        if child.started_on is None:
            child.started_on = (clock, used)
            return
        since, before = child.started_on
        if used - before >= self._timeout_s:
            raise _Ended("decode-timeout", f"it takes more than {self._timeout_s:g} s of CPU time")
        if clock - since >= _PATIENCE * self._timeout_s:
            raise _Ended("decode-timeout", f"no answer in {_PATIENCE * self._timeout_s:g} s")

    # ------------------------------------------------------------ the child's end

    def _bury(self, cause: str, detail: str) -> None:
        """Blame the input that the ended child was working on, and send all that are not done again."""
        status = self._end_child()
        if cause == "decode-crashed" and not detail:
            detail = f"its process ended by {status}"
        pending = {job.number: job for job, _ in self._sent if not job.done}
        blamed = self._sent[0][0] if self._sent else None
        self._sent.clear()
        self._suspect = None
        for job in pending.values():
            job.parts.clear()
        if blamed is not None:
            del pending[blamed.number]
            blamed.deaths += 1
            if blamed.deaths > 1:
                blamed.finish(BadData(cause, detail))
        again = sorted(pending.values(), key=lambda job: job.number)
        if blamed is not None and not blamed.done:
            again.insert(0, blamed)
        self._waiting.extendleft(reversed(again))

    def _started(self) -> _Child:
        for _ in range(_STARTS):
            child = _Child(self._setup)
            try:
                child.wait_until_ready()
            except _Ended as end:
                status = child.end()
                problem = end.detail or f"it ended by {status}"
            else:
                return child
        raise DecoderBug(f"the decoding process does not start: {problem}; its own words are in the log")

    def _end_child(self) -> str:
        child, self._child = self._child, None
        return "" if child is None else child.end()


class _Ended(Exception):
    """The child is gone, or has to go."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail


class _Child:
    """The process and its socket: bytes out, replies in."""

    def __init__(self, setup: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        # Libraries warn of each odd file; what matters of it comes back as bad data.
        options = ["-P", "-W", "ignore", "-m", "sharding.guarded"]
        command = [sys.executable, *options, str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )
        ours.setblocking(False)
        self._socket = ours
        self._poll = select.poll()
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._block = memoryview(bytearray(_BLOCK))
        self.ended = False  # it closed its end; what came before is in ``replies``
        self._statistics = psutil.Process(self.process.pid)
        # (clock, CPU seconds) when the parent first waited in vain for the answer that is due.
        self.started_on: tuple[float, float] | None = None
        self.send(guarded.LOOK, 0, json.dumps(setup).encode())

    def send(self, verb: int, number: int, data: bytes = b"") -> None:
        self._outgoing.append(memoryview(guarded.REQUEST.pack(verb, number, len(data))))
        if data:
            self._outgoing.append(memoryview(data))

    def transfer(self, timeout_s: float) -> bool:
        """Write what can be written, and read once; waits up to ``timeout_s``. Whether anything came."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.write()
            left = max(0.0, deadline - time.monotonic())
            self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
            events = self._poll.poll(left * 1000)
            if not events:
                return False
            if events[0][1] & ~select.POLLOUT:
                return self._read()
            if not timeout_s:
                return False

    def write(self) -> None:
        try:
            while self._outgoing:
                sent = self._socket.sendmsg(list(self._outgoing)[:16])
                while sent:
                    first = self._outgoing[0]
                    if sent < len(first):
                        self._outgoing[0] = first[sent:]
                        break
                    sent -= len(first)
                    self._outgoing.popleft()
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._outgoing.clear()  # what it answered before its end is still to be read

    def _read(self) -> bool:
        try:
            count = self._socket.recv_into(self._block)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            count = 0
        self.ended = count == 0
        self._incoming += self._block[:count]
        return True

    def replies(self) -> list[tuple[int, int, dict[str, Any], bytes]]:
        """The whole replies among what was read: kind, number, facts, data."""
        found, start = [], 0
        whole = memoryview(self._incoming)
        while len(whole) - start >= guarded.REPLY.size:
            kind, number, facts_size, data_size = guarded.REPLY.unpack_from(whole, start)
            if facts_size > _MAX_FACTS or data_size > _MAX_DATA:
                raise _Ended("decode-crashed", "its process answered nonsense")
            facts_at = start + guarded.REPLY.size
            data_at = facts_at + facts_size
            if len(whole) < data_at + data_size:
                break
            facts = _facts(bytes(whole[facts_at:data_at]))
            found.append((kind, number, facts, bytes(whole[data_at : data_at + data_size])))
            start = data_at + data_size
        whole.release()
        del self._incoming[:start]
        return found

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            self.transfer(1.0)
            for kind, *_ in self.replies():
                assert kind == guarded.READY
                return
            if self.ended:
                raise _Ended("decode-crashed")
        raise _Ended("decode-timeout", f"it is not ready after {_START_S:g} s")

    def cpu_seconds(self) -> float:
        try:
            times = self._statistics.cpu_times()
        except psutil.NoSuchProcess:
            raise _Ended("decode-crashed") from None
        return times.user + times.system

    def end(self) -> str:
        """Kill it; how it ended, in words."""
        self._socket.close()
        status = self.process.poll()
        if status is None:
            # Its end of the socket closes a moment before the process is gone: a long one where others are busy.
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(timeout=2.0 if self.ended else 0.05)
        self.process.kill()
        self.process.wait()
        if status is None:
            return "being stopped"
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _facts(text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise _Ended("decode-crashed", "its process answered nonsense")
    return facts


def _environment() -> dict[str, str]:
    """The child's: where its modules are, one thread, and no credentials."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return kept | _ALLOCATOR | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# decoder: (its arguments, guard)
_shared: dict[str, tuple[str, Guard]] = {}


def shared_guard(decoder: str, settings: dict[str, Any], *, timeout_s: float, memory_mb: float) -> Guard:
    """The guard of this process for these arguments: kept, so that the next task finds its child running.

    One a decoder: other arguments end the one before.
    """
    key = json.dumps([settings, timeout_s, memory_mb], sort_keys=True)
    kept = _shared.get(decoder)
    if kept is not None and kept[0] == key:
        return kept[1]
    if kept is not None:
        kept[1].close()
    guard = Guard(decoder, settings, timeout_s=timeout_s, memory_mb=memory_mb)
    _shared[decoder] = key, guard
    return guard


@atexit.register
def _close_shared() -> None:
    for _, guard in _shared.values():
        guard.close()
