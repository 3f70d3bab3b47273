"""A bound on the bytes that are read ahead of the one who uses them in order."""

from __future__ import annotations

import threading


class Cancelled(Exception):
    """The reader that the bytes were for has gone."""


class ByteBudget:
    """``limit`` bytes for results that are made at the same time and used one after the other.

    ::

        in order:   4 (in use)   5 (next)      6        7 ...
        held:       30           waits for no one   20   waits until it fits

    What is next in order never waits, however large it is: it is what the user of the results waits for, and all
    others may be waiting for it to leave. So at most ``limit`` bytes and one file are held, and nothing is ever
    stuck.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._next = 0  # the first lease in order that is not released
        self._cancelled = False
        self._changed = threading.Condition()

    def lease(self, order: int) -> Lease:
        """The lease of the result with this place in order: 0, 1, 2 ..."""
        return Lease(self, order)

    def cancel(self) -> None:
        """Wake all who wait; they get ``Cancelled``."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def held(self) -> int:
        """Bytes on lease now."""
        return self._held

    def _fits(self, lease: Lease, size: int) -> bool:
        return lease.order <= self._next or self._held - lease.size + size <= self._limit


class Lease:
    """The bytes of one result. Made by ``ByteBudget.lease``; ``release`` is called in order."""

    def __init__(self, budget: ByteBudget, order: int) -> None:
        self._budget = budget
        self.order = order
        self.size = 0

    def reserve(self, size: int) -> None:
        """Hold ``size`` bytes in all from now on (more or fewer than before); waits until they fit.

        Raises:
            Cancelled: while waiting.
        """
        budget = self._budget
        with budget._changed:
            while size > self.size and not budget._cancelled and not budget._fits(self, size):
                budget._changed.wait()
            if budget._cancelled:
                raise Cancelled
            self._set(size)

    def try_reserve(self, size: int) -> bool:
        """As ``reserve``, but without waiting: whether it holds them."""
        budget = self._budget
        with budget._changed:
            if size > self.size and not budget._fits(self, size):
                return False
            self._set(size)
            return True

    def release(self) -> None:
        """The result was used: hold nothing more, and let the one after it be next."""
        with self._budget._changed:
            self._set(0)
            self._budget._next += 1
            self._budget._changed.notify_all()

    def _set(self, size: int) -> None:
        freed = size < self.size
        self._budget._held += size - self.size
        self.size = size
        if freed:
            self._budget._changed.notify_all()
