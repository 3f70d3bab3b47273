"""Waiting for a storage that is away, full or read-only for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sharding.errors import StorageFault

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: For so long something that must be written is tried again, beyond the retries of each access.
PATIENCE_S = 900.0
_AGAIN_S = 5.0


def patiently(act: Callable[[], _Result], what: str, *, patience_s: float | None = None) -> _Result:
    """What ``act`` returns, which may be done again after a fault of the storage.

    Args:
        what: waits, in the warning: one at the first fault, and then none until the fault is another.
        patience_s: default ``PATIENCE_S``.

    Raises:
        StorageFault: the last one, once patience is over.
    """
    until = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    told = ""
    while True:
        try:
            result = act()
        except StorageFault as error:
            if time.monotonic() >= until:
                raise
            if str(error) != told:
                logger.warning("%s waits for the storage: %s", what, error)
                told = str(error)
            time.sleep(_AGAIN_S)
        else:
            if told:
                logger.info("%s: the storage is there again", what)
            return result
