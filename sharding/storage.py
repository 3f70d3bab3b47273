"""Object storage: the one place that opens ``file://`` and ``s3://``.

What every other module may rely on, on both kinds:

* A file is there whole or not at all: writes go to a temporary name and are renamed (``file://``) or are one
  PUT or one completed multipart upload (``s3://``). Temporary names are never listed.
* Every call ends: connecting and reading have time-outs, transient faults are retried with exponential
  backoff and reads go on by range from where they broke.
* Errors are of four kinds: ``FileNotFoundError`` with the full url; ``UserError`` for what the user can mend
  (bucket, credentials, endpoint; ``UnreadableObject`` where it is of the one file that is read; of a folder
  ``StorageRefused``: not permitted, too long a name); ``StorageFault`` when retries are used up (a full or read-only
  disk and a network mount that is away are faults too); ``BadData`` when bytes are not those expected.
* Credentials appear in no url, repr, log or error.
* A path that the store listed (``ExactPath``) is that of its file, whatever its name is.

A ``Storage`` holds configuration only; the S3 client is made on first use in each process, so that it may be
pickled to Ray tasks and loader processes (s3fs must not be used across a fork), and used from many threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from sharding.errors import BadData, StorageFault, UserError
from sharding.given_path import GivenPath
from sharding.storage_file import FileBackend, write_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# What one request of a streamed read or a download asks for: large enough to amortise its latency.
_BLOCK = 8 << 20
_BLOCKS_AT_ONCE = 3  # of one download: hides the latency of each


class ExactPath(str):
    """A path that is taken as it is, because the store itself gave it, or a job file.

    Keys of S3 are any text: ``a//b``, ``/a``, ``../a`` and ``./a`` are keys like others. All other paths are written
    by people and programs, who mean a path when they write these: they are cleaned, and may not lead out.
    """

    __slots__ = ()


class StoredFile(NamedTuple):
    """A file in a storage: ``path`` relative to the Storage (an ``ExactPath``), ``size`` in bytes."""

    path: str
    size: int


class Uploaded(NamedTuple):
    """What an upload sent: ``size`` in bytes and ``sha256`` (hex) of the bytes read from the source."""

    size: int
    sha256: str


class FileState(NamedTuple):
    """``size`` in bytes; ``version`` changes when the content does (the ETag on S3)."""

    size: int
    version: str


class StorageConfig(BaseModel):
    """Where to store, and how to get there. Everything but ``url`` concerns ``s3://`` only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: GivenPath = Field(description="file:///folder, a folder path, or s3://bucket/prefix")
    endpoint_url: str | None = Field(
        default=None, description="S3 endpoint; default: AWS_ENDPOINT_URL[_S3], then AWS"
    )
    region: str | None = Field(default=None, description="default: AWS_REGION, or the AWS profile")
    access_key: SecretStr | None = Field(
        default=None, description="default: AWS_ACCESS_KEY_ID, profile, instance role"
    )
    secret_key: SecretStr | None = Field(default=None, description="default: AWS_SECRET_ACCESS_KEY, ...")
    anonymous: bool = Field(default=False, description="read a public bucket without credentials")
    connect_timeout_s: float = Field(default=10, gt=0)
    read_timeout_s: float = Field(default=60, gt=0, description="longest silence of the server")
    attempts: int = Field(default=5, ge=1, description="tries of a request that fails by a transient fault")

    @field_validator("url")
    @classmethod
    def _normalise_url(cls, url: str) -> str:
        return _storage_url(url)

    @field_validator("endpoint_url")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        return None if endpoint is None else checked_endpoint(endpoint)

    @model_validator(mode="after")
    def _check_credentials(self) -> StorageConfig:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key must be given together")
        if self.anonymous and self.access_key is not None:
            raise ValueError("anonymous and access_key exclude each other")
        return self


