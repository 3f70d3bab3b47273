"""Addresses of pages of MLflow, and the description that leads from an evaluation's run to the report of them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.tracking.results import EvaluationEntry
    from pipeline.tracking.runs import RunHandle

#: The report among the artifacts of the parent run.
REPORT = "evaluation/report.html"
#: The tag that MLflow shows as a run's description, in Markdown.
NOTE = "mlflow.note.content"


def run_page(run: RunHandle) -> str:
    """Where the run is to be seen: an address for a browser, or the command that opens a store without a server."""
    if run.uri.startswith(("http://", "https://")):
        return f"{run.uri.rstrip('/')}/{_page(run)}"
    return f"mlflow ui --backend-store-uri {run.uri}"


def evaluation_note(run: RunHandle, entry: EvaluationEntry) -> str:
    """The description of an evaluation's run.

    The link is relative, so it leads to the right place under whatever address the server is seen.
    """
    return (
        f"Evaluation of step {entry.checkpoint.step} (stage {entry.checkpoint.stage}) on {entry.dataset}. "
        f"[Report of all evaluations]({_page(run)}/artifacts/{REPORT})"
    )


def _page(run: RunHandle) -> str:
    return f"#/experiments/{run.experiment_id}/runs/{run.run_id}"
