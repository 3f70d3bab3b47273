"""That workers are to leave: how each learns of it, and how a group leaves in good order.

Three send word: whoever takes a machine back, by SIGTERM to the worker's process; Ray, of a node that is drained;
the driver, once it was itself told to end. Only a flag is set, whatever the worker does at that moment. The
function looks at it where it suits, agrees on it with the other workers (what only one knows is of no use),
leaves behind what it wants to find again, and raises :class:`Leaving` on all of them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any

from cluster.board import Board

_TOPIC = "end"
_LISTEN_S = 0.5


class Reason(IntEnum):
    """Why to leave. Of several the greatest counts."""

    NONE = 0
    MACHINE = 1  # a machine is taken back: the group starts anew, elsewhere or later
    DRIVER = 2  # the driver ends: so does the group


class Leaving(Exception):
    """Raised by the function on every worker: it has done what is to be done before leaving."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Notice:
    """What a worker was told so far.

    Args:
        drained: says whether its node is drained.
    """

    def __init__(self, drained: Callable[[], bool] = lambda: False) -> None:
        self._drained = drained
        self._attended = False
        self._told = Reason.NONE
        self._over = threading.Event()

    def attend(self) -> None:
        """From here on SIGTERM does not end the process: the function promises to look at :attr:`reason`."""
        self._attended = True

    @property
    def attended(self) -> bool:
        """Whether somebody looks."""
        return self._attended

    @property
    def reason(self) -> Reason:
        """The reason to leave, if there is one by now."""
        return max(self._told, Reason.MACHINE if self._drained() else Reason.NONE)

    def tell(self, reason: Reason) -> None:
        """Set the flag; may be called from a signal handler."""
        self._told = max(self._told, reason)

    def listen(self, board: Board) -> None:
        """In the first worker: hear what :func:`ask_to_end` says, until :meth:`dismiss`."""

        def hear() -> None:
            while not self._over.wait(_LISTEN_S):
                if _TOPIC in board.read():
                    self.tell(Reason.DRIVER)

        threading.Thread(target=hear, name="notice", daemon=True).start()

    def dismiss(self) -> None:
        """The function has ended: nobody looks any more."""
        self._attended = False
        self._over.set()


def current_notice() -> Notice:
    """The notice of the worker that this process is."""
    return _notice


def ask_to_end(board: Board) -> None:
    """In the driver: tell the workers that listen to this board to end."""
    board.post(_TOPIC, True)


def catch_sigterm() -> None:
    """In a worker's main thread: SIGTERM is a notice where somebody attends to it, else what it was before.

    (Ray's own handler ends the process. The function runs in another thread, and Ray calls into this one at
    least once a second, so that the handler gets its turn.)
    """
    before = signal.getsignal(signal.SIGTERM)
    owner = os.getpid()

    def note(signum: int, frame: FrameType | None) -> None:
        if _notice.attended and os.getpid() == owner:
            _notice.tell(Reason.MACHINE)
        elif callable(before):
            before(signum, frame)
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, note)


def _node_is_drained() -> bool:
    """What Ray's preemption watcher told this worker.

    ``ray.train.get_preemption_info`` says the same, but all workers must call it and wait for each other.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    context: Any = get_train_context()
    return context.preemption_context.preemption_info is not None


_notice = Notice(_node_is_drained)  # of this process, which is one worker
