"""Storage on a folder of this machine (or one mounted on it)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from sharding.errors import StorageFault, StorageRefused, UserError

if TYPE_CHECKING:
    from sharding.storage import FileState

_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".glscl-", ".part"
_COPY_BLOCK = 4 << 20
_DELETE_TRIES = 10  # of a folder that others write into, or delete too
# A file system without hard links (some network and FUSE mounts) answers a link with one of these.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
#: What a file system answers while it is full, read-only or away, and need not answer a moment later: whoever waits
#: for a storage waits for these. Network and FUSE mounts pass on the errors of their sockets.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EROFS", "EIO", "EREMOTEIO", "ESTALE", "EAGAIN", "EBUSY", "EINTR", "ENOLCK"),
        *(
            "ETIMEDOUT",
            "ETIME",
            "ENOTCONN",
            "ECONNRESET",
            "ECONNREFUSED",
            "ECONNABORTED",
            "ESHUTDOWN",
            "EPIPE",
        ),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENODEV", "ENOLINK"),
        *("ENOMEDIUM", "EKEYEXPIRED", "ENFILE", "ENOMEM", "ENOBUFS", "EPROTO", "ECOMM"),
    )
    if hasattr(errno, name)
)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0  # as between two tries of a request to S3

_T = TypeVar("_T")


def passes(error: OSError) -> bool:
    """Whether an error of the system's may be gone when the same is done again later."""
    return error.errno in _PASSING


def _understood(error: OSError, message: str) -> StorageFault | StorageRefused:
    return (StorageFault if passes(error) else StorageRefused)(message, error)


