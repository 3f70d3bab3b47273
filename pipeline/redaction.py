"""What outputs and records show of secrets: of addresses by the rules of ``sharding.secrets``, and of those known.

Libraries quote in their errors what they made of a password: its percent-decoded form, or what they took for a host.
:func:`hide` makes the secrets of an address known; :func:`redact`, which messages, logs and tracebacks go through,
masks each of their spellings wherever it stands.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from sharding.secrets import MASK, is_database, secret_values, userinfo, without_credentials, without_userinfo

__all__ = [
    "MASK",
    "Redacting",
    "hide",
    "hide_variables",
    "is_database",
    "redact",
    "redact_tracebacks",
    "without_credentials",
    "without_userinfo",
]

#: Environment variables that hold a secret of MLflow's.
SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
_SHORTEST = 6  # a shorter password is masked in its address, but not wherever its letters stand

_known: dict[str, None] = {}  # secrets in all spellings; ordered by when they became known


def redact(text: str) -> str:
    """:func:`without_credentials` for what others wrote, errors above all: also without the secrets that are known."""
    text = without_credentials(text)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def hide(address: str) -> None:
    """Make the secrets of an address known, so that :func:`redact` finds them wherever they stand."""
    for user, password in userinfo(address):
        _learn(password)
        for one in (f"{user}:{password}", f"{unquote(user)}:{unquote(password)}"):
            _learn(base64.b64encode(one.encode("utf-8", "replace")).decode())
    for value in secret_values(address):
        _learn(value)


def hide_variables(environment: Mapping[str, str]) -> None:
    """Make the secrets known that MLflow takes from the environment."""
    for name in SECRET_VARIABLES:
        _learn(environment.get(name, ""))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        hide(environment.get(name, ""))


class Redacting(logging.Filter):
    """Of a handler: what it writes has no secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip("\n")
            record.exc_info = None
        return True


def redact_tracebacks() -> None:
    """From here on, what ends this process or one of its threads is told without secrets."""

    def told(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def told_of_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            told(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook = told
    threading.excepthook = told_of_thread


def _learn(secret: str) -> None:
    for one in (secret, unquote(secret), unquote_plus(secret)):
        quoted = (one, quote(one), quote(one, safe=""), quote_plus(one))
        escaped = (json.dumps(one)[1:-1], repr(one)[1:-1], html.escape(one), html.escape(one, quote=False))
        for spelling in (*quoted, *escaped):
            if len(spelling) >= _SHORTEST and set(spelling) != {"*"}:
                _known.setdefault(spelling)
