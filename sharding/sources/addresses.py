"""Where media lie, by origin, and how people and records may see it.

An ``Address`` is made once, by the source that lists it, and says where its name comes from. Whoever reads it
(``sharding.sources.fetch``) goes by its type and never looks into the text, so that a name which others wrote cannot
become a file of this machine::

    names in          BelowBase              WebUrl, S3Object    LocalFile
    a listing         as the store has it    -                   -
    a table (path)    relative               its urls            absolute, file:// : only of a table on this machine
    a table (url)     -                      its urls            -
    a JSON file       relative               its urls            -
    the job file      -                      -                   tars of several places

Relative names that others wrote must stay below the folder they are relative to: ``..`` is refused. Names of a
listing and the keys of S3 urls are taken exactly as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypedDict
from urllib.parse import unquote

from sharding.errors import BadData
from sharding.names import escape_name, unescape_name
from sharding.secrets import public_address

_WEB = ("http", "https")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class BelowBase:
    """A file below the source's base: ``path`` as the store lists it, or as ``below_base`` has checked it."""

    path: str


@dataclass(frozen=True)
class WebUrl:
    """An http(s) url."""

    url: str


@dataclass(frozen=True)
class S3Object:
    """An object of S3 with its exact key."""

    bucket: str
    key: str


@dataclass(frozen=True)
class LocalFile:
    """An absolute path of this machine. Made only where the job file itself points to this machine."""

    path: str


Address = BelowBase | WebUrl | S3Object | LocalFile


class PackedAddress(TypedDict):
    """An address as Parquet holds it; texts are those of ``escape_name``. ``bucket``: of S3 objects."""

    origin: str
    name: str
    bucket: str | None


def pack(address: Address) -> PackedAddress:
    """The address as a row of Parquet."""
    match address:
        case BelowBase(path):
            return PackedAddress(origin="base", name=escape_name(path), bucket=None)
        case WebUrl(url):
            return PackedAddress(origin="web", name=escape_name(url), bucket=None)
        case S3Object(bucket, key):
            return PackedAddress(origin="s3", name=escape_name(key), bucket=escape_name(bucket))
        case LocalFile(path):
            return PackedAddress(origin="local", name=escape_name(path), bucket=None)


def unpack(packed: PackedAddress) -> Address:
    """The address that ``pack`` was given."""
    name, bucket = unescape_name(packed["name"]), packed["bucket"]
    match packed["origin"]:
        case "base":
            return BelowBase(name)
        case "web":
            return WebUrl(name)
        case "s3":
            assert bucket is not None
            return S3Object(unescape_name(bucket), name)
        case "local":
            return LocalFile(name)
        case origin:
            raise AssertionError(f"no such origin: {origin}")


def below_base(name: str, folder: str = "") -> BelowBase:
    """A relative path that others wrote.

    Args:
        folder: below the base, that the path is relative to: empty, or with a slash at its end.

    Raises:
        BadData: ``bad-address``: it is empty, absolute or a url, or leads out of the folder.
    """
    if "://" in name or name.startswith("/"):
        raise BadData("bad-address", f"{_shown(name)} is not relative to the folder")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BadData("bad-address", f"{_shown(name)} holds '..'")
    if not parts or "\0" in name:
        raise BadData("bad-address", f"{_shown(name)} names no file")
    return BelowBase(folder + "/".join(parts))


def remote_url(text: str) -> WebUrl | S3Object:
    """A url of the web or of S3 that others wrote.

    Raises:
        BadData: ``bad-address``: anything else.
    """
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in (*_WEB, "s3"):
        raise BadData("bad-address", f"{_shown(text)} is no http://, https:// or s3:// url")
    if scheme in _WEB:
        return WebUrl(text)
    bucket, _, key = rest.partition("/")
    if not _BUCKET.fullmatch(bucket) or not key or "\0" in key:
        raise BadData("bad-address", f"{_shown(text)} names no object (s3://bucket/key)")
    return S3Object(bucket, key)


def table_address(text: str, folder: str, *, on_this_machine: bool) -> Address:
    """What a table's path column names: a relative path, a url, and, of a table on this machine, an absolute path.

    Args:
        folder: of the table: see ``below_base``.

    Raises:
        BadData: ``bad-address``: none of these.
    """
    scheme, separator, rest = text.partition("://")
    if text.startswith("/"):
        path = text
    elif separator and scheme.lower() == "file":
        host, _, path = rest.partition("/")
        path = "/" + unquote(path, errors="surrogateescape")
        if host.lower() not in ("", "localhost"):
            raise BadData("bad-address", f"{_shown(text)}: a file url has three slashes before its path")
    elif separator:
        return remote_url(text)
    else:
        return below_base(text, folder)
    if not on_this_machine:
        raise BadData(
            "bad-address", f"{_shown(text)} is a path of this machine, which only a table on it may name"
        )
    if ".." in path.split("/") or "\0" in path or not path.strip("/"):
        raise BadData("bad-address", f"{_shown(text)} holds '..', or names no file")
    return LocalFile(path)


def shown(address: Address) -> str:
    """The address for people and records: one line, without user names, passwords and signatures."""
    match address:
        case BelowBase(path) | LocalFile(path):
            return escape_name(path)
        case WebUrl(url):
            return escape_name(public_address(url))
        case S3Object(bucket, key):
            return escape_name(f"s3://{bucket}/{key}")


def _shown(text: str) -> str:
    """What others wrote, in a message."""
    text = escape_name(public_address(text))
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
