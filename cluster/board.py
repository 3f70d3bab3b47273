"""A board on which workers pin their latest news and the driver reads them."""

from __future__ import annotations

import math
import time
from typing import Any

import ray


@ray.remote(num_cpus=0, max_restarts=-1)
class _BoardActor:
    def __init__(self) -> None:
        self._notes: dict[str, tuple[float, Any]] = {}

    def post(self, topic: str, note: Any) -> None:
        self._notes[topic] = time.monotonic(), note

    def read(self, within_s: float) -> dict[str, Any]:
        now = time.monotonic()
        return {topic: note for topic, (posted, note) in self._notes.items() if now - posted < within_s}


class Board:
    """The newest note of each topic, in an actor of its own; may be handed to any task or worker."""

    def __init__(self) -> None:
        self._actor = _BoardActor.remote()  # type: ignore[attr-defined]

    def post(self, topic: str, note: Any) -> None:
        """Replace the note of a topic; does not wait, and a lost note is no loss."""
        self._actor.post.remote(topic, note)

    def read(self, timeout_s: float = 5.0, *, within_s: float = math.inf) -> dict[str, Any]:
        """The newest note of each topic; empty while the board does not answer.

        Args:
            within_s: only what was posted in the last so many seconds.
        """
        try:
            notes: dict[str, Any] = ray.get(self._actor.read.remote(within_s), timeout=timeout_s)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            return {}
        return notes
