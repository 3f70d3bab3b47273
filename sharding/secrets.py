"""What of an address may be seen: the one place that decides what is a secret in it, for data and pipeline alike.

An address is read as those read it who use it: of a database as SQLAlchemy does, in whose passwords ``/``, ``?`` and
``#`` may stand, else as RFC 3986 says, where the host ends at the first of these. User and password reach up to the
last ``@`` before the host; where it cannot be told which ``@`` that is, too much is masked rather than too little.

    postgresql://me:pass/word@host/db?sslpassword=x
    without_credentials  ->  postgresql://***@host/db?sslpassword=***      for people
    without_userinfo     ->  postgresql://host/db                          still to be opened
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_plus

MASK = "***"

#: Of databases (with SQLAlchemy's name of the driver after a ``+``).
_DATABASES = frozenset(
    {
        "cockroachdb",
        "db2",
        "mariadb",
        "mssql",
        "mysql",
        "oracle",
        "postgres",
        "postgresql",
        "redshift",
        "sqlite",
    }
)
#: Addresses of files: their ``?`` and ``#`` are part of a name.
_FILES = frozenset({"file", "s3"})
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*)://")
#: A host, maybe with a port, and the marks that may follow it in a sentence.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^\s:@\[\]/?#]*)(:[0-9]*)?[)\]}>\"',;.:`]*(?=[\s/?#]|$)")
#: User and password as SQLAlchemy's ``make_url`` finds them.
_SQL_USER = re.compile(r"[^:/\s]*(:[^@]*)?@")
#: Names of parameters whose values are secrets: in an address, and in a sentence.
_SECRET_PARAMETER = re.compile(
    r"pass|pwd|secret|token|credential|signature|api[-_]?key|access[-_]?key|private[-_]?key|account[-_]?key|auth"
    r"|odbc_connect|jwt|cookie|^(sig|key|dsn|x-amz-.*|x-goog-.*|key-pair-id|policy)$",
    re.IGNORECASE,
)
_SECRET_WORD = re.compile(
    r"(^|[-_.])(password|passwd|pwd|secret|token|(api|access|private)[-_]?key)$", re.IGNORECASE
)
_PARAMETER = re.compile(r"([?&;{,\s]|^)([\w.%-]+)(\s*=\s*)(\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^&;#\s\"'<>)}]*)")


def without_credentials(text: str) -> str:
    """``text`` with what is secret in the addresses in it, or in it as an address, replaced by ``***``."""
    return _rewritten(text, user=f"{MASK}@", value=MASK)


def without_userinfo(text: str) -> str:
    """``text`` with what is secret in its addresses left out: an address that can still be used."""
    return _rewritten(text, user="", value=None)


def public_address(address: str) -> str:
    """One address, of media say, as it may be recorded: without what is secret, and of the web without its fragment.

    Unlike in a sentence, blanks and quotes are part of it. What is no url stays as it is.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        return address
    address = without_userinfo(address)
    if scheme.lower() in _FILES:
        return address
    return _query(address if is_database(scheme) else address.partition("#")[0], None)


def is_database(scheme: str) -> bool:
    """Whether SQLAlchemy opens addresses of this scheme."""
    return scheme.lower().partition("+")[0] in _DATABASES


def userinfo(address: str) -> Iterator[tuple[str, str]]:
    """(user, password) of the addresses in a text."""
    for found in _ADDRESS.finditer(address):
        end = _host(address, found.end(), found[1])
        if end > found.end():
            user, _, password = address[found.end() : end - 1].partition(":")
            yield user, password or ("" if is_database(found[1]) else user)  # a token may stand alone


def secret_values(address: str) -> Iterator[str]:
    """The values of the secret parameters of the addresses in a text."""
    for text in (address, unquote_plus(address)):
        for _, name, _, value in _PARAMETER.findall(text):
            if _SECRET_PARAMETER.search(name):
                yield value.strip("{}\"'")


