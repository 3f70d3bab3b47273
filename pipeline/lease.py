"""One driver at a time on a run: a lease in the run's storage, so that two never train into one folder.

Layout, below the run's folder::

    driver/00000003.json        who took the run: host, process, since when. Created exclusively, then never touched
    driver/00000003.alive.json  the beats of its heart, and at the end that it has let go

The lease with the highest number holds. No number is ever given out twice: a look at the folder is not a moment
in time, and one that missed the newest lease, or was overtaken by other drivers, must find the number taken that
it goes for. That is why the records stay, one small file for each start of the run.

Whoever wants the run creates the next number, which only one can, and only where the holder has let go or is gone:
on the same machine the process tells that at once; of another machine only its silence does, which is measured here
and not by its clock. A driver that was itself taken for dead (its machine slept, the storage was away) finds the
higher number and ends. Workers that outlive their driver look before they write a checkpoint (:class:`Fence`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline.boot import started_s
from pipeline.errors import RunTakenOver
from sharding.errors import UserError
from sharding.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "driver"
BEAT_S = 5.0
SILENCE_S = 30.0  # of another machine's driver, after which it is taken for dead
_CLOCK_S = 2.0  # by which the start of the same process may seem to differ, where the clock tells it
_LEASE = re.compile(rf"^{FOLDER}/(\d{{8}})\.json$")
_HEART = re.compile(rf"^{FOLDER}/(\d{{8}})\.alive\.json$")


@dataclass(frozen=True)
class Fence:
    """Which lease a training belongs to; travels to the workers."""

    run: Storage
    number: int

    def check(self) -> None:
        """Before something is written that a later driver might write too.

        Raises:
            RunTakenOver: there is a later driver.
        """
        if _newest(self.run) != self.number:
            raise RunTakenOver(
                f"{self.run.url}: another driver has taken the run over; this one writes no more"
            )


class Lease:
    """What the driver of a run holds; made by :func:`hold`."""

    def __init__(self, run: Storage, number: int) -> None:
        self.fence = Fence(run, number)
        self._run, self._alive = run, f"{FOLDER}/{number:08d}.alive.json"
        self._number, self._beats = number, 0
        self._lost = ""  # why, once it is
        self._told: Callable[[str], None] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._beat()
        self._thread.start()

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Who is to be told, from another thread, when somebody has taken the run over."""
        self._told = callback
        if self._lost:
            callback(self._lost)

    def let_go(self) -> None:
        """The run is free for the next driver."""
        self._over.set()
        self._thread.join()
        if self._lost:
            return
        try:
            self._write(released=True)
        except (OSError, UserError) as error:  # why the run ended is what counts, whatever becomes of this
            logger.warning("the run could not be let go, the next driver will look for this one: %s", error)

    def _beat_on(self) -> None:
        missed = False
        while not self._over.wait(BEAT_S):
            try:
                self.fence.check()
                self._beat()
                if missed:
                    logger.warning("the run's lease is renewed again")
                missed = False
            except RunTakenOver as error:
                self._lost = str(error)
                if self._told is not None:
                    self._told(self._lost)
                return
            except (OSError, UserError) as error:  # also where the storage refuses: credentials may come back
                if not missed:
                    logger.warning(
                        "the run's lease could not be renewed, tried every %g s: %s", BEAT_S, error
                    )
                missed = True

    def _beat(self) -> None:
        self._beats += 1
        self._write(released=False)

    def _write(self, *, released: bool) -> None:
        self._run.write_json(self._alive, {"beats": self._beats, "released": released})


@contextmanager
def hold(run: Storage, *, silence_s: float = SILENCE_S) -> Iterator[Lease]:
    """The run's lease for the time of a ``with`` block.

    Args:
        run: the run's folder.
        silence_s: how long the beats of a holder on another machine are waited for.

    Raises:
        UserError: another driver lives; names it.
    """
    lease = Lease(run, _take(run, silence_s))
    try:
        yield lease
    finally:
        lease.let_go()


def _take(run: Storage, silence_s: float) -> int:
    number = _newest(run)
    if number is not None:
        record = _read(run, f"{FOLDER}/{number:08d}.json")
        if {"host", "machine", "pid", "since"} <= set(record) and _lives(run, number, record, silence_s):
            raise UserError(_refusal(run, record))
    following = (number or 0) + 1
    mine = {
        "owner": secrets.token_hex(16),
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started_s": started_s(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if not run.create_exclusive(f"{FOLDER}/{following:08d}.json", json.dumps(mine).encode()):
        raise UserError(f"{run.url} was taken by another driver at this moment")
    for file in list(run.list(FOLDER)):
        match = _HEART.match(file.path)
        if match and int(match[1]) < following:
            run.delete(file.path)
    return following


def _lives(run: Storage, number: int, record: dict[str, Any], silence_s: float) -> bool:
    path = f"{FOLDER}/{number:08d}.alive.json"
    last = _read(run, path)
    if last.get("released"):
        return False
    if (
        record.get("machine") == _machine() and "started_s" in record
    ):  # else an older version's: its beats tell
        return _runs(record)
    if _newest(run) != number:
        return False  # somebody was faster, which whoever creates the next record finds out
    logger.warning(
        "%s: process %s on %s has not let go of the run; listening for %g s whether it lives",
        *(run.url, record.get("pid"), record.get("host"), silence_s),
    )
    deadline = time.monotonic() + silence_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, silence_s / 10))
        now = _read(run, path)
        if now.get("released") or _newest(run) != number:
            return False
        if now != last:
            return True
    return False


def _runs(record: dict[str, Any]) -> bool:
    """Whether a process of this machine is still the one of the record, and not another of the same number."""
    try:
        pid = int(record["pid"])
        same = abs(started_s(pid) - float(record["started_s"])) < _CLOCK_S
        return same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _refusal(run: Storage, record: dict[str, Any]) -> str:
    return (
        f"{run.url} is being run by process {record['pid']} on {record['host']} since {record['since']}; "
        "wait for its end, stop it, or give the job another name"
    )


def _newest(run: Storage) -> int | None:
    numbers = [int(match[1]) for file in run.list(FOLDER) if (match := _LEASE.match(file.path))]
    return max(numbers, default=None)


def _read(run: Storage, path: str) -> dict[str, Any]:
    """A record; empty where there is none, or what is there cannot be read: a write was cut off."""
    try:
        value = run.read_json(path)
    except FileNotFoundError:
        return {}
    except UserError:
        raise  # a ValueError too: the storage refuses
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _machine() -> str:
    """This boot of this machine, and within it who sees the same processes (containers have their own numbers)."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.exists():
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return f"{socket.gethostname()} {uuid.getnode():x}"
