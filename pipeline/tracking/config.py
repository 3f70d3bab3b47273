"""The ``tracking:`` block of a job: where MLflow is, and how patient the logger is."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def without_credentials(text: str) -> str:
    """``text`` with the ``user:password@`` part of any URL in it replaced, for messages, tags and
    parameters.
    """
    return _USERINFO.sub("***@", text)


def without_userinfo(text: str) -> str:
    """``text`` with the ``user:password@`` part of any URL left out: an address that can still be used."""
    return _USERINFO.sub("", text)


class TrackingConfig(BaseModel):
    """Where a run is tracked.

    Attributes:
        uri: an MLflow server (``http://host:5000``) or a database (``sqlite:///path/mlflow.db``). Nothing:
            an SQLite file ``mlflow.db`` in the current folder. Passwords belong in the usual
            ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` variables.
        experiment: name of the MLflow experiment; made when it is missing.
        flush_s: seconds between two deliveries of metrics.
        request_timeout_s: limit of one HTTP request, seconds.
        buffered: metric values kept in memory while the server is away; more go to the run's storage.
        system_s: seconds between two measurements of memory.
    """

    # An address may hold a password: pydantic must not quote it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    uri: str | None = Field(default=None, repr=False)
    experiment: str = Field(default="glscl", min_length=1, max_length=500)
    flush_s: float = Field(default=2.0, gt=0)
    request_timeout_s: int = Field(default=10, ge=1)
    buffered: int = Field(default=50_000, ge=1000)
    system_s: float = Field(default=10.0, gt=0)

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        scheme = uri.split(":", 1)[0].split("+", 1)[0]
        if scheme not in _SCHEMES:
            raise ValueError(
                f"{without_credentials(uri)!r} is not a store that MLflow 3 opens; give a server "
                "(http://host:5000) or a database (sqlite:///mlflow.db)"
            )
        return uri

    def resolved(self, folder: Path) -> TrackingConfig:
        """The same with an absolute address, so that workers with another current folder reach the same
        store.

        Args:
            folder: what a missing or relative SQLite path is relative to.
        """
        uri = self.uri or "sqlite:///mlflow.db"
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            uri = f"sqlite:///{(folder / uri.removeprefix('sqlite:///')).absolute()}"
        return self.model_copy(update={"uri": uri})

    @property
    def address(self) -> str:
        """The URI for people: without credentials."""
        return without_credentials(self.uri or "sqlite:///mlflow.db")

    @property
    def embedded(self) -> bool:
        """Whether the store is an SQLite file that this process opens itself."""
        return self.uri is None or self.uri.startswith("sqlite:")
