"""Fetching http(s) urls of a corpus: kept-alive connections, limits of time, size and requests a host, and
each fault under its own cause.

Built on ``http.client``: at some hundred small files a second, what a request costs in Python is what limits it.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from sharding.errors import BadData
from sharding.sources.budget import ByteBudget, Cancelled, Lease
from sharding.sources.config import FetchConfig
from sharding.sources.connections import ConnectionPool, Origin, basic_authorization, cut
from sharding.sources.robots import LARGEST, RobotsCache, opted_out

_BLOCK = 64 << 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 503})
_TRANSIENT = frozenset({408, 425, 500, 502, 504}) | _BUSY
_GONE = frozenset({404, 410})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 5.0
# What is no letter, digit or one of these is percent-encoded; % stays, since urls mostly are encoded already.
_SAFE = "/%:=&?~#+!$,;'@()*[]"
_UNSIZED_STEP = 1 << 20

_robots = RobotsCache()  # of this process


class _Target(NamedTuple):
    url: str
    origin: Origin
    path: str  # with the query
    authorization: str | None


class _Transient(Exception):
    """A fault that may be gone at the next try. ``wait``: seconds that the host asked for."""

    def __init__(self, cause: str, detail: str, wait: float | None = None) -> None:
        super().__init__(cause, detail)
        self.cause, self.detail, self.wait = cause, detail, wait


class _NoRoom(Exception):
    """The budget has no room for this body now. ``size``: bytes to reserve before asking again."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class _Host:
    """How many requests one host has now, and until when it asked to be left alone."""

    def __init__(self, most: int) -> None:
        self.slots = threading.Semaphore(most)
        self.rests_until = 0.0


