"""No spelling of a password is seen: addresses are read as those read them who use them."""

from __future__ import annotations

import base64
import logging
import sys
import threading
from urllib.parse import quote, quote_plus

import pytest

from pipeline import redaction
from pipeline.redaction import (
    Redacting,
    hide,
    redact,
    redact_tracebacks,
    without_credentials,
    without_userinfo,
)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", {})


@pytest.mark.parametrize(
    ("address", "shown", "usable"),
    [
        ("http://team:SECRET@host:5000", "http://***@host:5000", "http://host:5000"),
        ("HTTP://SECRET@host/x", "HTTP://***@host/x", "HTTP://host/x"),
        ("http://team:a@SECRET@host:5000", "http://***@host:5000", "http://host:5000"),
        ("https://me@corp.example:SECRET@host", "https://***@host", "https://host"),
        ("http://u:SECRET@[::1]:5000/x", "http://***@[::1]:5000/x", "http://[::1]:5000/x"),
        ("https://u:SEC/SECRET@host/y", "https://***@host/y", "https://host/y"),
        ("http://u:p?SECRET@h", "http://***@h", "http://h"),
        ("http://u:p#SECRET@h", "http://***@h", "http://h"),
        ("http://u:p SECRET@h", "http://***@h", "http://h"),
        ("http://u:SECRET://SECRET@h/x", "http://***@h/x", "http://h/x"),
        ("postgresql://me:q7X/SECRET+zz=@h:5432/db", "postgresql://***@h:5432/db", "postgresql://h:5432/db"),
        ("postgresql://u:p SECRET@host/db", "postgresql://***@host/db", "postgresql://host/db"),
        ("postgresql://u:1234/SECRET@host/db", "postgresql://***@host/db", "postgresql://host/db"),
        ("postgresql://u:a?SECRET#x@h/db?sslmode=require", "postgresql://***@h/db?sslmode=require", "postgresql://h/db?sslmode=require"),
        ("PostgreSQL+psycopg2://u%40x:SECRET@h", "PostgreSQL+psycopg2://***@h", "PostgreSQL+psycopg2://h"),
        ("mysql://u@corp:p SECRET@h/db", "mysql://***@h/db", "mysql://h/db"),
        ("postgresql://h/db?user=u&password=SECRET&a=1", "postgresql://h/db?user=u&password=***&a=1", "postgresql://h/db?user=u&a=1"),
        ("postgresql://h/db?pass%77ord=SECRET", "postgresql://h/db?pass%77ord=***", "postgresql://h/db"),
        ("postgresql://h/db?password=SE CRET", "postgresql://h/db?password=***", "postgresql://h/db"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3DSECRET", "mssql+pyodbc:///?odbc_connect=***", "mssql+pyodbc:///"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER={X 17};PWD=SECRET", "mssql+pyodbc:///?odbc_connect=***", "mssql+pyodbc:///"),
        ("https://h/p?X-Amz-Signature=SECRET&x=1", "https://h/p?X-Amz-Signature=***&x=1", "https://h/p?x=1"),
        ("https://h/?a=1;token=SECRET;c=3", "https://h/?a=1;token=***;c=3", "https://h/?a=1;c=3"),
        ("https://h/x#access_token=SECRET", "https://h/x#access_token=***", "https://h/x"),
        ("https://h/?next=http%3A%2F%2Fu%3ASECRET%40h&b=2", "https://h/?next=***&b=2", "https://h/?b=2"),
        ("jdbc:postgresql://u:SECRET@h/x", "jdbc:postgresql://***@h/x", "jdbc:postgresql://h/x"),
        ("mysql://u:SECRET@h/a,mysql://u:SECRET@i/b", "mysql://***@h/a,mysql://***@i/b", "mysql://h/a,mysql://i/b"),
        ("--index https://me:SECRET@h/simple pkg", "--index https://***@h/simple pkg", "--index https://h/simple pkg"),
        ("(http://u:SECRET@h/x) and\nhttp://v:SECRET@i", "(http://***@h/x) and\nhttp://***@i", "(http://h/x) and\nhttp://i"),
    ],
)  # fmt: skip
def test_user_password_and_secret_parameters_are_masked_or_left_out(
    address: str, shown: str, usable: str
) -> None:
    assert (without_credentials(address), without_userinfo(address)) == (shown, usable)


@pytest.mark.parametrize(
    "text",
    [
        "no secret: http://host/a@b and mail me@example.org",
        "http://host:5000/a@b, http://host:5000: refused; mail me@example.org",
        "http://[::1]:5000/x@y",
        "http://host:5000/#/experiments/1/runs/2?page=1",
        "postgresql://host/db@x",
        "postgresql://host:5432/db is away, mail me@example.org",
        "sqlite:////home/me@corp/mlflow.db",
        "sqlite:///file:/a/b.db?uri=true",
        "s3://bucket/a?token=1#b@c",
        "file:///data/a@b/c?password=x",
        "4 tokens=50, bypass=1, max_password_length=3",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_credentials(text) == text
    assert without_userinfo(text) == text


def test_secrets_in_sentences_of_drivers_are_masked() -> None:
    said = "dsn 'user=u password=hunter2 dbname=x', PWD={hunter 2};x, api-key = \"hunter2\""
    assert "hunter" not in without_credentials(said)
    assert "dbname=x" in without_credentials(said)


def test_a_known_password_is_masked_in_each_of_its_spellings() -> None:
    password = 'q7X/se&cret+zz= é"'
    hide(f"postgresql://me:{quote(password, safe='')}@host/db?sslpassword=other-secret")
    spellings = [password, quote(password), quote(password, safe=""), quote_plus(password), repr(password)]
    spellings += [
        base64.b64encode(f"me:{password}".encode()).decode(),
        "other-secret",
        password.replace("&", "&amp;"),
    ]
    for spelling in spellings:
        said = redact(f"could not translate host name <{spelling}@127.0.0.1>")
        assert "cret" not in said, spelling
        assert "host name" in said


def test_a_short_password_masks_no_words_of_others() -> None:
    hide("postgresql://mlflow:db@host/db")
    assert redact("the db of mlflow") == "the db of mlflow"
    assert redact("at postgresql://mlflow:db@host/db") == "at postgresql://***@host/db"


def test_logs_and_tracebacks_have_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    hide("http://team:hunter-2@host")
    logger = logging.getLogger("tests.redaction")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Redacting())
    logger.addHandler(handler)
    try:
        try:
            raise ConnectionError("hunter-2@host: refused")
        except ConnectionError as error:
            logger.exception("no answer from %s", "http://team:hunter-2@host")
            redact_tracebacks()
            sys.excepthook(type(error), error, error.__traceback__)

            def fail() -> None:
                raise ConnectionError("hunter-2@host: in a thread")

            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
    finally:
        logger.removeHandler(handler)
    told = capsys.readouterr().err
    assert "hunter" not in told
    assert told.count("Traceback") == 3
    assert "no answer from http://***@host" in told
    assert "***@host: in a thread" in told
