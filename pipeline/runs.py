"""A run's folder in the storage: ``runs/<job name>/``, what began in it, and whether this job may go on in it."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel, SecretStr

from pipeline.changes import compare, trained_datasets
from pipeline.config import JobConfig, parse_job
from pipeline.redaction import without_userinfo
from pipeline.tracking import RunHandle
from pipeline.training.config import TrainBlock
from pipeline.training.schedule import learning_rate_at
from sharding.errors import UserError
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)

RECORD = "run.json"


class ConfigurationRefused(UserError):
    """The run cannot go on with this configuration. ``run``: it, with the refusal in its record."""

    def __init__(self, message: str, run: RunFolder) -> None:
        super().__init__(message)
        self.run = run


@dataclass
class RunFolder:
    """The folder of one run (``storage``) below the job's storage (``root``). ``record``: what run.json holds."""

    root: Storage
    storage: Storage
    path: str
    record: dict[str, Any]

    @property
    def key(self) -> str:
        """Names the run in MLflow, before it has an id there."""
        return str(self.record["key"])

    @property
    def tracking_run(self) -> str | None:
        """MLflow's id of the run, once there is one."""
        run_id = self.record.get("tracking_run")
        return None if run_id is None else str(run_id)

    def note_tracking(self, handle: RunHandle) -> None:
        """Keep the ids of the MLflow run for the next start."""
        self.record |= {"tracking_run": handle.run_id, "tracking_uri": handle.uri}
        self.storage.write_json(RECORD, self.record)

    def note_code(self, environment: dict[str, str]) -> None:
        """Keep which code trains from here on, unless it is that of the last start.

        ``environment``: see :func:`pipeline.tracking.environment_tags`.
        """
        starts = self.record.setdefault("code", [])
        if not starts or starts[-1] != environment:
            starts.append(environment)
            self.storage.write_json(RECORD, self.record)

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Each change of the configuration that was made, or refused, since the run began; see ``changes``."""
        made: list[dict[str, Any]] = self.record.get("changes", [])
        return made

    def go_on(self, job: JobConfig, datasets: dict[str, str]) -> None:
        """Take the job as it is now for the rest of the run, where it may be so.

        Raises:
            ConfigurationRefused: see ``changes``; the refusal is noted.
        """
        step = _steps_done(self.storage)
        trained = trained_datasets(self.record["job"]["train"], step)
        known = dict(self.record["datasets"])
        known |= {name: path for name, path in datasets.items() if name not in known or name not in trained}
        changes = compare(self.record["job"], plain_job(job, known), step)
        if changes.refused:
            self._note_change(changes.as_record())
            self.storage.write_json(RECORD, self.record)
            url = self.storage.url
            raise ConfigurationRefused(f"{url} holds a run of another configuration; {changes.refusal}", self)
        self.record["datasets"] = known
        if changes.allowed:
            rates = _learning_rates(self.record["job"]["train"], job.train, step)
            self._note_change(changes.as_record() | rates)
            self._note_configuration(job, step)
        self.note_job(job)

    def _note_change(self, change: dict[str, Any]) -> None:
        made = self.record.setdefault("changes", [])
        if not made or made[-1] != change:  # a refusal may be asked for again and again
            made.append(change)

    def _note_configuration(self, job: JobConfig, step: int) -> None:
        """From ``step`` on the run is trained by this; what no kept step was trained by is forgotten."""
        decisive = decisive_configuration(job)
        if decisive != self.record["configuration"]:
            ranges = [one for one in self.record["configurations"] if one["from_step"] < step]
            self.record["configurations"] = [*ranges, {"from_step": step, "configuration": decisive}]
            self.record["configuration"] = decisive

    def note_job(self, job: JobConfig) -> None:
        """Keep the job as it is now, for who has the run but not its file, and each ``evaluate`` block it had."""
        plain = plain_job(job, self.record["datasets"])
        blocks = self.record.setdefault("evaluate", [])
        if self.record.get("job") != plain or not blocks or blocks[-1] != plain["evaluate"]:
            if not blocks or blocks[-1] != plain["evaluate"]:
                blocks.append(plain["evaluate"])
            self.record["job"] = plain
            self.storage.write_json(RECORD, self.record)


def run_path(job: JobConfig) -> str:
    """The run's folder relative to the job's storage."""
    return f"runs/{job.name}"


def open_run_folder(job: JobConfig, root: Storage, datasets: dict[str, str]) -> RunFolder:
    """The folder of the job's run: as it was left, or new.

    Args:
        datasets: folder or url of each dataset that is prepared, by name.

    Raises:
        ConfigurationRefused: the folder holds a run of another configuration; names the field that differs.
    """
    storage = root.at(run_path(job))
    decisive = decisive_configuration(job)
    record = read_record(storage)
    if record is not None:
        run = RunFolder(root, storage, run_path(job), record)
        run.go_on(job, datasets)
        return run
    record = {
        "format": "glscl-run",
        "version": 1,
        "key": f"{job.name}-{uuid.uuid4().hex[:12]}",
        "configuration": decisive,
        "configurations": [{"from_step": 0, "configuration": decisive}],
        "datasets": dict(datasets),
    }
    run = RunFolder(root, storage, run_path(job), record)
    run.note_job(job)
    return run


def plain_job(job: JobConfig, datasets: Mapping[str, str]) -> dict[str, Any]:
    """A job as plain data for ``run.json``: no secrets, no storage, and datasets as they lie there prepared.

    Args:
        datasets: folder or url of each prepared dataset.
    """
    tracking = job.tracking.resolved(Path.cwd())
    plain = _plain(job.model_copy(update={"tracking": tracking}))
    del plain["storage"]
    plain["datasets"] = {
        name: {"prepared": path, "modality": job.datasets[name].modality}
        for name, path in datasets.items()
        if name in job.datasets
    }
    return dict(plain)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return {name: _plain(item) for name, item in fields.items() if not isinstance(item, SecretStr)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not isinstance(item, SecretStr)}
    if isinstance(value, str):
        return without_userinfo(value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def load_run_job(address: str, overrides: Sequence[str] = ()) -> JobConfig:
    """The job of a run, by the run's address alone.

    Args:
        address: ``.../runs/NAME``: a path, ``file://`` or ``s3://``.
        overrides: as of :func:`pipeline.config.load_job`.

    Raises:
        UserError: there is no run; its record cannot be used.
    """
    run = open_storage(address)
    run.check(write=False)
    record = read_record(run)
    if record is None:
        raise UserError(f"{run.url} is no run: it has no {RECORD} (give a job's file, or .../runs/NAME)")
    url, _, name = run.url.rpartition("/runs/")
    if not url or "/" in name or not isinstance(record.get("job"), dict):
        raise UserError(f"{run.url} is no run that lies in .../runs/NAME with its job: give the job's file")
    root = open_storage(url)
    tree = {**record["job"], "name": name, "storage": {"url": root.url}}
    try:
        tree["datasets"] = {
            known: {**block, "prepared": root.resolve(block["prepared"]).url}
            for known, block in tree["datasets"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run.url_of(RECORD)} is damaged (datasets): give the job's file") from None
    return parse_job(tree, run.url_of(RECORD), overrides)


def read_record(storage: Storage) -> dict[str, Any] | None:
    """The record of a run's folder, or None where no run has begun.

    Raises:
        UserError: it is damaged, or of a run of another name.
    """
    try:
        record = storage.read_json(RECORD)
    except FileNotFoundError:
        return None
    except UserError:
        raise  # a ValueError too: the storage refuses
    except ValueError as error:
        raise UserError(f"{error}: the run's record is damaged; give the job another name") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{storage.url_of(RECORD)} is not a JSON object: the run's record is damaged; give the job another name"
        )
    if not isinstance(record.get("key", ""), str):
        raise UserError(f"{storage.url_of(RECORD)} is damaged (key); give the job another name")
    _refuse_copy(storage, record)
    return record


def _refuse_copy(storage: Storage, record: dict[str, Any]) -> None:
    """A run's name is that of its folder, and the first part of its key, which never changes. One that was copied to
    another name would go on in the MLflow run, and the local folders, of the one it was copied from.
    """
    began_as = record.get("key", "").rpartition("-")[0]
    name = unquote(storage.url.rpartition("/")[2])
    if began_as and name != began_as:
        raise UserError(
            f"{storage.url} holds the run '{began_as}' ({RECORD}), not '{name}': it was copied or renamed. To "
            f"go on with '{began_as}', use that name for the folder and the job; a run of its own needs a name "
            f"that is not taken (to branch off from '{began_as}': docs/checkpoints.md)"
        )


def decisive_configuration(job: JobConfig) -> dict[str, Any]:
    """The part of the job that decides what is trained, and how."""
    return {
        "seed": job.seed,
        "model": job.model.model_dump(mode="json"),
        "train": job.train.model_dump(mode="json"),
    }


def _steps_done(run: Storage) -> int:
    """Optimizer steps whose result is kept."""
    from pipeline.training.checkpoints import list_checkpoints  # torch

    return max((checkpoint.step for checkpoint in list_checkpoints(run)), default=0)


def _learning_rates(before: dict[str, Any], now: TrainBlock, step: int) -> dict[str, Any]:
    """The learning rate of the next step by both configurations, where a change moves it."""
    was = TrainBlock.model_validate(before)
    if step >= min(was.total_steps, now.total_steps):
        return {}
    rates = {
        "was": was.learning_rate * learning_rate_at(was, step),
        "now": now.learning_rate * learning_rate_at(now, step),
    }
    if math.isclose(rates["was"], rates["now"]):
        return {}
    logger.warning(
        "learning rate of step %d: %g by the changed configuration, %g before",
        step + 1,
        rates["now"],
        rates["was"],
    )
    return {"learning_rate_of_next_step": rates}
