"""Processes that are forked from a server without threads, wherever the folder for temporary files lies.

``multiprocessing`` listens on Unix sockets, whose paths have at most 107 bytes: below the TMPDIR of a batch system that
is often too few. All sockets of a process lie in one folder that only its user can enter, below TMPDIR or, where that
is too long, in a short one. It is removed with the process, or, where that was killed, by whoever looks next.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import shutil
import tempfile
import threading
from multiprocessing.context import ForkServerContext
from pathlib import Path

from sharding.errors import UserError

_PREFIX, _OWNER = "glscl-mp-", "owner.lock"
#: Bytes of a path that leave room for the folder, and a socket's name in it.
_LONGEST = 107 - len(f"/{_PREFIX}xxxxxxxx/listener-xxxxxxxx")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")

_making = threading.Lock()


def forkserver() -> ForkServerContext:
    """The context in which processes are made; to be asked for anew each time.

    Raises:
        UserError: TMPDIR is too long, and no other folder can be written.
    """
    with _making:
        remove_abandoned_sockets()
        _settle_sockets()
    return multiprocessing.get_context("forkserver")


def _settle_sockets() -> None:
    # Where multiprocessing.util.get_temp_dir() looks first. Processes that this one makes inherit it, and the sockets
    # by which they pass tensors on lie there too.
    settings = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if settings.get("tempdir") is None:
        settings["tempdir"] = str(_new_folder())


def _new_folder() -> Path:
    for place in _places():
        try:
            while (folder := _locked_folder(place)) is None:
                pass
        except OSError:
            continue
        # As multiprocessing does with its own: last of all.
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
        return folder
    raise UserError(
        f"TMPDIR is {tempfile.gettempdir()}, too long (more than {_LONGEST} bytes) for the sockets of processes, and "
        f"{', '.join(_SHORT)} cannot be written: give TMPDIR a shorter path"
    )


def _locked_folder(place: str) -> Path | None:
    """None where somebody who tidied up took it for abandoned before it was locked."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it with this process, whatever kills it
    if os.fstat(lock).st_nlink:
        return folder
    os.close(lock)
    return None


def _places() -> list[str]:
    own = tempfile.gettempdir()
    return [own, *_SHORT] if len(os.fsencode(own)) <= _LONGEST else [*_SHORT]


def remove_abandoned_sockets() -> None:
    """Remove the folders of processes on this machine that were killed."""
    for place in _places():
        for path in Path(place).glob(f"{_PREFIX}*/{_OWNER}"):
            with contextlib.suppress(OSError), path.open("r+") as lock:
                if os.fstat(lock.fileno()).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path.parent, ignore_errors=True)
