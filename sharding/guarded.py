"""The child's side of ``sharding.guard``: decodes what it is sent, one input after another, and answers.

Run as ``python -m sharding.guarded SOCKET PARENT``: the number of an open socket, and the process that it must not
outlive. It ends when either is gone. Nothing but the decoder it is told to load is imported.

The wire, both ways: a packed header, then its parts. Nothing that comes from here is ever unpickled::

    to the child      verb, number, size | bytes
    from the child    kind, number, size of facts, size of data | facts (JSON) | data
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sharding.errors import BadData

REQUEST = struct.Struct("<BQQ")
REPLY = struct.Struct("<BQIQ")

# Verbs: keep the bytes and read their header; make the parts of what was kept, or of the bytes that come with the verb
# where nothing was; forget what was kept.
LOOK, MAKE, DROP = 1, 2, 3
# Kinds: the child is ready; what a header says; a part; the last part, if any; bad data; out of memory; a bug.
READY, HEADER, PART, DONE, BAD, MEMORY, BUG = range(1, 8)

_PR_SET_PDEATHSIG = 1


class Decoder(Protocol):
    """What runs in the child. Made by ``Class(**settings)``; both methods raise ``BadData``."""

    def header(self, data: bytes) -> dict[str, Any]:
        """What the input's header says: cheap, no pixels."""

    def parts(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """What is made of the input: facts (as JSON holds them, never none) and data of each part."""


class _Gone(Exception):
    """The parent closed its end."""


class _Channel:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def request(self) -> tuple[int, int, bytes]:
        verb, number, size = REQUEST.unpack(self._bytes(REQUEST.size))
        return verb, number, bytes(self._bytes(size))

    def _bytes(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            count = self._socket.recv_into(rest)
            if count == 0:
                raise _Gone
            rest = rest[count:]
        return data

    def reply(self, kind: int, number: int, facts: dict[str, Any] | None = None, data: bytes = b"") -> None:
        text = b"" if facts is None else json.dumps(facts).encode()
        message = REPLY.pack(kind, number, len(text), len(data)) + text
        if len(data) < 1 << 16:
            self._socket.sendall(message + data)
        else:
            self._socket.sendall(message)
            self._socket.sendall(data)


def _die_with(parent: int) -> None:
    """Be killed by the kernel when the parent ends, even in the middle of a decoder that never returns."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        raise _Gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides


def _be_first_to_go() -> None:
    """When the machine runs out of memory, let it take this process rather than the task."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_memory(limit: int) -> None:
    """Of what is allocated from now on: libraries are not counted."""
    data_and_stack = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit += data_and_stack
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _serve(channel: _Channel, decoder: Decoder) -> None:
    kept: dict[int, bytes] = {}
    while True:
        verb, number, data = channel.request()
        try:
            if verb == LOOK:
                kept[number] = data
                channel.reply(HEADER, number, decoder.header(data))
            elif verb == MAKE:
                last: tuple[dict[str, Any] | None, bytes] = (None, b"")
                for part in decoder.parts(kept.pop(number) if number in kept else data):
                    if last[0] is not None:
                        channel.reply(PART, number, *last)
                    last = part
                channel.reply(DONE, number, *last)
            else:
                del kept[number]
        except BadData as fault:
            kept.pop(number, None)
            channel.reply(BAD, number, {"cause": fault.cause, "detail": fault.detail})
        except MemoryError:
            channel.reply(MEMORY, number)
        except (_Gone, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:  # noqa: BLE001 - carried to the parent, which raises it as the bug it is
            channel.reply(BUG, number, {"traceback": traceback.format_exc()})


def main() -> None:
    """Serve until the parent closes the socket."""
    descriptor, parent = (int(argument) for argument in sys.argv[1:])
    connection = socket.socket(fileno=descriptor)
    channel = _Channel(connection)
    try:
        _die_with(parent)
        _be_first_to_go()
        _, number, text = channel.request()
        setup = json.loads(text)
        module, _, name = setup["decoder"].partition(":")
        decoder = getattr(import_module(module), name)(**setup["settings"])
        _limit_memory(setup["memory_bytes"])
        channel.reply(READY, number)
        _serve(channel, decoder)
    except (_Gone, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main()
