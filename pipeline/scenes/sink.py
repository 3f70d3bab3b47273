"""Files on their way into a storage: several at once, counted, with a digest of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import simplejpeg

from sharding.storage import Storage

_WRITERS, _WAITING = 8, 64
_QUALITY = 95  # boxes and masks are of the pixels before the JPEG: it must not blur them


class Sink:
    """Writes below one folder. As a context: everything is written when it is left without an error."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="write")
        self._waiting: list[Future[None]] = []
        self._digests: dict[str, str] = {}
        self.bytes = 0

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._await(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    @property
    def files(self) -> int:
        return len(self._digests)

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of all files."""
        lines = (f"{digest}  {path}\n" for path, digest in sorted(self._digests.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def write(self, path: str, data: bytes) -> None:
        """Soon; a fault of the storage is raised by a later call."""
        assert path not in self._digests, path
        self._digests[path] = hashlib.sha256(data).hexdigest()
        self.bytes += len(data)
        self._await(_WAITING)
        self._waiting.append(self._pool.submit(self._storage.write_bytes, path, data))

    def write_json(self, path: str, value: Any) -> None:
        """One JSON value."""
        self.write(path, json.dumps(value, ensure_ascii=False).encode())

    def write_lines(self, path: str, rows: Iterable[dict[str, Any]]) -> None:
        """JSON lines."""
        self.write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def write_jpeg(self, path: str, pixels: Any) -> None:
        """An image, of uint8 [H, W, 3]."""
        self.write(path, simplejpeg.encode_jpeg(pixels, _QUALITY, "RGB", "444"))

    def _await(self, most: int) -> None:
        """Until at most so many are waiting; raises what a write raised."""
        while len(self._waiting) > most:
            self._waiting.pop(0).result()
