"""Changes of a running job's configuration in MLflow, whose parameters cannot change once they are logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import connect, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("pipeline.tracking")

_TAG_LIMIT = 5000


def log_change(client: MlflowClient, run_id: str, number: int, change: Mapping[str, Any]) -> None:
    """Artifact ``configuration/NUMBER-step-STEP.json``, and its fields as tag ``configuration.changed``.

    Of one that was refused the tag is ``configuration.refused``, and the file says so. May be called again.

    Args:
        number: from 1, in the order in which they were made.
        change: as in the run's record, see ``pipeline.changes.Changes.as_record``.
    """
    kind = "changed" if change["allowed"] else "refused"
    text = json.dumps(change, indent=2, sort_keys=True)
    client.log_text(run_id, text, f"configuration/{number:03d}-step-{change['step']:08d}-{kind}.json")
    fields = (f"{name}: {one['was']!r} -> {one['now']!r}" for name, one in change["changed"].items())
    line = f"after step {change['step']}: {'; '.join(fields)}"
    client.set_tag(run_id, f"configuration.{kind}", line[:_TAG_LIMIT])


def log_refusal(config: TrackingConfig, run_id: str, number: int, change: Mapping[str, Any]) -> None:
    """:func:`log_change` for a run that does not go on: at once, the run's status stays as it is. Never raises."""
    try:
        log_change(connect(config), run_id, number, change)
    except Exception as error:  # noqa: BLE001 - the refusal itself is what the user must see
        log.warning("MLflow was not told of the refusal (%s); it is when the run goes on", one_line(error))
