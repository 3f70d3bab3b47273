"""Folders of this machine for files on their way, below TMPDIR, and that no two runs share one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharding.errors import UserError
from sharding.storage import Storage

_VARIABLES = ("TMPDIR", "TEMP", "TMP")  # in the order in which Python asks them


def check_scratch() -> None:
    """See whether the folder for temporary files is there and can be written.

    Python itself would silently take another one, of another disk, and a full one shows in the middle of a training.

    Raises:
        UserError: it cannot; names the variable, the folder and why.
    """
    name = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if name is None:
        try:
            tempfile.gettempdir()
        except FileNotFoundError:
            raise UserError("no folder for temporary files can be written here: set TMPDIR to one") from None
        return
    folder = Path(os.environ[name])
    where = f"{name}, the folder for temporary files, is {folder}"
    if not folder.is_dir():
        what = "which is no folder" if folder.exists() else "which does not exist"
        raise UserError(f"{where}, {what}: make it, or name another")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"glscl")
    except OSError as error:
        raise UserError(f"{where}, which cannot be written: {error.strerror}") from None


def scratch_folder(key: str, run: Storage) -> Path:
    """Where a training keeps files on their way. Copies of a run, which have its ``key``, have others."""
    return Path(tempfile.gettempdir()) / f"glscl-{key}-{hashlib.sha256(run.url.encode()).hexdigest()[:8]}"


@contextmanager
def only_copy(key: str, run: Storage) -> Iterator[None]:
    """For the time of the block no other copy of the run is trained on this machine.

    A storage that is copied as a whole is the same run once more: both would go on in one run of MLflow, where one's
    steps hide the other's.

    Raises:
        UserError: another copy is being trained now; names it.
    """
    path = Path(tempfile.gettempdir()) / f"glscl-{key}-{os.getuid()}.lock"
    with _locked(path) as lock:
        if lock is None:
            holder = path.read_text("utf-8", "replace").partition("\n")[0] if path.exists() else ""
            raise UserError(
                f"{run.url} is a copy of a run that is being trained now ({holder or key}): both would go on in "
                "the same run of MLflow; wait for its end, or stop it"
            )
        try:
            os.write(
                lock, f"{run.url}, by process {os.getpid()}\n".encode()
            )  # what a killed one left stays behind
        except OSError as error:
            raise UserError(f"cannot write {path} (below TMPDIR): {error.strerror}") from None
        yield


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The locked file, removed in the end; None where another process holds it.

    Raises:
        UserError: it cannot be opened, or is a link.
    """
    while True:
        try:
            # Anybody may lay a link where a folder is all users'.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            why = "is a link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
            raise UserError(
                f"{path} (below TMPDIR) {why}: remove it, or set TMPDIR to a folder of yours"
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if os.fstat(descriptor).st_nlink == 0:
                continue  # who had it has just removed it: that binds nobody
            try:
                yield descriptor
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)