class Downloader:
    """Fetches urls; one for a task, used from many threads. ``close`` it."""

    def __init__(self, config: FetchConfig, max_bytes: int) -> None:
        self._config, self._max_bytes = config, max_bytes
        self._token = config.user_agent.partition("/")[0]
        self._headers = {"User-Agent": config.agent, "Accept": "*/*"}
        self._pool = ConnectionPool(config.timeout_s, config.allow_private, capacity=2 * config.threads)
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()
        self._clock = _Clock(3 * config.timeout_s)
        self._closed = threading.Event()
        self._usual = float(_BLOCK)  # bytes of a body, a running mean

    def download(self, url: str, lease: Lease | None = None) -> bytes:
        """The body at ``url``, with redirects followed. Faults are told without the url: the caller has it.

        Args:
            lease: holds the bytes while they are in memory; it waits for room before it asks the host.

        Raises:
            BadData: ``missing-file`` (404, 410), ``http-NNN``, ``too-many-bytes``, ``timed-out``, ``cut-body``,
                ``no-such-host``, ``connection-failed``, ``tls-failed``, ``bad-response``, ``encoded-body``,
                ``too-many-redirects``, ``bad-address``, ``private-address``, ``opted-out``, ``robots-txt``.
            Cancelled: ``close`` was called.
        """
        lease = lease or ByteBudget(self._max_bytes).lease(0)
        lease.reserve(max(lease.size, min(int(self._usual), self._max_bytes)))
        attempt = 1
        while True:
            try:
                body = self._follow(_target(url), lease)
            except _NoRoom as full:
                # Not waited for with the answer in hand: it would keep a place at the host that the file
                # which is next in order may be waiting for.
                lease.reserve(full.size)
                continue
            except _Transient as fault:
                wait = fault.wait
                if wait is None:
                    wait = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S)
                if attempt == self._config.attempts or wait > self._config.timeout_s:
                    raise BadData(fault.cause, fault.detail) from None
            else:
                self._usual += (len(body) - self._usual) / 16
                lease.reserve(len(body))
                return body
            attempt += 1
            self._sleep(wait)

    def close(self) -> None:
        """Wake who waits, and close the connections."""
        self._closed.set()
        self._clock.stop()
        self._pool.close()

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise Cancelled

    def _follow(self, target: _Target, lease: Lease) -> bytes:
        for _ in range(self._config.redirects + 1):
            if self._config.robots and not self._robots_allow(target):
                raise BadData("robots-txt", f"{target.origin.host}/robots.txt keeps {self._token} out")
            answer = self._get(target, lease, self._max_bytes)
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise BadData("too-many-redirects", f"more than {self._config.redirects}")

    def _robots_allow(self, target: _Target) -> bool:
        root = target.url[: len(target.url) - len(target.path)]

        def read() -> bytes | None:
            asked = _target(f"{root}/robots.txt")
            try:
                for _ in range(self._config.redirects + 1):
                    answer = self._get(asked, ByteBudget(LARGEST).lease(0), LARGEST, page=False)
                    if isinstance(answer, bytes):
                        return answer
                    asked = answer
            except _Transient:
                return None
            except BadData as fault:
                refused = fault.cause == "missing-file" or fault.cause.startswith("http-4")
                return b"" if refused else None
            return b""  # RFC 9309: too many redirects are as if there were none

        return _robots.allows(target.url, root, self._token, read)

    def _get(self, target: _Target, lease: Lease, limit: int, *, page: bool = True) -> bytes | _Target:
        """The body, or where it is said to be. ``page``: it is a corpus's, and so its host may opt out."""
        host = self._host(target.origin.host)
        with host.slots:
            self._sleep(max(0.0, host.rests_until - time.monotonic()))
            connection, response, ticket = self._ask(target)
            try:
                answer = self._read(response, target, lease, limit, page)
                if ticket.expired:
                    raise TimeoutError  # cut by the clock: a body without a length ends there as if it were whole
                return answer
            except _Transient as fault:
                if fault.wait is not None:
                    rest = time.monotonic() + min(fault.wait, self._config.timeout_s)
                    host.rests_until = max(host.rests_until, rest)
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _understood(error, ticket.expired) from None
            finally:
                self._clock.release(ticket)
                # What was read to its end leaves the connection as it was; anything else ends it.
                if response.isclosed() and not response.will_close and not ticket.expired:
                    self._pool.give(target.origin, connection)
                else:
                    connection.close()

    def _host(self, name: str) -> _Host:
        with self._lock:
            return self._hosts.setdefault(name, _Host(self._config.per_host))

    def _ask(self, target: _Target) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, _Ticket]:
        headers = self._headers
        if target.authorization is not None:
            headers = {**headers, "Authorization": target.authorization}
        path = target.path
        if not target.origin.secure and self._pool.is_proxied(target.origin):
            headers, path = {**headers, **self._pool.proxy_headers(target.origin)}, target.url
        while True:
            reused = self._pool.take(target.origin)
            connection = reused or self._pool.new(target.origin)
            ticket = self._clock.lease(connection)
            try:
                connection.request("GET", path, headers=headers)
                ticket.socket = connection.sock
                return connection, connection.getresponse(), ticket
            except BaseException as error:
                self._clock.release(ticket)
                connection.close()
                ended = isinstance(error, ConnectionError | ssl.SSLError)
                if reused is not None and ended and not ticket.expired:
                    continue  # an idle connection that the host had closed; the next one, or a new one, is not
                if isinstance(error, OSError | http.client.HTTPException | ValueError):
                    raise _understood(error, ticket.expired) from None
                raise

    def _read(
        self, response: http.client.HTTPResponse, target: _Target, lease: Lease, limit: int, page: bool
    ) -> bytes | _Target:
        status = response.status
        if status in _REDIRECTS and (location := response.getheader("Location")):
            if response.length is not None and response.length <= _BLOCK:
                response.read()  # so that the connection can be used again
            return _target(urljoin(target.url, location))
        if status in _TRANSIENT:
            wait = _retry_after(response.getheader("Retry-After")) if status in _BUSY else None
            raise _Transient(f"http-{status}", response.reason or "", wait)
        if status not in (200, 203):
            if response.length is not None and response.length <= _BLOCK:
                response.read()
            raise BadData("missing-file" if status in _GONE else f"http-{status}", f"HTTP {status}")
        if page and self._config.opt_out:
            tags = response.headers.get_all("X-Robots-Tag")
            if tags and (directive := opted_out(tags, self._token, self._config.opt_out)):
                raise BadData("opted-out", f"X-Robots-Tag: {directive}")
        encoding = response.getheader("Content-Encoding")
        if encoding and encoding.strip().lower() != "identity":
            # It was not asked for; and a small body may unpack to any size.
            raise BadData("encoded-body", encoding.strip()[:40])
        if response.length is not None and response.length > limit:
            raise BadData("too-many-bytes", f"{response.length}, more than {limit}")
        return _body(response, lease, limit)


