"""Checkpoints and evaluations of a run in MLflow: logged models that link to storage, child runs, the best
one.

Everything here may be called again with the same arguments (the driver died in between): nothing is made
twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.tracking.links import NOTE, REPORT, evaluation_note
from pipeline.tracking.runs import RunHandle

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_DIGEST = "glscl.checkpoint_digest"
_EVALUATION = "glscl.evaluation"
_BEST = "best"
_DATASET_DIGEST_LIMIT = 36


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
    good.
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
    tags: Mapping[str, str] = field(default_factory=dict)


class RunResults:
    """Writes results of one run; not thread-safe, used by one thread of the driver.

    Args:
        client: a connected client.
        run: the parent run.
    """

    def __init__(self, client: MlflowClient, run: RunHandle) -> None:
        self._client, self._run = client, run
        self._models: dict[str, str] = {}
        self._evaluated: dict[str, tuple[str, str]] = {}  # key -> (run id, status)
        for model in self._search_models():
            if _DIGEST in model.tags:
                self._models[model.tags[_DIGEST]] = model.model_id
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
                _DIGEST: checkpoint.digest,
            },
        )
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self._models[checkpoint.digest] = str(model.model_id)
        return str(model.model_id)

    def log_evaluation(self, entry: EvaluationEntry) -> str:
        """A child run, and the metrics ``<task>/<metric>`` on the checkpoint's logged model with the
        dataset's name.

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
        dataset = Dataset(name=entry.dataset, digest=digest, source_type="glscl", source="{}")
        self._client.log_inputs(
            run_id, [DatasetInput(dataset, [])], models=[LoggedModelInput(model_id=model_id)]
        )
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
        marks = [] if entry.error is None else [RunTag("error", entry.error[:5000])]
        self._client.log_batch(run_id, metrics=metrics, tags=marks)
        if metrics:
            # On the parent too, so that its charts show the curve over training steps.
            self._client.log_batch(
                self._run.run_id, metrics=[Metric(m.key, m.value, moment, m.step) for m in metrics]
            )
        self._client.set_terminated(run_id, status=wanted, end_time=moment)  # last: it says that all is there
        self._evaluated[key] = (run_id, wanted)
        return run_id

    def mark_best(self, checkpoint: CheckpointEntry, metric: str, value: float) -> None:
        """Moves the tag ``best`` to this checkpoint's logged model; there is never a moment without one."""
        model_id = self.log_checkpoint(checkpoint)
        self._client.set_logged_model_tags(model_id, {_BEST: f"{metric} {value:.4g}"})
        for model in self._search_models():
            if _BEST in model.tags and model.model_id != model_id:
                self._client.delete_logged_model_tag(model.model_id, _BEST)
        self._client.set_tag(self._run.run_id, "best_checkpoint", checkpoint.url)

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
