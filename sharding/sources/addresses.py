"""Addresses of media as people and records may see them."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

# Of names of query parameters: their beginnings, and what may stand anywhere in them.
_SECRET_BEGINNINGS = ("x-amz-", "x-goog-", "sig", "awsaccesskeyid", "key-pair-id", "policy", "auth")
_SECRET_PARTS = (
    "token",
    "secret",
    "password",
    "passwd",
    "signature",
    "credential",
    "apikey",
    "api_key",
    "api-key",
)


WEB = ("http", "https")


def scheme_of(address: str) -> str:
    """The scheme of a url in lower case; empty for a path."""
    scheme, separator, _ = address.partition("://")
    return scheme.lower() if separator else ""


def is_remote(address: str) -> bool:
    """Whether a list that others wrote may name it: a url of the web or of S3, no file of this machine."""
    return scheme_of(address) in (*WEB, "s3")


def public_address(address: str) -> str:
    """The address as it may be recorded and shown: no user name, password or signature."""
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
        pairs = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return f"{address.partition('://')[0]}://(no url)"  # which part of it is a secret nobody can tell
    host = parts.netloc.rpartition("@")[2]
    query = parts.query
    if any(_is_secret(key) for key, _ in pairs):
        query = urlencode([(key, value) for key, value in pairs if not _is_secret(key)])
    return urlunsplit((parts.scheme, host, parts.path, query, ""))


def _is_secret(parameter: str) -> bool:
    name = parameter.lower()
    return name.startswith(_SECRET_BEGINNINGS) or any(part in name for part in _SECRET_PARTS)
