"""Errors of the job that are no mistake of the user's; those of data and storage are in ``sharding.errors``."""

from __future__ import annotations


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite. The message names the step, the objectives and the samples."""
