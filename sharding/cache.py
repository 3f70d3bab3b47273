"""A cache of whole files in a folder of this machine, shared by all its processes.

A file is there under its sha256 when it is whole and verified, else not: so neither a reader beside a download
nor two datasets with equal names can meet the wrong bytes, and nothing depends on a process ending in good
order. All locks are ``flock`` on open files, which end with the process that holds them::

    FOLDER/verified-BOOT/SHA256       whole; verified since this machine was last started
    FOLDER/incoming/SHA256/lock       held by the one process that downloads it; how many bytes are to come
    FOLDER/evict                      held while room is made

**Leases.** The descriptor that ``open`` and ``lease`` give is a lease: a shared lock on the file itself. What is
leased is not evicted, so that the bytes on the disk stay within the limit while readers hold on to files.

**After a crash of the machine.** A process that dies leaves whole files or none, since what it wrote is the
kernel's. A machine that loses power can leave a file of the right size with other bytes, whatever was flushed
before the rename, if its disk does not keep its word. So files of an earlier boot are hashed again before their
first use, once a boot.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sharding.errors import UserError
from sharding.storage import Storage
from sharding.storage_file import writing

_log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_VERIFIED, _INCOMING, _LOCK = "verified-", "incoming", "lock"


class _Place(NamedTuple):
    """Where one download goes, for whoever holds ``lock``."""

    folder: Path
    lock: BinaryIO


class ShardCache:
    """Whole files, fetched once, evicted by last use when they would pass ``byte_limit``.

    The limit holds for finished and arriving files together, those that readers hold open included. Picklable.

    Args:
        folder: where; made if need be. Processes that name the same folder share it and should name the same
            limit. On a disk of this machine: boots and locks are the machine's.
        byte_limit: of all files together, in bytes.
    """

    def __init__(self, folder: Path, byte_limit: int) -> None:
        if byte_limit < 1:
            raise ValueError(f"the limit of the shard cache must be positive, got {byte_limit} bytes")
        self.folder = Path(folder).absolute()
        self.byte_limit = byte_limit

    def check(self) -> None:
        """Make the folder, tidy up what killed processes left, and see whether it can serve.

        Raises:
            UserError: it is another user's, cannot be written, or its disk has no room for the limit.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
            if owner != os.geteuid():
                # Whoever can write here can have any bytes taken for a verified shard.
                raise UserError(
                    f"shard cache {self.folder}: belongs to another user (uid {owner}): name a folder of your own"
                )
            probe = self.folder / f"probe-{secrets.token_hex(8)}"
            probe.write_bytes(b"")
            probe.unlink()
            with self._evicting():
                self._make_room(0)
                held = sum(size for _, size, _ in self._files())
                self._remove_empty()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(f"shard cache {self.folder}: cannot be written: {error.strerror}") from None
        if held + free < self.byte_limit:
            raise UserError(
                f"shard cache {self.folder}: may take {_mib(self.byte_limit)} MiB, but its disk has room for "
                f"{_mib(held + free)} MiB only"
            )

    def open(self, dataset: Storage, path: str, *, size: int, sha256: str) -> int | None:
        """A lease of the file, fetched if need be: a descriptor for reading, which the caller closes.

        None if there is no room: it is larger than the cache, or what is there is all leased. Of several
        processes that want a file one fetches it, the others wait for it.

        Raises:
            BadData: the stored file has another size or sha256.
            FileNotFoundError, StorageFault, StorageRefused: as ``Storage.download``.
        """
        if size > self.byte_limit:
            return None
        descriptor = self.lease(sha256, size)
        if descriptor is not None:
            return descriptor
        with self._fetching(sha256) as place:
            # Another may have fetched it while we waited.
            descriptor = self.lease(sha256, size)
            if descriptor is None:
                descriptor = self._lease_of_earlier_boot(sha256, size)
            if descriptor is None and self._reserve(place, size):
                arrived = place.folder / "file"
                dataset.download(path, arrived, size=size, sha256=sha256)
                descriptor = _leased(arrived)  # before the rename, lest it be evicted at once
                assert descriptor is not None
                self._keep(arrived, sha256)
        return descriptor

    def lease(self, sha256: str, size: int) -> int | None:
        """A descriptor as of ``open``, if the file is there, verified in this boot; else None at once."""
        path = self._path(sha256)
        descriptor = _leased(path)
        if descriptor is None:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)  # cut short by whatever else writes in this folder
            self.discard(sha256)
            return None
        os.utime(descriptor)
        return descriptor

    def discard(self, sha256: str) -> None:
        """Forget a file, e.g. because its copy here was found damaged. Who has it open may read on."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{_VERIFIED}{_boot()}" / sha256

    def _keep(self, path: Path, sha256: str) -> None:
        target = self._path(sha256)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)

    def _lease_of_earlier_boot(self, sha256: str, size: int) -> int | None:
        """The file as it lay here when the machine was started, if its bytes are still right."""
        for path in self.folder.glob(f"{_VERIFIED}*/{sha256}"):
            descriptor = _leased(path)
            if descriptor is None:
                continue
            with open(descriptor, "rb", closefd=False) as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            if right and os.fstat(descriptor).st_size == size:
                with contextlib.suppress(FileNotFoundError):  # discarded meanwhile: ours all the same
                    self._keep(path, sha256)
                return descriptor
            os.close(descriptor)
            path.unlink(missing_ok=True)
            _log.warning("%s: damaged since the machine was last started, fetched anew", path)
        return None

    @contextlib.contextmanager
    def _fetching(self, sha256: str) -> Iterator[_Place]:
        """The right to fetch one file, of one process and thread at a time."""
        folder = self.folder / _INCOMING / sha256
        with contextlib.ExitStack() as stack:
            folder.parent.mkdir(parents=True, exist_ok=True)
            while True:
                # Not exist_ok: that raises where the one before us removes the folder at this moment.
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                try:
                    lock = (folder / _LOCK).open("ab")
                except FileNotFoundError:  # the one before us has just tidied up
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.fstat(lock.fileno()).st_nlink:
                    break
                lock.close()  # the lock of a folder that is gone binds nobody
            stack.enter_context(lock)
            stack.callback(_clear, folder)
            yield _Place(folder, lock)

    def _reserve(self, place: _Place, size: int) -> bool:
        """Make room for ``size`` bytes and say that they are to come. False if there can be no room now."""
        with self._evicting():
            if not self._make_room(size):
                return False
            with writing(place.folder / _LOCK):
                place.lock.truncate(0)
                place.lock.write(b"%d" % size)
                place.lock.flush()
            return True

    @contextlib.contextmanager
    def _evicting(self) -> Iterator[None]:
        with (self.folder / "evict").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, wanted: int) -> bool:
        """Remove files that nobody leases, the least recently used first, until ``wanted`` bytes more fit.

        Where they cannot fit nothing is removed.
        """
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) + self._arriving() + wanted - self.byte_limit
        with contextlib.ExitStack() as stack:
            chosen = []
            for _, size, path in files:
                if excess <= 0:
                    break
                try:
                    file = stack.enter_context(path.open("rb"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except FileNotFoundError:
                    pass  # discarded meanwhile
                except BlockingIOError:
                    continue
                chosen.append(path)
                excess -= size
            if excess > 0:
                return False
            for path in chosen:
                path.unlink(missing_ok=True)
        return True

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of the last use, size in bytes, path) of the files of this boot and those before."""
        for path in self.folder.glob(f"{_VERIFIED}*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _arriving(self) -> int:
        """Bytes of the downloads under way; what a killed process left behind is removed."""
        total = 0
        for folder in (self.folder / _INCOMING).glob("*"):
            try:
                lock = (folder / _LOCK).open("rb")
            except FileNotFoundError:  # about to be used, or left by a process killed while it tidied up
                with contextlib.suppress(OSError):
                    folder.rmdir()
                continue
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    total += int(lock.read() or 0)  # empty: nothing reserved yet
                    continue
                if os.fstat(lock.fileno()).st_nlink:
                    _clear(folder)
        return total

    def _remove_empty(self) -> None:
        for folder in self.folder.glob(f"{_VERIFIED}*"):
            if folder.name != f"{_VERIFIED}{_boot()}":
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _boot() -> str:
    """Names the time since the machine was started."""
    return _BOOT_ID.read_text().strip()


def _leased(path: Path) -> int | None:
    """An open descriptor that holds a shared lock on the file, or None if there is no such file (any more)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # an evictor holds its lock for an instant only
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return None
    return descriptor


def _clear(folder: Path) -> None:
    """Remove the folder of a download; its lock last, so that nobody starts one in what is being removed."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.name != _LOCK:
                path.unlink(missing_ok=True)
    (folder / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the next one is there already
        folder.rmdir()


def _mib(size: int) -> int:
    return -(-size // 2**20)
