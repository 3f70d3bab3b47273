"""The ``tracking:`` block of a job: where MLflow is, and how patient the logger is.

What the block leaves out MLflow's own variables say: ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``,
``MLFLOW_EXPERIMENT_ID``. Those of the connection (``MLFLOW_TRACKING_USERNAME``, ``MLFLOW_TRACKING_TOKEN``,
``MLFLOW_TRACKING_INSECURE_TLS``, ...) MLflow reads by itself; workers on other machines get the driver's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, field_validator, model_validator

from pipeline.redaction import hide, hide_variables, is_database, without_credentials, without_userinfo
from sharding.errors import UserError

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_DEFAULT_URI, _DEFAULT_EXPERIMENT = "sqlite:///mlflow.db", "glscl"
#: Beginnings of the variables by which MLflow reaches a server, but for those that the block stands for.
_CONNECTION_VARIABLES = ("MLFLOW_TRACKING_", "MLFLOW_HTTP_REQUEST_", "MLFLOW_WORKSPACE", "DATABRICKS_")
_LONGEST_NAME = 500


class TrackingConfig(BaseModel):
    """Where a run is tracked.

    Attributes:
        uri: an MLflow server (``http://host:5000``) or a database (``sqlite:///path/mlflow.db``). Nothing:
            ``MLFLOW_TRACKING_URI``, or an SQLite file ``mlflow.db`` in the current folder. Passwords belong in the
            usual ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` variables.
        experiment: name of the MLflow experiment; made when it is missing. Nothing: ``MLFLOW_EXPERIMENT_NAME``, else
            the experiment of ``MLFLOW_EXPERIMENT_ID``, else ``glscl``.
        experiment_id: MLflow's id of the experiment instead of its name.
        flush_s: seconds between two deliveries of metrics.
        request_timeout_s: limit of one HTTP request, seconds.
        buffered: metric values kept in memory while the server is away; more go to the run's storage.
        system_s: seconds between two measurements of memory.
    """

    # An address may hold a password: pydantic must not quote it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    uri: str | None = Field(default=None, repr=False)
    experiment: str | None = Field(default=None, min_length=1, max_length=_LONGEST_NAME)
    experiment_id: str | None = Field(default=None, min_length=1, max_length=32)
    flush_s: float = Field(default=2.0, gt=0)
    request_timeout_s: int = Field(default=10, ge=1)
    buffered: int = Field(default=50_000, ge=1000)
    system_s: float = Field(default=10.0, gt=0)

    _variables: dict[str, SecretStr] = PrivateAttr(default_factory=dict)

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        return None if uri is None else checked_uri(uri)

    @model_validator(mode="after")
    def _one_experiment(self) -> Self:
        if self.experiment is not None and self.experiment_id is not None:
            raise ValueError("give experiment or experiment_id, not both")
        return self

    def resolved(self, folder: Path, environment: Mapping[str, str] = os.environ) -> TrackingConfig:
        """The same with an absolute address and an experiment, so that workers with another current folder and
        other variables reach the same store. What is resolved stays as it is.

        Args:
            folder: what a missing or relative SQLite path is relative to.
            environment: what stands in for what the block leaves out.

        Raises:
            UserError: a variable of MLflow's that cannot be used.
        """
        uri = _uri_by_variables(self.uri, environment) or _DEFAULT_URI
        if uri.startswith("sqlite:///") and not uri.startswith(("sqlite:////", "sqlite:///file:")):
            uri = f"sqlite:///{(folder / uri.removeprefix('sqlite:///')).absolute()}"
        made = self.model_copy(update={"uri": uri, **self._experiment_by_variables(environment)})
        made._variables = self._variables or {
            name: SecretStr(value)
            for name, value in environment.items()
            if name.startswith(_CONNECTION_VARIABLES) and name != "MLFLOW_TRACKING_URI"
        }
        return made

    def _experiment_by_variables(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        if self.experiment is not None or self.experiment_id is not None:
            return {}
        if name := environment.get("MLFLOW_EXPERIMENT_NAME", ""):
            if len(name) > _LONGEST_NAME:
                raise UserError(f"MLFLOW_EXPERIMENT_NAME: is longer than {_LONGEST_NAME} characters")
            return {"experiment": name}
        if number := environment.get("MLFLOW_EXPERIMENT_ID", ""):
            return {"experiment_id": number}
        return {"experiment": _DEFAULT_EXPERIMENT}

    def check(self) -> None:
        """That an embedded store can be opened where it is. Makes the secrets of the address and the variables known.

        Raises:
            UserError: its folder or file cannot be written, or the file is something else.
        """
        hide(self.uri or "")
        hide_variables(os.environ)
        file = self.database
        if file is None:
            return
        folder = next(place for place in file.absolute().parents if place.exists())
        advice = (
            "give tracking.uri (or MLFLOW_TRACKING_URI) another address, e.g. sqlite:////folder/mlflow.db"
        )
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"tracking.uri: {file} cannot be made, since {folder} cannot be written: {advice}"
            )
        if not file.exists():
            return
        if not file.is_file() or not os.access(file, os.R_OK | os.W_OK):
            raise UserError(f"tracking.uri: {file} cannot be written: {advice}")
        with file.open("rb") as content:
            if content.read(16) not in (b"", b"SQLite format 3\0"):
                raise UserError(f"tracking.uri: {file} is no SQLite database: {advice}")

    def apply_variables(self) -> None:
        """Set MLflow's variables of the connection in this process as the driver has them, where it has none itself."""
        for name, value in self._variables.items():
            os.environ.setdefault(name, value.get_secret_value())

    @property
    def address(self) -> str:
        """The URI for people: without credentials."""
        return without_credentials(self.uri or _DEFAULT_URI)

    @property
    def embedded(self) -> bool:
        """Whether the store is an SQLite file that this process opens itself."""
        return self.uri is None or self.uri.startswith("sqlite:")

    @property
    def database(self) -> Path | None:
        """The file of an embedded store; None: a server, or a database in memory."""
        path = (self.uri or _DEFAULT_URI).partition("?")[0].removeprefix("sqlite:///").removeprefix("file:")
        return Path(path) if self.embedded and path and path != ":memory:" and "://" not in path else None


def checked_uri(uri: str) -> str:
    """The address of a store, without blanks around it.

    Raises:
        ValueError: MLflow does not open it, or it cannot be told where in it the password ends. The message does
            not quote it.
    """
    uri = uri.strip()
    scheme, separator, _ = uri.partition("://")
    if scheme.partition("+")[0] not in _SCHEMES or not (separator or uri == "databricks"):
        raise ValueError(
            "is not a store that MLflow 3 opens; give a server (http://host:5000) or a database (sqlite:///mlflow.db)"
        )
    if any(ord(character) < 32 for character in uri):
        raise ValueError("has a line end or another control character in it")
    encode = "write the password percent-encoded (@ as %40, / as %2F, : as %3A)"
    if not is_database(scheme):
        try:
            parts = urlsplit(uri)
            if scheme.startswith("http") and not parts.hostname:
                raise ValueError
            assert parts.port is None or parts.port >= 0
        except ValueError:
            raise ValueError(f"has no host and port that can be read; {encode}") from None
    elif scheme.partition("+")[0] != "sqlite":
        _check_database(uri, encode)
    return uri


def _check_database(uri: str, encode: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parts = make_url(uri)
    except (ArgumentError, ValueError):  # a port that is no number, which SQLAlchemy would quote
        raise ValueError(f"is no address of a database that SQLAlchemy can read; {encode}") from None
    user = parts.username is not None or parts.password is not None
    if "@" in (parts.host or "") or (user and "@" in (parts.database or "")):
        raise ValueError(f"holds an @ where the host or the database stands; {encode}")


def _uri_by_variables(uri: str | None, environment: Mapping[str, str]) -> str | None:
    """The block's address, or that of the variable; also the variable's where the block has it without credentials, as
    a run's record does.
    """
    said = environment.get("MLFLOW_TRACKING_URI", "").strip()
    if not said:
        return uri
    if uri is not None:
        return said if said != uri and without_userinfo(said) == uri else uri
    try:
        return checked_uri(said)
    except ValueError as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI: {error} (tracking.uri in the job's file goes before it)"
        ) from None
