"""Errors of the job that are no mistake of the user's; those of data and storage are in ``sharding.errors``."""

from __future__ import annotations


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite. The message names the step, the objectives and the samples."""


class Regressed(RuntimeError):
    """A metric fell so far that the training was to stop. The message names it, both steps, and the interval."""


class RunTakenOver(RuntimeError):
    """Another driver works on the run by now: this one was taken for dead, and must write nothing more."""
