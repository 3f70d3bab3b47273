"""Checkpoints and evaluations of a run in MLflow: logged models that link to storage, child runs, aliases of the best.

A run has a registered model of its own (named by the run's key), whose versions are those of its checkpoints that
were the best by some metric; the alias ``best-TASK-METRIC`` is on the best so far, and moving it is one write of the
server's: there is never a moment with none or two. ``best`` is the one by ``checkpoints.keep_best``.

Everything here may be called again with the same arguments (the driver died in between): nothing is made
twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.tracking.changes import log_change
from pipeline.tracking.links import NOTE, REPORT, evaluation_note
from pipeline.tracking.registry import BEST, DIGEST, Registry, alias_of
from pipeline.tracking.runs import RunHandle, flatten_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Param

_EVALUATION = "glscl.evaluation"
_DATASET_DIGEST_LIMIT = 36
_BATCH = 100  # parameters in one request
_TAG_LIMIT = 5000


@dataclass(frozen=True)
class CheckpointEntry:
    """A committed checkpoint, as MLflow shows it. ``url`` is a link; weights are never uploaded."""

    step: int
    stage: int
    url: str
    digest: str
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationEntry:
    """A finished evaluation of a checkpoint; times in seconds since the epoch, ``error`` when it failed for
    good. ``intervals``: (low, high) by metric; ``params``: what it was measured with, as plain data.
    """

    checkpoint: CheckpointEntry
    task: str
    version: str
    dataset: str
    dataset_digest: str
    metrics: Mapping[str, float]
    started: float
    finished: float
    error: str | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def _params(entry: EvaluationEntry) -> list[Param]:
    """Values that are no text as JSON; what MLflow does not take in a name is replaced, what is too long cut."""
    from mlflow.entities import Param

    plain = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for name, value in entry.params.items()
    }
    filled = {name: value for name, value in plain.items() if value}
    return [Param(name, value) for name, value in flatten_params(filled).items()] if filled else []


class RunResults:
    """Writes results of one run; not thread-safe, used by one thread of the driver.

    Args:
        client: a connected client.
        run: the parent run.
    """

    def __init__(self, client: MlflowClient, run: RunHandle) -> None:
        self._client, self._run = client, run
        self._registry = Registry(client, run)
        self._models: dict[str, str] = {}
        self._evaluated: dict[str, tuple[str, str]] = {}  # key -> (run id, status)
        for model in self._search_models():
            if DIGEST in model.tags:
                self._models[model.tags[DIGEST]] = model.model_id
        token: str | None = None
        while True:
            page = client.search_runs(
                [run.experiment_id],
                filter_string=f"tags.`mlflow.parentRunId` = '{run.run_id}'",
                max_results=1000,
                page_token=token,
            )
            for child in page:
                if _EVALUATION in child.data.tags:
                    self._evaluated[child.data.tags[_EVALUATION]] = (child.info.run_id, child.info.status)
            token = page.token
            if not token:
                break

    def log_checkpoint(self, checkpoint: CheckpointEntry) -> str:
        """Makes the checkpoint's logged model unless it is there; returns its id."""
        known = self._models.get(checkpoint.digest)
        if known is not None:
            return known
        from mlflow.entities.logged_model_status import LoggedModelStatus

        # What mlflow.create_external_model does, without its global state and without the artifact it
        # uploads.
        model = self._client.create_logged_model(
            self._run.experiment_id,
            name=f"checkpoint-{checkpoint.step:08d}",
            source_run_id=self._run.run_id,
            model_type="checkpoint",
            params={"step": str(checkpoint.step), "stage": str(checkpoint.stage), **checkpoint.params},
            tags={
                "mlflow.model.isExternal": "true",
                "checkpoint": checkpoint.url,
                "step": str(checkpoint.step),
                DIGEST: checkpoint.digest,
            },
        )
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self._models[checkpoint.digest] = str(model.model_id)
        return str(model.model_id)

    def log_evaluation(self, entry: EvaluationEntry) -> str:
        """A child run, and the metrics ``<task>/<metric>`` on the checkpoint's logged model with the
        dataset's name, and on the parent run, whose charts show them over the steps of the training.

        The child run alone has the intervals, ``<task>/<metric>_low`` and ``_high``, so that charts of the parent and
        the table of models stay readable, and the parameters: settings, seed, digest of the data, details.

        Names of metrics are free of the ``@`` that MLflow refuses. Time stamps are those of the evaluation,
        so a second call after a crash leaves no second points. Returns the child run's id.
        """
        from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric, RunTag

        key = f"{entry.checkpoint.digest[:16]}/{entry.task}/{entry.version}"
        run_id, status = self._evaluated.get(key, ("", ""))
        wanted = "FINISHED" if entry.error is None else "FAILED"
        if status == wanted:
            return run_id
        model_id = self.log_checkpoint(entry.checkpoint)
        if not run_id:
            run_id = self._client.create_run(
                self._run.experiment_id,
                start_time=int(entry.started * 1000),
                run_name=f"{entry.task} at step {entry.checkpoint.step}",
                tags={
                    "mlflow.parentRunId": self._run.run_id,
                    _EVALUATION: key,
                    "checkpoint": entry.checkpoint.url,
                    "task": entry.task,
                    NOTE: evaluation_note(self._run, entry),
                    **entry.tags,
                },
            ).info.run_id
            self._evaluated[key] = (run_id, "RUNNING")
        digest = entry.dataset_digest[:_DATASET_DIGEST_LIMIT]
        inputs = []
        if digest:  # empty: the data could not be read
            dataset = Dataset(name=entry.dataset, digest=digest, source_type="glscl", source="{}")
            inputs.append(DatasetInput(dataset, []))
        self._client.log_inputs(run_id, inputs, models=[LoggedModelInput(model_id=model_id)])
        moment = int(entry.finished * 1000)
        metrics = [
            Metric(
                f"{entry.task}/{name}",
                float(value),
                moment,
                entry.checkpoint.step,
                model_id=model_id,
                dataset_name=entry.dataset,
                dataset_digest=digest,
                run_id=run_id,
            )
            for name, value in entry.metrics.items()
        ]
        marks = [] if entry.error is None else [RunTag("error", entry.error[:_TAG_LIMIT])]
        bounds = [
            Metric(f"{entry.task}/{name}_{which}", float(value), moment, entry.checkpoint.step)
            for name, interval in entry.intervals.items()
            for which, value in zip(("low", "high"), interval, strict=True)
        ]
        self._client.log_batch(run_id, metrics=[*metrics, *bounds], tags=marks)
        params = _params(entry)
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(run_id, params=params[start : start + _BATCH])
        if metrics:
            # On the parent too, so that its charts show the curve over training steps.
            self._client.log_batch(
                self._run.run_id, metrics=[Metric(m.key, m.value, moment, m.step) for m in metrics]
            )
        self._client.set_terminated(run_id, status=wanted, end_time=moment)  # last: it says that all is there
        self._evaluated[key] = (run_id, wanted)
        return run_id

    def mark_best(self, checkpoint: CheckpointEntry, metric: str, *, chosen: bool) -> None:
        """Moves the alias of the best by ``TASK/METRIC`` to this checkpoint.

        Args:
            chosen: whether it is the metric of ``checkpoints.keep_best``: then the alias ``best`` moves too.
        """
        model_id = self.log_checkpoint(checkpoint)
        self._registry.move(alias_of(metric), checkpoint, model_id)
        if chosen:
            self._registry.move(BEST, checkpoint, model_id)
            self._client.set_tag(self._run.run_id, "best_checkpoint", checkpoint.url)

    def tag(self, name: str, value: str) -> None:
        """A tag of the parent run."""
        self._client.set_tag(self._run.run_id, name, value[:_TAG_LIMIT])

    def log_change(self, number: int, change: Mapping[str, Any]) -> None:
        """A change of the configuration, see :func:`pipeline.tracking.changes.log_change`."""
        log_change(self._client, self._run.run_id, number, change)

    def log_report(self, html: str, text: str) -> None:
        """The evaluation report as artifacts ``evaluation/report.{html,txt}`` of the parent run."""
        self._client.log_text(self._run.run_id, html, REPORT)
        self._client.log_text(self._run.run_id, text, "evaluation/report.txt")

    def log_dataset(self, report: str, tags: Mapping[str, str]) -> None:
        """A finished preparation: its report as artifact ``report.html``, and tags such as the dataset's digest."""
        self._client.log_text(self._run.run_id, report, "report.html")
        for name, value in tags.items():
            self._client.set_tag(self._run.run_id, name, value)

    def _search_models(self) -> list[LoggedModel]:
        models: list[LoggedModel] = []
        token: str | None = None
        while True:
            page = self._client.search_logged_models(
                [self._run.experiment_id],
                filter_string=f"source_run_id = '{self._run.run_id}'",
                max_results=100,
                page_token=token,
            )
            models.extend(page)
            token = page.token
            if not token:
                return models
