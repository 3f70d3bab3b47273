"""Unreadable samples: counted by cause over all workers; too many of them end the run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from sharding.errors import BadDataLimit


class BadSampleGuard:
    """Counts unreadable samples by cause over all workers; stops the run above a share of all that were read."""

    #: Below so many samples a share says nothing: one bad picture in the first batch must not stop a run.
    MINIMUM = 1000

    def __init__(self, limit: float, device: torch.device, place: str = "train") -> None:
        self._limit, self._device, self._place = limit, device, place
        self.seen = 0
        self.causes: Counter[str] = Counter()

    def update(self, seen: int, bad: Counter[str]) -> None:
        """Add a step's counts of this worker. Collective.

        Raises:
            BadDataLimit: on every worker, with the counts by cause.
        """
        counts = torch.tensor([seen, bad.total()], dtype=torch.int64, device=self._device)
        dist.all_reduce(counts)
        self.seen += int(counts[0])
        if int(counts[1]):
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, bad)
            for part in parts:
                self.causes.update(part)
        total = self.causes.total()
        if total > self._limit * max(self.seen, self.MINIMUM):
            counted = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
            raise BadDataLimit(
                f"{total} of {self.seen} samples could not be read ({counted}): more than "
                f"{self._place}.bad_sample_limit {self._limit:g} allows"
            )
