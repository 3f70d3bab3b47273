"""Servers on loopback are asked directly, whatever proxy the environment names for the rest of the world.

A proxy cannot reach this machine's loopback: it would ask its own. ``requests`` (Ray's job server, MLflow),
``urllib`` and botocore all read ``NO_PROXY``.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")  # as urllib and requests compare them
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means the machine that it is said on."""
    bare = host.strip("[]").lower().rstrip(".")
    if bare == "localhost" or bare.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def direct_environment(*urls: str) -> dict[str, str]:
    """``NO_PROXY`` in both spellings, with loopback added; nothing where the environment names no proxy.

    Args:
        urls: servers that are asked; of those the hosts on loopback are named too (127.0.0.2, ...).
    """
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return {}
    # Where both are set, the small one counts for requests and urllib; the other must then say the same.
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if given.strip() == "*":
        return {}
    named = [one.strip() for one in given.split(",") if one.strip()]
    hosts = (urlsplit(url).hostname or "" for url in urls)
    wanted = [*_HOSTS, *(host for host in hosts if is_loopback(host))]
    value = ",".join(dict.fromkeys([*named, *wanted]))
    return {"no_proxy": value, "NO_PROXY": value}


def ask_loopback_directly(*urls: str) -> None:
    """The same for this process and those it starts."""
    os.environ.update(direct_environment(*urls))


def proxy_variable(url: str) -> str | None:
    """Name of the variable whose proxy is used for a url; None where it is asked directly."""
    from urllib.request import (  # type: ignore[attr-defined]
        getproxies_environment,
        proxy_bypass_environment,
    )

    parts = urlsplit(url)
    proxies = getproxies_environment()
    if proxy_bypass_environment(parts.netloc.rpartition("@")[2], proxies):
        return None
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        if name.partition("_")[0] in proxies:
            return name if os.environ.get(name) else name.upper()
    return None