def _rewritten(text: str, user: str, value: str | None) -> str:
    """All addresses of the text with ``user`` in place of their users, and ``value`` in that of secret parameters."""
    written, place = [], 0
    for found in _ADDRESS.finditer(text):
        if found.start() < place:  # within what is done: a password may hold "://"
            continue
        host = _host(text, found.end(), found[1])
        end = _end_of_address(text, host, found[1], whole=not text[: found.start()].strip())
        written += [
            _words(text[place : found.start()], value),
            found[0],
            user if host > found.end() else "",
            text[host:end] if found[1].lower() in _FILES else _query(text[host:end], value),
        ]
        place = end
    return "".join([*written, _words(text[place:], value)])


def _host(text: str, start: int, scheme: str) -> int:
    """Where the host of an address begins: at ``start``, behind ``://``, or after the last ``@`` before the host."""
    line = text[start : _next_address(text, start)].partition("\n")[0]
    if "@" not in line and (line.endswith(":") or not _HOST.match(line)):
        line = text[start:].partition("\n")[0]  # of which "://" is a part
    if is_database(scheme):
        found = _SQL_USER.match(line)
        plain = re.match(
            r"[^\s:@/]*:[0-9]+[/?#][^\s@]*(\s|$)", line
        )  # host:5432/db, and words that may have an @
        return start if found is None or plain else start + _last_at(line, found.end() - 1)
    authority = re.match(r"[^/?#\s]*", line)
    assert authority is not None
    if "@" in authority[0]:
        return start + _last_at(line, authority[0].index("@"))
    if "@" not in line or _HOST.match(line):
        return start
    return start + _last_at(line, line.index("@"))  # this is no host: what goes on to the @ is no path


def _next_address(text: str, start: int) -> int:
    following = _ADDRESS.search(text, start)
    return following.start() if following else len(text)


def _last_at(line: str, first: int) -> int:
    """Behind the last ``@`` of the word that the ``first`` one stands in."""
    word = re.match(r"\S*", line[first:])
    assert word is not None
    return first + word[0].rindex("@") + 1


def _end_of_address(text: str, host: int, scheme: str, *, whole: bool) -> int:
    """Where an address ends: at a blank or a quote; that of a database with the line, where blanks may be its own.

    Args:
        whole: nothing stands before the address: the text may be nothing else.
    """
    line = text[host : _next_address(text, host)].partition("\n")[0]
    if is_database(scheme) and "?" in line and (whole or "odbc_connect" in unquote_plus(line).lower()):
        return host + len(line)
    address = re.match(r"[^\s\"'<>`]*", line)
    assert address is not None
    return host + len(address[0])


def _query(address: str, value: str | None) -> str:
    """An address from its host on, with the secret parameters' values replaced, or the parameters left out."""
    place, mark, rest = address.partition("?")
    if not mark:
        place, mark, rest = address.partition("#")
    if not mark:
        return address
    if "odbc_connect" in unquote_plus(rest).lower():  # a list of its own, in which blanks and braces stand
        return place if value is None else f"{place}?odbc_connect={value}"
    kept: list[str] = []
    for part in re.findall(r"[^&;#]*[&;#]?", rest):
        name, equals, held = part.rstrip("&;#").partition("=")
        if not equals or not _is_secret(name, held):
            kept.append(part)
        elif value is not None:
            kept.append(f"{name}={value}{part[len(name) + 1 + len(held) :]}")
    query = "".join(kept)
    if value is None and query != rest:
        query = query.rstrip("&;#")
    return f"{place}{mark}{query}" if query or query == rest else place


def _is_secret(name: str, value: str) -> bool:
    held = unquote_plus(value)
    return bool(_SECRET_PARAMETER.search(unquote_plus(name))) or (
        "://" in held and without_userinfo(held) != held
    )


def _words(text: str, value: str | None) -> str:
    """Words with the values of ``password=...`` in them replaced."""
    if value is None or "=" not in text:
        return text

    def replaced(found: re.Match[str]) -> str:
        is_secret = found[4] and _SECRET_WORD.search(found[2])
        return f"{found[1]}{found[2]}{found[3]}{value}" if is_secret else found[0]

    return _PARAMETER.sub(replaced, text)
