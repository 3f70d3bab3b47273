"""Errors of the job that are no mistake of the user's; those of data and storage are in ``sharding.errors``."""

from __future__ import annotations

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
