"""Errors of the job that are no mistake of the user's; those of data and storage are in ``sharding.errors``."""

from __future__ import annotations

import errno
import resource

from sharding.errors import UserError


class Unhealthy(RuntimeError):
    """The training went so wrong that it was ended (``health`` in the YAML)."""


class NonFiniteLoss(Unhealthy):
    """Losses or gradients became NaN or infinite. The message names the step, the objectives and the samples."""


class LossSpike(Unhealthy):
    """The loss rose again and again. The message names the step, the loss and the samples."""


class RolledBack(Exception):
    """The workers are to begin anew from the newest checkpoint; raised by all of them at the same step."""


class OutOfMemory(UserError):
    """Memory does not suffice for what the configuration asks for. The message says what can be changed."""


class Regressed(RuntimeError):
    """A metric fell so far that the training was to stop. The message names it, both steps, and the interval."""


class RunTakenOver(RuntimeError):
    """Another driver works on the run by now: this one was taken for dead, and must write nothing more."""


class TooManyFiles(UserError):
    """A process may not open another file. The message says how many it may, and how to raise that."""


def too_many_files(error: BaseException) -> TooManyFiles | None:
    """What to say of an error, where it is that a process has too many files open; else None."""
    # The second is what Python says where a descriptor that another process sent found no room.
    said = "Too many open files" in str(error) or "items of ancdata" in str(error)
    if not said and not (isinstance(error, OSError) and error.errno == errno.EMFILE):
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return TooManyFiles(
        f"too many open files: a process may have {soft} of them here; raise that before the start "
        f"(`ulimit -n {hard if hard > soft else 65536}`)"
    )


def system_fault(error: OSError) -> str:
    """One line on an error of the system's: the file, where it names one, and the cause."""
    explained = too_many_files(error)
    if explained is not None:
        return str(explained)
    if error.filename is None:
        return str(error.strerror or error)
    return f"{error.filename}: {error.strerror}"
