"""Reading the media and sidecars that a source lists: bounded bytes and time, several at once, in order."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from sharding.config import FetchConfig
from sharding.errors import BadData, UserError
from sharding.sources.base import Input
from sharding.storage import Storage

T = TypeVar("T")
R = TypeVar("R")

MAX_SIDECAR_BYTES = 1 << 20
_BLOCK = 1 << 20
_SECRETS = ("x-amz-", "x-goog-", "sig", "signature", "token", "awsaccesskeyid", "key-pair-id", "policy")


@dataclass(frozen=True)
class Fetched:
    """An input with its bytes, or with the fault that kept them away."""

    input: Input
    media: bytes = b""
    sidecar: bytes | None = None
    fault: BadData | None = None


class Fetcher:
    """Reads inputs of one source. Relative addresses are below ``base``; others are opened as they are."""

    def __init__(self, base: Storage, config: FetchConfig, max_bytes: int) -> None:
        self._base, self._config, self._max_bytes = base, config, max_bytes
        self._roots: dict[str, Storage] = {}
        # Only these handlers: no file:, ftp: or data: urls, neither given nor by a redirect.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def fetch_all(self, inputs: Iterable[Input]) -> Iterator[Fetched]:
        """The inputs in their order; at most ``threads`` of them are in memory."""
        with ThreadPoolExecutor(self._config.threads, thread_name_prefix="fetch") as pool:
            yield from _ordered(pool, self.fetch, inputs, self._config.threads)

    def fetch(self, item: Input) -> Fetched:
        """One input. Faults of the input are returned; faults of the storage are raised."""
        if item.problem is not None:
            return Fetched(item, fault=BadData(item.problem, public_address(item.address)))
        try:
            sidecar = None if item.sidecar is None else self._sidecar(item.sidecar)
            return Fetched(item, media=self._media(item.address), sidecar=sidecar)
        except BadData as fault:
            return Fetched(item, fault=fault)

    def _sidecar(self, path: str) -> bytes:
        try:
            return _whole(self._base, path, MAX_SIDECAR_BYTES)
        except FileNotFoundError:
            raise BadData("caption-missing", f"no {path} beside the media file") from None

    def _media(self, address: str) -> bytes:
        if address.startswith(("http://", "https://")):
            return self._download(address)
        try:
            storage, path = self._located(address)
        except UserError as error:
            raise BadData("bad-address", str(error)) from None
        try:
            return _whole(storage, path, self._max_bytes)
        except FileNotFoundError:
            raise BadData("missing-file", address) from None

    def _located(self, address: str) -> tuple[Storage, str]:
        """The storage and the path in it. One Storage a bucket, so that its connections are shared."""
        if ".." in address.split("/") or "\0" in address:
            raise UserError(f"the path {address!r} holds '..'")
        if "://" not in address and not address.startswith("/"):
            return self._base, address
        scheme, _, rest = address.rpartition("://") if "://" in address else ("file", "", address)
        if scheme == "s3":
            bucket, _, path = rest.partition("/")
            root = f"s3://{bucket}"
        elif scheme == "file":
            path = rest.partition("/")[2]
            root, path = "file:///", unquote(path) if "://" in address else path
        else:
            raise UserError(f"cannot open {scheme}:// addresses: {public_address(address)}")
        if root not in self._roots:
            self._roots[root] = self._base.resolve(root)
        return self._roots[root], path

    def _download(self, url: str) -> bytes:
        """The body of an http(s) url; transient faults are tried again."""
        for attempt in range(1, self._config.attempts + 1):
            try:
                return self._body(url)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise BadData("missing-file", f"{public_address(url)}: HTTP {error.code}") from None
                fault = f"HTTP {error.code}"
                if error.code < 500 and error.code not in (408, 425, 429):
                    break
            except (
                OSError,
                ValueError,
                EOFError,
            ) as error:  # URLError, time-outs, cut bodies, broken headers
                fault = str(getattr(error, "reason", "") or error) or type(error).__name__
            except http.client.HTTPException as error:  # no OSError, e.g. IncompleteRead, BadStatusLine
                fault = type(error).__name__
            if attempt < self._config.attempts:
                time.sleep(min(0.5 * 2**attempt, 5))
        raise BadData("fetch-failed", f"{public_address(url)}: {fault}")

    def _body(self, url: str) -> bytes:
        deadline = time.monotonic() + 3 * self._config.timeout_s
        request = urllib.request.Request(url, headers={"User-Agent": "glscl-pipeline"})
        blocks, size = [], 0
        with self._opener.open(request, timeout=self._config.timeout_s) as response:
            announced = response.headers.get("Content-Length", "")
            expected = int(announced) if announced.isdigit() else None
            while block := response.read1(_BLOCK):
                blocks.append(block)
                size += len(block)
                if size > self._max_bytes:
                    raise BadData("too-many-bytes", f"{public_address(url)}: more than {self._max_bytes}")
                if time.monotonic() > deadline:
                    raise TimeoutError("the server is too slow")
        if expected is not None and size < expected:
            raise EOFError(f"the body ended at byte {size} of {expected}")
        return b"".join(blocks)


def _whole(storage: Storage, path: str, limit: int) -> bytes:
    """A stored file of at most ``limit`` bytes."""
    try:
        data = storage.read_bytes(path, 0, limit + 1)
    except (PermissionError, IsADirectoryError) as error:
        raise BadData("unreadable-file", f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise BadData("too-many-bytes", f"{path}: more than {limit}")
    return data


def _ordered(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[R]:
    """``map`` over a pool with at most ``window`` results waiting."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def public_address(address: str) -> str:
    """The address as it may be recorded and shown: no user name, password or signature."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    query = parts.query
    if any(key.lower().startswith(_SECRETS) for key, _ in parse_qsl(query)):
        pairs = parse_qsl(query, keep_blank_values=True)
        query = urlencode([(key, value) for key, value in pairs if not key.lower().startswith(_SECRETS)])
    return urlunsplit((parts.scheme, host, parts.path, query, ""))
