"""Errors of the cluster room. Mistakes of the user's are ``ClusterError``: one clear line, exit status 2."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # Ray paints names of processes
_FRAME = re.compile(r'\s+File ".*", line \d+')


class ClusterError(ValueError):
    """The cluster cannot do what was asked for. The message: one line, what is wrong and what is right."""


class WorkerOutOfMemory(ClusterError):
    """Ray's memory monitor killed a worker to save its node.

    Args:
        message: Ray's own words, in one line.
        rank: the worker.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message, rank)
        self.message = message
        self.rank = rank

    def __str__(self) -> str:
        return self.message


class WorkerGroupError(RuntimeError):
    """Workers failed for good: a bug in the function, or more deaths than are allowed.

    Args:
        message: one line (which worker, which error), then the tail of its traceback if there is one.
        rank: the worker that failed first, as far as is known; None where the group never started.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message, rank)  # both in args, so that it survives pickling between processes
        self.message = message
        self.rank = rank

    def __str__(self) -> str:
        return self.message


class WorkersStopped(RuntimeError):
    """Somebody asked for the workers' end, and they are gone."""


def plain_lines(text: object) -> list[str]:
    """The lines of what Ray says, without its colours and without empty ones."""
    lines = _COLOURS.sub("", str(text)).splitlines()
    return [line.rstrip() for line in lines if line.strip()]


def in_one_line(error: BaseException) -> str:
    """What an error says, all of it: several lines are joined; its type where it says nothing."""
    return " ".join(" ".join(plain_lines(error)).split()) or repr(error)


def cause_of(error: BaseException) -> str:
    """The one line of an error of Ray's that names the cause.

    Ray wraps what a process of its own raised: the first line names the process, then comes that process's
    traceback, and below its last frame ``TypeError: ...``, the cause. Without a traceback the first line says it.
    """
    lines = plain_lines(error)
    frames = [number for number, line in enumerate(lines) if _FRAME.match(line)]
    below = (line for line in lines[frames[-1] + 1 :] if not line.startswith(" ")) if frames else iter(lines)
    return next(below, "").strip() or repr(error)
