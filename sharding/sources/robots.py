"""What a host's robots.txt and the headers of its answers ask of us."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.robotparser import RobotFileParser

LARGEST = 500 << 10  # RFC 9309: a crawler reads at least this much
_MOST_HOSTS = 10_000
_KEPT_S = 24 * 3600  # RFC 9309: not used longer
# Directives of X-Robots-Tag that have a value; any other word before a colon is a crawler's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def opted_out(tags: Iterable[str], agent: str, directives: Iterable[str]) -> str | None:
    """The first of ``directives`` that X-Robots-Tag headers give to everyone or to ``agent``, or None.

    Args:
        tags: the values of all X-Robots-Tag headers, e.g. ``"noai, noimageai"`` or ``"otherbot: noindex"``;
            a name holds for what follows it in its header.
        agent: our name, as in the User-Agent before the slash.
        directives: in lower case; ``none`` counts as ``noindex``.
    """
    wanted = frozenset(directives)
    for tag in tags:
        addressed = True
        for part in tag.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _VALUED:
                addressed = name.strip() in ("*", agent.lower())
                part = rest
            directive = part.strip()
            if addressed and (directive in wanted or (directive == "none" and "noindex" in wanted)):
                return directive
    return None


class RobotsCache:
    """The rules of the hosts that this process met, asked for once a day and host, bounded in number."""

    def __init__(self) -> None:
        self._rules: OrderedDict[tuple[str, str], tuple[float, RobotFileParser]] = OrderedDict()
        self._lock = threading.Lock()
        self._asking: dict[tuple[str, str], threading.Lock] = {}

    def allows(self, url: str, root: str, agent: str, read: Callable[[], bytes | None]) -> bool:
        """Whether ``agent`` may fetch ``url``.

        Args:
            root: scheme, host and port of ``url``.
            read: gives the host's robots.txt (empty: it has none), or None where it could not be asked: then
                nothing there may be fetched, as RFC 9309 says.
        """
        key = (root, agent)
        with self._lock:
            asking = self._asking.setdefault(key, threading.Lock())
        with asking:  # of many threads one asks
            rules = self._kept(key)
            if rules is None:
                rules = _parsed(read())
                self._keep(key, rules)
        return rules.can_fetch(agent, url)

    def _kept(self, key: tuple[str, str]) -> RobotFileParser | None:
        with self._lock:
            since, rules = self._rules.get(key, (0.0, None))
        return rules if rules is not None and time.monotonic() - since < _KEPT_S else None

    def _keep(self, key: tuple[str, str], rules: RobotFileParser) -> None:
        with self._lock:
            self._rules[key] = (time.monotonic(), rules)
            self._rules.move_to_end(key)
            if len(self._rules) > _MOST_HOSTS:
                oldest, _ = self._rules.popitem(last=False)
                self._asking.pop(oldest, None)


def _parsed(text: bytes | None) -> RobotFileParser:
    rules = RobotFileParser()
    lines = ["User-agent: *", "Disallow: /"] if text is None else text.decode("utf-8", "replace").splitlines()
    rules.parse(lines)
    return rules
