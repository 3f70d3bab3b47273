"""Time that no setting of the clock moves: since this machine was started.

The clock of a machine is set at any moment, by hand or by NTP, by hours or years, forwards or backwards. What lies
between two moments of one process ``time.monotonic`` tells; of two processes of one machine, this module.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE = Path("/proc/self/ns/time")
_START_TIME = 19  # of the fields behind a process's name in its stat file: the 22nd of all (proc(5))


def boot_id() -> str:
    """Names this boot of this machine, and within it who counts its time alike; empty where that cannot be told."""
    if not _BOOT_ID.exists():
        return ""
    namespace = os.readlink(_TIME_NAMESPACE) if _TIME_NAMESPACE.exists() else ""
    return f"{_BOOT_ID.read_text().strip()} {namespace}".strip()


def uptime_s() -> float:
    """Seconds since a moment that is the same for all processes of one ``boot_id``."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def started_s(pid: int) -> float:
    """When a process began: the ``uptime_s`` then; where there is no ``boot_id``, seconds since the epoch.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    if not boot_id():
        return psutil.Process(pid).create_time()
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        raise psutil.NoSuchProcess(pid) from None
    # A name may hold anything, brackets and spaces too.
    return int(status.rpartition(b")")[2].split()[_START_TIME]) / os.sysconf("SC_CLK_TCK")


def age_s(pid: int) -> float:
    """For how long a process has been running.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    now = uptime_s() if boot_id() else time.time()
    return max(0.0, now - started_s(pid))