def checked_endpoint(endpoint: str) -> str:
    """The url of an S3 server, without a slash at its end.

    Raises:
        ValueError: it is none, or holds credentials, which messages and records would show. It is not quoted.
    """
    try:
        parts = urlsplit(endpoint)
        has_host = bool(parts.hostname)
    except ValueError:
        has_host = False
    if "@" in endpoint:
        raise ValueError("must not hold credentials: use access_key and secret_key, or the AWS_* variables")
    if not has_host or parts.scheme not in ("http", "https"):
        raise ValueError("must be http://host[:port] or https://host[:port]")
    return endpoint.rstrip("/")


class Backend(Protocol):
    """What one kind of storage implements. Paths are relative; ``""`` is the root.

    ``exact_paths``: whether any text is a path, so that a listed one need not be clean.
    """

    exact_paths: ClassVar[bool]

    def url_of(self, path: str) -> str: ...
    def at(self, path: str) -> Backend: ...
    def local_path(self, path: str) -> Path | None: ...
    def check(self, *, write: bool) -> None: ...
    def state(self, path: str) -> FileState: ...
    def iterate(
        self, prefix: str, others: Callable[[str, str], None] | None = None
    ) -> Iterator[tuple[str, int]]: ...
    def read(self, path: str, offset: int, length: int | None, version: str | None) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool: ...
    def upload(self, source: Path, path: str) -> tuple[int, str]: ...
    def delete(self, path: str) -> None: ...
    def delete_tree(self, path: str) -> None: ...


