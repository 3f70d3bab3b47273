"""A cache of whole shards in a folder of this machine, shared by all its processes.

A shard is there under its sha256 when it is whole and verified, else not: so neither a reader beside a
    download nor
two datasets with equal names can meet the wrong bytes, and nothing depends on a process ending in good order.
All locks are ``flock`` on open files, which end with the process that holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sharding.storage import Storage

_INCOMING = (
    "incoming"  # a folder for each download under way: "lock" (held; as long as the shard) and "shard"
)


class ShardCache:
    """Whole shards, fetched once, evicted by last use when they pass ``byte_limit``.

    The limit holds for finished and arriving shards together; a shard that is evicted while a reader has it
    open takes its space until that reader lets go of it.

    Args:
        folder: where; made if need be. Processes that name the same folder share it and should name the same
            limit.
        byte_limit: of all shards together, in bytes.
    """

    def __init__(self, folder: Path, byte_limit: int) -> None:
        if byte_limit < 1:
            raise ValueError(f"the limit of the shard cache must be positive, got {byte_limit} bytes")
        self.folder = Path(folder).absolute()
        self.byte_limit = byte_limit

    def open(self, dataset: Storage, path: str, *, size: int, sha256: str) -> int | None:
        """A file descriptor for reading the whole shard, which the caller closes; None if it can never fit.

        The descriptor stays good whatever becomes of the cache. Of several processes that want a shard one
        fetches it, the others wait for it.

        Raises:
            BadData: the stored shard has another size or sha256.
            FileNotFoundError, StorageFault, OSError: as ``Storage.download``.
        """
        if size > self.byte_limit:
            return None
        descriptor = self._open_cached(sha256, size)
        if descriptor is not None:
            return descriptor
        with self._locked(f"fetch-{sha256[:2]}"):
            descriptor = self._open_cached(sha256, size)  # another may have fetched it while we waited
            while descriptor is None:
                with self._reserved(size) as place:
                    dataset.download(path, place / "shard", size=size, sha256=sha256)
                    os.replace(place / "shard", self._path(sha256))
                descriptor = self._open_cached(sha256, size)
        return descriptor

    def discard(self, sha256: str) -> None:
        """Forget a shard, e.g. because its copy here was found damaged."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _open_cached(self, sha256: str, size: int) -> int | None:
        try:
            descriptor = os.open(self._path(sha256), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)  # cut short by whatever else writes in this folder
            self.discard(sha256)
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or another user's: it can still be read
            os.utime(self._path(sha256))
        return descriptor

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _reserved(self, size: int) -> Iterator[Path]:
        """A folder to download into, with room for ``size`` bytes within the limit."""
        place = self.folder / _INCOMING / secrets.token_hex(8)
        with contextlib.ExitStack() as stack:
            with self._locked("evict"):
                self._evict(size)
                place.mkdir(parents=True)
                stack.callback(shutil.rmtree, place, ignore_errors=True)
                lock = stack.enter_context((place / "lock").open("wb"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                lock.truncate(size)  # sparse: takes no space, but says how much is to come
            yield place

    def _evict(self, wanted: int) -> None:
        """Remove shards, the least recently used first, until ``wanted`` bytes more fit (as far as that
        goes).
        """
        room = self.byte_limit - wanted - self._arriving()
        shards = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                shards.append((status.st_mtime_ns, path.name, status.st_size))
        total = sum(size for _, _, size in shards)
        for _, name, size in sorted(shards):
            if total <= room:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size

    def _arriving(self) -> int:
        """Bytes of the downloads under way; what a killed process left behind is removed."""
        total = 0
        for place in (self.folder / _INCOMING).glob("*"):
            with contextlib.suppress(FileNotFoundError), (place / "lock").open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    total += os.fstat(lock.fileno()).st_size
                    continue
            shutil.rmtree(place, ignore_errors=True)
        return total
