"""Errors of the cluster room. Mistakes of the user's are ``ClusterError``: one clear line, exit status 2."""

from __future__ import annotations


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
