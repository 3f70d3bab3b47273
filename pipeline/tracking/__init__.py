"""MLflow: one run per training and one per preparation, over restarts and over failures of the server.

Imports MLflow only when used; ``preparation`` is not imported here, since it brings the sharding code.
"""

from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.logger import MetricLogger
from pipeline.tracking.results import CheckpointEntry, EvaluationEntry, RunResults
from pipeline.tracking.runs import RunHandle, environment_tags, flatten_params, open_run
from pipeline.tracking.tracker import Tracker

__all__ = [
    "CheckpointEntry",
    "EvaluationEntry",
    "MetricLogger",
    "RunHandle",
    "RunResults",
    "Tracker",
    "TrackingConfig",
    "environment_tags",
    "flatten_params",
    "open_run",
]