class Storage:
    """A tree of files under one url. Paths are relative to it, with ``/``, and may not leave it."""

    def __init__(self, config: StorageConfig, _backend: Backend | None = None) -> None:
        self.config = config
        self._backend: Backend = _backend if _backend is not None else _make_backend(config)

    @property
    def url(self) -> str:
        """The normalised url, without a trailing slash and never with credentials."""
        return self._backend.url_of("")

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    def at(self, path: str) -> Storage:
        """The sub-tree at ``path`` (which need not exist)."""
        backend = self._backend.at(_clean(path))
        return Storage(self.config.model_copy(update={"url": backend.url_of("")}), backend)

    def resolve(self, path_or_url: str) -> Storage:
        """The storage at an absolute url or path (same S3 options), or, when relative, the sub-tree at it."""
        if "://" in path_or_url or path_or_url.startswith(("/", "~")):
            return Storage(self.config.model_copy(update={"url": normalise_url(path_or_url)}))
        return self.at(path_or_url)

    def url_of(self, path: str) -> str:
        """The full url of ``path``, for people and for records."""
        return self._backend.url_of(self._path(path))

    def local_path(self, path: str) -> Path | None:
        """The path on this machine, on ``file://``; None elsewhere."""
        return self._backend.local_path(self._path(path))

    def check(self, *, write: bool) -> None:
        """Try whether the storage can be read, and with ``write`` also written (the folder is then made).

        Raises:
            UserError: one line naming the url: missing folder or bucket, credentials refused, endpoint not
                reachable, not writable.
        """
        self._backend.check(write=write)

    def exists(self, path: str) -> bool:
        """Whether ``path`` is a file (a folder is none)."""
        try:
            self._backend.state(self._path(path))
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Size in bytes. FileNotFoundError (with the full url) when there is no such file."""
        return self._backend.state(self._path(path)).size

    def list(
        self, prefix: str = "", others: Callable[[str, str], None] | None = None
    ) -> Iterator[StoredFile]:
        """All files in the folder ``prefix`` and below, sorted by path (code points); none if there is no
        such folder.

        Streams: holds one folder (file://) or one page (s3://) at a time.

        Args:
            others: called with what is there but no file, and why: a link to nothing, a socket, a folder that cannot
                be read (its path ends with a slash). Without it such a folder raises an OSError.
        """
        for path, size in self._backend.iterate(_clean(prefix), others):
            yield StoredFile(ExactPath(path), size)

    def read_bytes(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """The ``length`` bytes from ``offset`` (to the end by default); fewer where the file ends before."""
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"offset and length must not be negative, got {offset} and {length}")
        return self._backend.read(self._path(path), offset, length, None)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write or replace a file, whole or not at all."""
        self._backend.write(_clean_file(path), data)

    def read_json(self, path: str) -> Any:
        """The JSON value in a file. ValueError naming the url when it is not JSON."""
        data = self.read_bytes(path)
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.url_of(path)} is not valid JSON ({error})") from None

    def write_json(self, path: str, value: Any) -> None:
        """Write canonical JSON (sorted keys, UTF-8, newline at the end): equal values are equal bytes."""
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False)
        self.write_bytes(path, text.encode("utf-8") + b"\n")

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Write a file only if there is none: of many callers at once exactly one gets True."""
        return self._backend.create(_clean_file(path), data)

    def download(
        self, path: str, destination: Path, *, size: int | None = None, sha256: str | None = None
    ) -> None:
        """Copy a file to this machine: temporary name, verify, rename. Nothing else is ever seen at
        ``destination``.

        Raises:
            BadData: ``size-mismatch`` or ``sha256-mismatch`` when the stored bytes are not those expected (a
                sha256 is tried twice, lest a fault of the network condemns a good file).
            FileNotFoundError, StorageFault, StorageRefused: missing; unreachable, or no room at the destination;
                not writable (names the path).
        """
        path = self._path(path)
        url = self._backend.url_of(path)
        for last in (False, True):
            state = self._backend.state(path)
            if size is not None and state.size != size:
                raise BadData("size-mismatch", f"{url} has {state.size} bytes, expected {size}")
            digest = hashlib.sha256()

            def blocks(state: FileState = state, digest: Any = digest) -> Iterator[bytes]:
                for block in self._read_ahead(path, state):
                    digest.update(block)
                    yield block
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise BadData(
                        "sha256-mismatch", f"{url} has sha256 {digest.hexdigest()}, expected {sha256}"
                    )

            try:
                write_file(destination, blocks())
                return
            except BadData as error:
                if last or error.cause != "sha256-mismatch":
                    raise

    def _read_ahead(self, path: str, state: FileState) -> Iterator[bytes]:
        """The blocks of a file in order, with the next ones on their way while one is being used."""
        offsets = range(0, state.size, _BLOCK)

        def read(offset: int) -> bytes:
            length = min(_BLOCK, state.size - offset)
            block = self._backend.read(path, offset, length, state.version)
            if len(block) != length:
                end = offset + len(block)
                raise BadData("size-mismatch", f"{self.url_of(path)} ended at byte {end} of {state.size}")
            return block

        if len(offsets) <= 1 or self.local_path(path) is not None:
            yield from map(read, offsets)
            return
        running: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_BLOCKS_AT_ONCE, thread_name_prefix="download") as pool:
            try:
                for offset in offsets:
                    running.append(pool.submit(read, offset))
                    if len(running) == _BLOCKS_AT_ONCE:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def upload(self, source: Path, path: str) -> Uploaded:
        """Copy a local file into the storage and verify the stored size; the sha256 is of the bytes that were
        sent.
        """
        return Uploaded(*self._backend.upload(source, _clean_file(path)))

    def copy(self, path: str, to: str, *, size: int, sha256: str) -> None:
        """Copy a file within the storage, verified on its way; ``to`` is there whole or not at all.

        Raises:
            BadData, FileNotFoundError, StorageFault, StorageRefused: as ``download``.
        """
        beside = self.local_path(to)
        if beside is not None:  # one pass: read, hashed, written
            self.download(path, beside, size=size, sha256=sha256)
            return
        with tempfile.TemporaryDirectory(prefix="glscl-copy-") as folder:
            here = Path(folder) / "file"
            self.download(path, here, size=size, sha256=sha256)
            if self.upload(here, to) != (size, sha256):
                raise StorageFault(f"{self.url_of(to)} arrived changed")

    def open(self, path: str) -> BinaryIO:
        """A seekable binary file over range reads; a file replaced while it is read raises StorageFault."""
        path = self._path(path)
        return io.BufferedReader(_RangeFile(self._backend, path, self._backend.state(path)), _BLOCK)

    def _path(self, path: str) -> str:
        exact = isinstance(path, ExactPath) and self._backend.exact_paths
        return path if exact else _clean(path)

    def delete(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or with ``recursive`` a folder and all below it. What is not there is no error.

        Others may delete the same folder at the same time; what they write into it meanwhile may stay.
        """
        if recursive:
            self._backend.delete_tree(_clean(path))
        else:
            self._backend.delete(_clean_file(path))


