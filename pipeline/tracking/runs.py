"""One MLflow run per training, whatever restarts: found again by its key, made once by the driver."""

from __future__ import annotations

import logging
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, SecretBytes, SecretStr

from pipeline.redaction import without_credentials
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import connect, is_missing

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

log = logging.getLogger("pipeline.tracking")

RUN_KEY = "glscl.run_key"
STORAGE = "storage"  # the tag that says where the run lies
_VALUE_LIMIT = 6000  # MLflow's limit of a parameter; tags may be 8000
_BATCH = 100  # parameters or tags in one request
_LIBRARIES = ("torch", "deepspeed", "ray", "transformers", "timm", "webdataset", "mlflow")


@dataclass(frozen=True)
class RunHandle:
    """A run that exists in MLflow. ``key`` is ours and outlives the store; the ids are MLflow's."""

    key: str
    run_id: str
    experiment_id: str
    uri: str  # without credentials


def open_run(
    config: TrackingConfig,
    *,
    name: str,
    key: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    existing_run_id: str | None = None,
) -> RunHandle:
    """Finds the run of ``key`` in the experiment or makes it; called by the driver only.

    Args:
        config: where.
        name: the run's name in the interface of MLflow.
        key: unique name of this training, kept in its storage from before the first contact with MLflow. A
            driver
            that died after making the run and before noting its id finds it by this.
        params: see :func:`flatten_params`. MLflow's parameters are immutable: one that changed since the
            run was
            made is noted as a tag ``changed.<name>`` instead.
        tags: digests, versions; see :func:`environment_tags`.
        existing_run_id: the id noted earlier, which saves a search.

    Raises:
        Exception: whatever MLflow raises when it cannot be reached or refuses; :class:`Tracker` retries.
    """
    config = config.resolved(Path.cwd())
    client = connect(config)
    experiment_id = _experiment(client, config)
    run = _find(client, experiment_id, key, existing_run_id)
    if run is None:
        run = client.create_run(experiment_id, run_name=name, tags={RUN_KEY: key})
    else:
        _tell_of_move(run, tags)
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")

    from mlflow.entities import Param, RunTag

    known = run.data.params
    fresh = [Param(k, _short(v)) for k, v in params.items() if k not in known]
    changed = {f"changed.{k}": v for k, v in params.items() if k in known and known[k] != _short(v)}
    marks = [RunTag(k, _short(v)) for k, v in {**tags, **changed}.items()]
    for start in range(0, max(len(fresh), len(marks)), _BATCH):
        part = slice(start, start + _BATCH)
        client.log_batch(run.info.run_id, params=fresh[part], tags=marks[part])
    return RunHandle(key, run.info.run_id, run.info.experiment_id, config.address)


def _tell_of_move(run: Run, tags: Mapping[str, str]) -> None:
    """A run that was moved goes on as it is; whether it goes on where it was too cannot be told here."""
    before, now = run.data.tags.get(STORAGE), tags.get(STORAGE)
    if before is not None and now is not None and before != _short(now):
        log.warning(
            "the run was in %s and goes on in %s: should it still be there too, go on with one of them only, "
            "as both are one run in MLflow",
            before,
            _short(now),
        )


def find_run(client: MlflowClient, config: TrackingConfig, key: str) -> str | None:
    """The id of the run of ``key``, or nothing while the driver has not made it; used by the workers."""
    config = config.resolved(Path.cwd())
    experiment = _known_experiment(client, config)
    if experiment is None:
        return None
    run = _find(client, experiment.experiment_id, key, None)
    return None if run is None else str(run.info.run_id)


def _find(client: MlflowClient, experiment_id: str, key: str, run_id: str | None) -> Run | None:
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                return run
        except MlflowException as error:
            if not is_missing(error):
                raise
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{RUN_KEY}` = '{key}'",
        max_results=1,
        order_by=["start_time ASC"],
    )
    return found[0] if found else None


def _known_experiment(client: MlflowClient, config: TrackingConfig) -> Experiment | None:
    if config.experiment_id is not None:
        return client.get_experiment(config.experiment_id)  # one that is not there is an error
    return client.get_experiment_by_name(config.experiment)


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    experiment = _known_experiment(client, config)
    if experiment is None:
        name = config.experiment
        assert name is not None  # of an id there is one, or an error
        # An embedded store would put artifacts into ./mlruns of whichever process made the experiment.
        database = config.database
        location = None if database is None else (database.parent / "mlartifacts" / name).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run was quicker
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def flatten_params(value: BaseModel | Mapping[str, Any]) -> dict[str, str]:
    """A configuration as MLflow parameters: dotted names, short values, nothing secret.

    Secrets are left out by type (``SecretStr``), and the user part of any URL is replaced.
    """
    return dict(_flatten("", value))


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, SecretStr | SecretBytes):
        return
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flatten(f"{prefix}.{name}" if prefix else str(name), item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and value:
        for number, item in enumerate(value):
            yield from _flatten(f"{prefix}.{number}", item)
    else:
        name = "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in prefix)
        yield name[:250], _short(str(value))


def _short(value: str) -> str:
    value = without_credentials(value)
    return value if len(value) <= _VALUE_LIMIT else value[: _VALUE_LIMIT - 1] + "…"


def environment_tags() -> dict[str, str]:
    """What produced the run: the versions of the libraries, and the commit when the code runs from a
    checkout.
    """
    tags = {"version.python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            tags[f"version.{library}"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["git.modified"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (
        root / ".git"
    ).exists():  # an installed package inside somebody else's repository is not ours to name
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
