"""A decoder that misbehaves on demand, for the tests of the guard: the input's bytes say how."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.errors import BadData


class Misbehaving:
    """``b"VERB argument"``; any other bytes are given back with their header, in one part."""

    def __init__(self, name: str) -> None:
        self._name = name

    def header(self, data: bytes) -> dict[str, Any]:
        if data.startswith(b"bad-header"):
            raise BadData("decode-failed", "no header")
        if data.startswith(b"header-crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.startswith(b"header-sleep"):
            time.sleep(600)
        while data.startswith(b"header-spin"):
            pass
        return {"size": len(data), "name": self._name}

    def parts(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        verb, _, argument = data[:200].decode("latin-1").partition(" ")
        if verb == "sleep":
            time.sleep(float(argument))
        elif verb == "spin":
            while True:
                pass
        elif verb == "crash":
            ctypes.string_at(0)
        elif verb == "exit":
            os._exit(3)
        elif verb == "crash-once":
            yield {"part": 0}, b"a part that must not be given twice"
            yield {"part": 1}, b"nor this one, which lets the first one go"
            if not Path(argument).exists():
                Path(argument).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        elif verb == "sleep-once":
            if not Path(argument).exists():
                Path(argument).touch()
                time.sleep(600)
        elif verb == "allocate":
            bytearray(int(argument) << 20)
        elif verb == "garbage":
            os.write(int(sys.argv[1]), bytes([int(argument)]) * 5000)
        elif verb == "bug":
            raise KeyError("nonsense")
        elif verb == "bad":
            yield {"part": 0}, b"x"
            raise BadData("decode-failed", "cut off")
        elif verb == "many":
            for number in range(int(argument)):
                yield {"part": number}, bytes([number]) * 1_000_000
            return
        elif verb == "environment":
            yield {"environment": dict(os.environ), "threads": os.cpu_count()}, b""
            return
        elif verb == "affinity":
            yield {"cpus": sorted(os.sched_getaffinity(0))}, b""
            return
        yield {"size": len(data)}, data[::-1]
