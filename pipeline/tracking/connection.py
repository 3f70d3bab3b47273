"""The one place that imports MLflow: late, quietly, and with finite patience."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.redaction import hide, hide_variables, redact
from pipeline.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("pipeline.tracking")

# What the server says when asking again cannot help; everything else is retried.
_PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND"}


def connect(config: TrackingConfig) -> MlflowClient:
    """A client for ``config.uri``; imports MLflow (seconds) at the first call of the process.

    Nothing is sent yet: a server that is away shows at the first request, which fails within
    ``request_timeout_s`` and one retry (MLflow's own defaults would hold a thread for many minutes).
    """
    config = config.resolved(Path.cwd())
    config.apply_variables()
    uri = config.uri
    assert uri is not None
    hide(uri)
    hide_variables(os.environ)
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_CONFIGURE_LOGGING": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(config.request_timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)

    from mlflow import MlflowClient

    if config.database is not None:
        config.database.parent.mkdir(parents=True, exist_ok=True)
    # Models are registered where the runs are, whatever MLFLOW_REGISTRY_URI says; of Databricks it names the catalog.
    registry = None if uri.startswith("databricks") else uri
    return MlflowClient(tracking_uri=uri, registry_uri=registry)


def is_permanent(error: BaseException) -> bool:
    """Whether the store refused what it was sent, so that sending it again is useless."""
    return getattr(error, "error_code", None) in _PERMANENT


def is_missing(error: BaseException) -> bool:
    """Whether the store says that what was asked for does not exist."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def one_line(error: BaseException) -> str:
    """The cause in one short line; MLflow's messages hold whole HTTP bodies and chains of retries."""
    text = " ".join(str(error).split())
    for marker in ("Connection refused", "timed out", "Name or service not known", "Connection reset"):
        if marker in text:
            text = marker
            break
    return redact(f"{type(error).__name__}: {text}")[:200]