def is_temporary(name: str) -> bool:
    """Whether a file name is one that ``write_file`` gives while writing."""
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """A fresh name in the folder of ``target`` (made if need be); what is at it afterwards is removed."""
    temporary = target.parent / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
    with writing(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, f"{error.filename} is not a folder") from None
    try:
        yield temporary
    finally:
        # Mostly it is not there any more. Where the file system refuses this too, what it refused before is told.
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Errors of the system, naming the path that was to be written.

    Raises:
        StorageFault: the disk is full, read-only or away, which may pass.
        StorageRefused: not permitted, too long a name, ...
        FileExistsError: it is there already, and must not be.
        FileNotFoundError: somebody removed its folder meanwhile.
    """
    try:
        yield
    except (StorageFault, StorageRefused):
        raise
    except (FileExistsError, FileNotFoundError) as error:
        raise type(error)(error.errno, f"cannot write {target}: {error.strerror}") from None
    except OSError as error:
        raise _understood(error, f"cannot write {target}: {error.strerror}") from None


def _write_blocks(path: Path, blocks: Iterable[bytes], target: Path) -> None:
    """Write a new file and wait until it is on the disk. Errors name ``target``; those of ``blocks`` pass as
    is.
    """
    with writing(target):
        file = path.open("xb", buffering=0)
    with file:
        _fill(file, blocks, target)


def _fill(file: FileIO, blocks: Iterable[bytes], target: Path) -> None:
    for block in blocks:
        view = memoryview(block)
        while view:
            with writing(target):
                view = view[file.write(view) :]
    with writing(target):
        os.fsync(file.fileno())


def write_file(target: Path, blocks: Iterable[bytes]) -> None:
    """Write a file whole or not at all: temporary name in the same folder, flush to disk, rename.

    ``blocks`` may raise to reject what it yielded: then the target is left as it was.
    """
    with temporary_file(target) as temporary:
        _write_blocks(temporary, blocks, target)
        with writing(target):
            os.replace(temporary, target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a regular file, or of what a link leads to; None of anything else."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:
        return None


class FileBackend:
    """A folder. See ``sharding.storage.Backend``."""

    exact_paths: ClassVar[bool] = False  # a listing gives clean ones, and no name may lead out

    def __init__(self, root: Path, attempts: int = 1) -> None:
        self._root, self._attempts = root, attempts

    def url_of(self, path: str) -> str:
        return (self._root / path).as_uri()

    def at(self, path: str) -> FileBackend:
        return FileBackend(self._root / path, self._attempts)

    def local_path(self, path: str) -> Path:
        return self._root / path

    def check(self, *, write: bool) -> None:
        try:
            if write:
                # A name of its own, so that two jobs that start at once do not meet.
                probe = self._root / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
                self._root.mkdir(parents=True, exist_ok=True)
                probe.write_bytes(b"")
                probe.unlink()
            else:
                next(iter(os.scandir(self._root)), None)
        except FileNotFoundError:
            raise UserError(f"{self.url_of('')} does not exist") from None
        except (NotADirectoryError, FileExistsError):
            raise UserError(f"{self.url_of('')} is not a folder") from None
        except OSError as error:
            verb = "written" if write else "read"
            raise UserError(f"{self.url_of('')} cannot be {verb}: {error.strerror}") from None

    def state(self, path: str) -> FileState:
        return self._again(lambda: self._state(path))

    def _state(self, path: str) -> FileState:
        from sharding.storage import FileState

        with self._named(path):
            status = os.stat(self._root / path)
            if not os.path.isfile(self._root / path):
                raise FileNotFoundError(errno.ENOENT, "is not a file")
        return FileState(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}")

    def iterate(
        self, prefix: str, others: Callable[[str, str], None] | None = None
    ) -> Iterator[tuple[str, int]]:
        start = self._root / prefix
        with self._named(prefix):
            if start.is_dir():
                yield from self._walk(start, f"{prefix}/" if prefix else "", (), others)

    def _walk(
        self,
        folder: Path,
        prefix: str,
        above: tuple[tuple[int, int], ...],
        others: Callable[[str, str], None] | None,
    ) -> Iterator[tuple[str, int]]:
        try:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:
                return  # a symbolic link to a folder that holds it
            with os.scandir(folder) as scan:
                entries = [
                    (entry.name, _is_folder(entry), entry) for entry in scan if not is_temporary(entry.name)
                ]
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError as error:
            if others is None or not prefix:
                raise
            others(prefix, f"cannot be read: {error.strerror}")
            return
        # A folder sorts as "name/", which makes the whole walk sorted by full path, as S3 lists.
        for name, is_folder, entry in sorted(entries, key=lambda item: item[0] + "/" * item[1]):
            if is_folder:
                yield from self._walk(folder / name, f"{prefix}{name}/", (*above, here), others)
                continue
            size = _size(entry)
            if size is not None:
                yield f"{prefix}{name}", size
            elif others is not None and os.path.lexists(folder / name):
                others(f"{prefix}{name}", "a link to nothing" if entry.is_symlink() else "not a regular file")

    def read(self, path: str, offset: int, length: int | None, version: str | None) -> bytes:
        data = self._again(lambda: self._read(path, offset, length))
        if version is not None and self.state(path).version != version:
            raise StorageFault(f"{self.url_of(path)} was replaced while it was read")
        return data

    def _read(self, path: str, offset: int, length: int | None) -> bytes:
        with self._named(path):
            # Without waiting for who might write into a pipe that a list names as if it were a file.
            descriptor = os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise IsADirectoryError(errno.EISDIR, "is not a file")
                end = status.st_size if length is None else offset + length
                parts = []
                while offset < end:
                    part = os.pread(descriptor, end - offset, offset)  # at most 2 GiB at a time
                    if not part:
                        break
                    parts.append(part)
                    offset += len(part)
            finally:
                os.close(descriptor)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, path: str, data: bytes) -> None:
        self._again(lambda: write_file(self._root / path, (data,)))

    def create(self, path: str, data: bytes) -> bool:
        return self._again(lambda: self._create(path, data))

    def _create(self, path: str, data: bytes) -> bool:
        target = self._root / path
        with temporary_file(target) as temporary:
            _write_blocks(temporary, (data,), target)
            try:
                # Unlike O_EXCL followed by a write, a link shows the file with all its content at once.
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise _understood(error, f"cannot write {target}: {error.strerror}") from None
                return _create_without_links(target, data)
        _sync_folder(target.parent)
        return True

    def upload(self, source: Path, path: str) -> tuple[int, str]:
        return self._again(lambda: self._upload(source, path))

    def _upload(self, source: Path, path: str) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0

        def blocks() -> Iterator[bytes]:
            nonlocal size
            while block := file.read(_COPY_BLOCK):
                digest.update(block)
                size += len(block)
                yield block
            if size != os.fstat(file.fileno()).st_size:
                raise StorageFault(f"{source} changed while it was copied to {self.url_of(path)}")

        with source.open("rb") as file:
            write_file(self._root / path, blocks())
        if self.state(path).size != size:
            raise StorageFault(f"{self.url_of(path)} was replaced by another writer during the upload")
        return size, digest.hexdigest()

    def delete(self, path: str) -> None:
        def once() -> None:
            with self._named(path, changes=True), contextlib.suppress(FileNotFoundError):
                os.unlink(self._root / path)

        self._again(once)

    def delete_tree(self, path: str) -> None:
        self._again(lambda: self._delete_tree(path))

    def _delete_tree(self, path: str) -> None:
        folder = self._root / path
        with self._named(path, changes=True):
            for _ in range(_DELETE_TRIES):
                shutil.rmtree(folder, onerror=_pass_over_others)
                if not folder.exists():
                    return
        # Somebody goes on writing there. As in an object store, what is written meanwhile stays.

    def _again(self, call: Callable[[], _T]) -> _T:
        """Call until it works, the fault is no passing one, or the tries are used up; as with S3, with growing, uneven
        pauses.
        """
        for attempt in range(1, self._attempts):
            try:
                return call()
            except StorageFault as error:
                # Without a number it is not the system's. An EIO has been tried again by the kernel: a bad block.
                if error.errno in (None, errno.EIO):
                    raise
            wait = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S)
            # An instance of its own: the global random state belongs to the training.
            time.sleep(wait * random.Random().uniform(0.5, 1))
        return call()

    @contextlib.contextmanager
    def _named(self, path: str, *, changes: bool = False) -> Iterator[None]:
        """Errors of the system, with the full url in the message; ``changes``: of what is more than reading."""
        url = self.url_of(path)
        try:
            yield
        except (StorageFault, StorageRefused):
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
        except IsADirectoryError:
            raise FileNotFoundError(errno.ENOENT, "is a folder, not a file", url) from None
        except OSError as error:
            if passes(error) or changes:
                raise _understood(error, f"{url}: {error.strerror}") from None
            raise type(error)(error.errno, f"{url}: {error.strerror}") from None


def _create_without_links(target: Path, data: bytes) -> bool:
    """On a file system that has none: whoever makes the file fills it. One that cannot be filled is not left."""
    try:
        with writing(target):
            file = target.open("xb", buffering=0)
    except FileExistsError:
        return False
    try:
        with file:
            _fill(file, (data,), target)
    except OSError:
        with contextlib.suppress(OSError):
            target.unlink()
        raise
    return True


def _pass_over_others(function: object, path: str, raised: tuple[type, BaseException, object]) -> None:
    """What another process removes, or adds, while a folder is being deleted does not end the deletion."""
    error = raised[1]
    # `rmtree` takes a folder that was deleted and made anew between two of its calls for a symbolic link.
    made_anew = function is os.path.islink and not os.path.islink(path)
    if not made_anew and not (isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTEMPTY)):
        raise error
