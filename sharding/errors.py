"""The four kinds of errors of the project, in one place.

* ``UserError``: a mistake the user can mend (bad configuration, missing file, wrong key). Its text is one
  clear line; the command line prints that line and exits with 2.
* ``StorageFault``: a fault of the network or the store that outlasted every retry.
* ``StorageRefused``: what the file system refuses, however often it is asked; a ``UserError`` too.
* ``BadData`` / ``BadDataLimit``: one sample or shard that cannot be used; too many of them.
* Everything else is a bug and is raised at once, as it is.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's. The message: one line, naming the field or path and what would be right."""


class UnreadableObject(UserError):
    """An object that a store has but does not give: archived, access denied, encrypted with a key out of reach.

    A preparation counts it under ``cause`` and goes on with the others; whoever needs this very object stops, as with
    any mistake that the user can mend.
    """

    def __init__(self, detail: str, cause: str = "unreadable-file") -> None:
        super().__init__(detail)
        self.cause = cause


class StorageFault(OSError):
    """A transient storage fault that was still there after the last retry. The message names the url.

    Args:
        message: one line.
        cause: the system's own error, whose ``errno`` and ``strerror`` this one has too.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])  # OSError would show errno and strerror instead


class StorageRefused(UserError, OSError):
    """Something cannot be written or deleted, and will not be by trying again: not permitted, no such name.

    Args:
        message: one line that names the file and what is wrong.
        cause: as of ``StorageFault``.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])


class BadData(Exception):
    """One sample (or shard) that cannot be used.

    Args:
        cause: a short slug under which the case is counted, e.g. ``"checksum-mismatch"``.
        detail: one line that names the shard and key, or the file, and what is wrong with it.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)  # both in args, so that it survives pickling between processes
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


class BadDataLimit(RuntimeError):
    """More bad data than the configured limit allows: work stops. The message gives the counts by cause."""
