"""How many deaths a run may have: so many in a row, without getting on in between.

A run of months loses more machines than any sensible limit; what must end is one that dies over and over at the same
place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError

logger = logging.getLogger(__name__)


class DeathsInARow(DefaultFailurePolicy):
    """In Ray's controller: counts deaths anew once the run has got on.

    Args:
        progress: how far the run has come, as a number that grows; asked after each death.
    """

    def __init__(self, failure_config: FailureConfig, progress: Callable[[], int]) -> None:
        super().__init__(failure_config)
        self._progress = progress
        self._reached: int | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        try:
            reached = self._progress()
        except OSError as error:  # the storage is away: then nothing is known to have got on
            logger.warning("how far the run has come cannot be told: %s", error)
        else:
            if self._reached is not None and reached > self._reached:
                self._worker_group_failures = 0
            self._reached = reached if self._reached is None else max(self._reached, reached)
        return super().make_decision(training_failed_error)
