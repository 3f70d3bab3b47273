"""Where every thread of a worker is, and of its loader processes: Python's stacks, also of a process that hangs.

A loader process writes its own when it gets SIGUSR1, into memory that it shares by its file descriptor alone: nothing
is left behind, however it ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import time
from pathlib import Path

import psutil

_MEMORY = "glscl-stacks"
_WAIT_S = 1.0  # for a loader process to write


def write_stacks_on_signal() -> None:
    """In a loader process: SIGUSR1 writes its stacks (Linux; elsewhere nothing)."""
    if hasattr(os, "memfd_create"):
        faulthandler.register(signal.SIGUSR1, file=os.memfd_create(_MEMORY), all_threads=True)


def stacks() -> str:
    """Of all threads of this process, then of each of its loader processes."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        parts = [f"worker, process {os.getpid()}\n\n{file.read().decode(errors='replace')}"]
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):  # it ends at this moment
            text = _of_loader(child.pid)
            if text is not None:
                parts.append(f"loader process {child.pid}\n\n{text}")
    return "\n".join(parts)


def _of_loader(pid: int) -> str | None:
    """None: it is no loader process."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(descriptor).startswith(f"/memfd:{_MEMORY}"):
            before = descriptor.stat().st_size
            os.kill(pid, signal.SIGUSR1)
            time.sleep(_WAIT_S)
            return descriptor.read_bytes()[before:].decode(errors="replace")
    return None