def _body(response: http.client.HTTPResponse, lease: Lease, limit: int) -> bytes:
    if response.length is not None:
        if not lease.try_reserve(response.length):
            raise _NoRoom(response.length)
        return response.read()
    blocks, size = [], 0
    while block := response.read1(_BLOCK):
        size += len(block)
        if size > limit:
            raise BadData("too-many-bytes", f"more than {limit}")
        if size > lease.size and not lease.try_reserve(size):
            raise _NoRoom(min(limit, 2 * size + _UNSIZED_STEP))
        blocks.append(block)
    return b"".join(blocks)


def _understood(error: Exception, expired: bool) -> _Transient | BadData:
    """The cause of a failed request, and whether it is worth another try."""
    if expired or isinstance(error, TimeoutError):
        return _Transient("timed-out", "the server is too slow")
    if isinstance(error, http.client.IncompleteRead):
        return _Transient("cut-body", f"the body ended at byte {len(error.partial)}")
    if isinstance(error, socket.gaierror):
        detail = error.strerror or "no address"
        if error.errno == socket.EAI_AGAIN:
            return _Transient("no-such-host", detail)
        return BadData("no-such-host", detail)
    if isinstance(error, ssl.SSLEOFError):
        return _Transient("connection-failed", "the connection ended early")
    if isinstance(error, ssl.SSLError):
        return BadData("tls-failed", getattr(error, "verify_message", "") or error.reason or "TLS")
    if isinstance(error, OSError):
        return _Transient("connection-failed", error.strerror or str(error) or type(error).__name__)
    if isinstance(error, http.client.InvalidURL | UnicodeError):
        return BadData("bad-address", "not a url")
    return BadData("bad-response", type(error).__name__)


def _target(url: str) -> _Target:
    """A url, taken apart. BadData ``bad-address`` when it is none of http(s)."""
    try:
        parts = urlsplit(url.strip())
        secure, host, port = parts.scheme == "https", parts.hostname or "", parts.port
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError:  # also UnicodeError
        raise BadData("bad-address", "not a url") from None
    if parts.scheme not in ("http", "https") or not host:
        raise BadData(
            "bad-address", f"a url of {parts.scheme or 'no scheme'}: only http and https are fetched"
        )
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_SAFE)
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port is not None else ""
    authorization = None
    if parts.username is not None:
        authorization = basic_authorization(parts.username, parts.password or "")
    origin = Origin(secure, host, port or (443 if secure else 80))
    return _Target(f"{parts.scheme}://{place}{path}", origin, path, authorization)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value[:9])
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


class _Ticket:
    """One request in hand. ``socket``: once it is connected; a response may outlive its connection's own."""

    __slots__ = ("connection", "deadline", "expired", "socket")

    def __init__(self, connection: http.client.HTTPConnection, deadline: float) -> None:
        self.connection, self.deadline, self.expired = connection, deadline, False
        self.socket: socket.socket | None = None

    def cut(self) -> None:
        """Let the thread that waits for the host find the end of the connection."""
        cut(self.socket or self.connection.sock)


class _Clock:
    """Ends requests that last longer than ``seconds``. A socket's time-out is of one silence: a host that sends
    a byte now and then would keep a thread for ever, also inside headers and handshakes.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tickets: dict[int, _Ticket] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def lease(self, connection: http.client.HTTPConnection) -> _Ticket:
        ticket = _Ticket(connection, time.monotonic() + self._seconds)
        with self._lock:
            if self._stopped.is_set():
                raise Cancelled
            self._tickets[id(ticket)] = ticket
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fetch-clock", daemon=True)
                self._thread.start()
        return ticket

    def release(self, ticket: _Ticket) -> None:
        with self._lock:
            self._tickets.pop(id(ticket), None)

    def stop(self) -> None:
        """Give out no more tickets, and end the requests in hand."""
        with self._lock:
            self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 8)):
            self._cut_late(time.monotonic())
        while self._cut_late(float("inf")):
            time.sleep(0.05)  # one that is being connected cannot be cut yet

    def _cut_late(self, now: float) -> int:
        with self._lock:
            late = [ticket for ticket in self._tickets.values() if ticket.deadline <= now]
        for ticket in late:
            ticket.expired = True
            ticket.cut()
        return len(late)
