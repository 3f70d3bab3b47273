"""Connections to hosts that strangers name: which addresses may be reached, and keeping connections alive.

A url in a web corpus may name the metadata server of the cloud, or a router in the next room, by its address
or by a name that resolves to it, now or the second time. So a name is resolved once a connection, each address
is judged, and the connection goes to the address that was judged; TLS still verifies the name.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.request
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from sharding.errors import BadData

_MOST_ADDRESSES = 4  # tried of one name
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Origin(NamedTuple):
    """What a connection belongs to."""

    secure: bool
    host: str
    port: int


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where it wraps an IPv4 address in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, as the system gives them. socket.gaierror when there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def allowed_addresses(origin: Origin, allow_private: bool) -> list[str]:
    """The addresses of a host that may be connected to.

    Raises:
        BadData: ``private-address``: there are none but those of private networks and of this machine.
        socket.gaierror: the name has no address.
    """
    addresses = resolve(origin.host, origin.port)
    allowed = [address for address in addresses if allow_private or is_public(address)]
    if not allowed:
        raise BadData(
            "private-address", f"{origin.host} is {addresses[0]} (fetch.allow_private: true allows it)"
        )
    return allowed[:_MOST_ADDRESSES]


def _connect(origin: Origin, timeout: float, allow_private: bool) -> socket.socket:
    addresses = allowed_addresses(origin, allow_private)
    for number, address in enumerate(addresses, start=1):
        try:
            connected = socket.create_connection((address, origin.port), timeout)
            break
        except OSError:
            if number == len(addresses):
                raise
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


class _Plain(http.client.HTTPConnection):
    def __init__(self, origin: Origin, timeout: float, allow_private: bool) -> None:
        super().__init__(origin.host, origin.port, timeout=timeout)
        self._origin, self._timeout, self._allow_private = origin, timeout, allow_private

    def connect(self) -> None:
        self.sock = _connect(self._origin, self._timeout, self._allow_private)


class _Secure(http.client.HTTPSConnection):
    def __init__(self, origin: Origin, timeout: float, allow_private: bool, tls: ssl.SSLContext) -> None:
        super().__init__(origin.host, origin.port, timeout=timeout, context=tls)
        self._origin, self._timeout, self._allow_private, self._tls = origin, timeout, allow_private, tls

    def connect(self) -> None:
        plain = _connect(self._origin, self._timeout, self._allow_private)
        # Visible before the handshake, so that ``cut`` reaches it.
        wrapped = self._tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = wrapped
        wrapped.do_handshake()


def cut(connected: socket.socket | None) -> None:
    """End a connection from another thread: who reads from it gets its end at once."""
    if connected is not None:
        with contextlib.suppress(OSError):  # it has ended by itself
            # Not SSLSocket's own, which takes the TLS state away from under the reading thread.
            socket.socket.shutdown(connected, socket.SHUT_RDWR)


class ConnectionPool:
    """Opens connections, and keeps at most ``capacity`` idle ones for reuse; safe to use from many threads.

    The environment's proxies (``http_proxy``, ``https_proxy``, ``no_proxy``) are used. Through a proxy the name
    is resolved and judged here all the same, where it can be; which address the proxy then takes is its affair.
    """

    def __init__(self, timeout: float, allow_private: bool, capacity: int) -> None:
        self._timeout, self._allow_private, self._capacity = timeout, allow_private, capacity
        self._tls: ssl.SSLContext | None = None
        self._proxies = urllib.request.getproxies()
        self._stacks: dict[Origin, list[http.client.HTTPConnection]] = {}
        self._idle: dict[http.client.HTTPConnection, Origin] = {}  # oldest first
        self._lock = threading.Lock()

    def take(self, origin: Origin) -> http.client.HTTPConnection | None:
        """An idle connection, if there is one. It may have been closed by the host meanwhile."""
        with self._lock:
            stack = self._stacks.get(origin)
            if not stack:
                return None
            connection = stack.pop()
            del self._idle[connection]
            return connection

    def give(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            self._stacks.setdefault(origin, []).append(connection)
            self._idle[connection] = origin
            # The one that is idle for the longest; after ``close`` that is the only one.
            dropped = next(iter(self._idle)) if len(self._idle) > self._capacity else None
            if dropped is not None:
                stack = self._stacks[self._idle.pop(dropped)]
                stack.remove(dropped)
        if dropped is not None:
            dropped.close()

    def new(self, origin: Origin) -> http.client.HTTPConnection:
        """A connection that connects at its first request."""
        proxy = self._proxy(origin)
        if proxy is not None:
            return self._through(proxy, origin)
        if origin.secure:
            return _Secure(origin, self._timeout, self._allow_private, self._context())
        return _Plain(origin, self._timeout, self._allow_private)

    def is_proxied(self, origin: Origin) -> bool:
        """Whether requests go to a proxy, which wants whole urls of plain http."""
        return self._proxy(origin) is not None

    def close(self) -> None:
        """Close the idle connections, and those that are given back later."""
        with self._lock:
            self._capacity = 0
            idle = list(self._idle)
            self._idle.clear()
            self._stacks.clear()
        for connection in idle:
            connection.close()

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            return self._tls

    def _proxy(self, origin: Origin) -> str | None:
        if not self._proxies:
            return None
        proxy = self._proxies.get("https" if origin.secure else "http") or self._proxies.get("all")
        return None if proxy is None or urllib.request.proxy_bypass(origin.host) else proxy

    def _through(self, proxy: str, origin: Origin) -> http.client.HTTPConnection:
        if not self._allow_private:
            # Where the name cannot be resolved, it is of a network whose names only the proxy knows.
            with contextlib.suppress(socket.gaierror):
                allowed_addresses(origin, allow_private=False)
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        place = (parts.hostname or "", parts.port or 80)
        if not origin.secure:
            return http.client.HTTPConnection(*place, timeout=self._timeout)
        tunnel = http.client.HTTPSConnection(*place, timeout=self._timeout, context=self._context())
        tunnel.set_tunnel(origin.host, origin.port, headers=proxy_authorization(proxy))
        return tunnel

    def proxy_headers(self, origin: Origin) -> dict[str, str]:
        """What a request of plain http adds for the proxy."""
        proxy = None if origin.secure else self._proxy(origin)
        return {} if proxy is None else proxy_authorization(proxy)


def basic_authorization(user: str, password: str) -> str:
    """The value of an Authorization header."""
    from base64 import b64encode

    return "Basic " + b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode("ascii")


def proxy_authorization(proxy: str) -> dict[str, str]:
    """The header that a proxy's url with a user name asks for."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.username is None:
        return {}
    return {"Proxy-Authorization": basic_authorization(parts.username, parts.password or "")}