class _RangeFile(io.RawIOBase):
    """Random access to a stored file by range reads, pinned to the version seen at opening."""

    def __init__(self, backend: Backend, path: str, state: FileState) -> None:
        self._backend, self._path, self._state, self._position = backend, path, state, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._state.size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._state.size - self._position)
        if length <= 0:
            return 0
        data = self._backend.read(self._path, self._position, length, self._state.version)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_storage(url_or_config: str | Path | StorageConfig) -> Storage:
    """A Storage from a url, a folder path or a StorageConfig. UserError when the url is none of these."""
    if isinstance(url_or_config, StorageConfig):
        return Storage(url_or_config)
    return Storage(StorageConfig(url=_storage_url(str(url_or_config))))


def normalise_url(url: str) -> str:
    """``file:///absolute/path`` or ``s3://bucket/prefix``, without trailing slashes. UserError for anything else.

    A prefix of S3 stays as it is otherwise: ``a//b`` and ``a/b`` are two.
    """
    if not url.strip() or "\0" in url:
        raise UserError("the storage url is empty: give a folder, file:///folder or s3://bucket/prefix")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(os.path.abspath(os.path.expanduser(url))).as_uri()
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise UserError(f"{url}: a file url has three slashes before its absolute path (file:///folder)")
        return Path(os.path.abspath("/" + unquote(path, errors="surrogateescape"))).as_uri()
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if "@" in bucket or ":" in bucket:
            # Not quoted back: what stands before the @ is a secret.
            raise UserError(
                "an s3 url must not hold credentials or a port: use access_key, secret_key, endpoint_url"
            )
        if not bucket:
            raise UserError(f"{url}: names no bucket (s3://bucket/prefix)")
        return f"s3://{bucket}/{prefix}".rstrip("/")
    raise UserError(f"cannot open {scheme}:// storage: use a folder, file:///folder or s3://bucket/prefix")


def _storage_url(url: str) -> str:
    """``normalise_url``, of a storage that is written to: its prefix is a path without empty, . and .. parts."""
    url = normalise_url(url)
    if url.startswith("s3://"):
        prefix = url.removeprefix("s3://").partition("/")[2]
        if prefix and _clean(prefix) != prefix:
            raise UserError(f"{url}: the prefix has an empty part or '.' between its slashes: leave it out")
    return url


def _make_backend(config: StorageConfig) -> Backend:
    scheme, _, rest = config.url.partition("://")
    if scheme == "file":
        return FileBackend(Path(unquote(rest, errors="surrogateescape")), config.attempts)
    from sharding.storage_s3 import S3Backend  # slow to import, and not needed for folders

    bucket, _, prefix = rest.partition("/")
    return S3Backend(config, bucket, prefix)


def _clean(path: str) -> str:
    """``path`` without empty and ``.`` components; it may not climb out of the storage."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise UserError(f"{path!r} leads out of the storage: '..' is not allowed in a path")
    if path.startswith("/") and "/".join(parts):
        raise UserError(f"{path!r} is absolute: paths in a storage are relative to it")
    return posixpath.join(*parts) if parts else ""


def _clean_file(path: str) -> str:
    cleaned = _clean(path)
    if not cleaned or path.endswith("/"):
        raise ValueError(f"{path!r} is no name for a file")
    return cleaned
