"""A run's folder in the storage: ``runs/<job name>/``, what began in it, and whether this job may go on in it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import JobConfig
from pipeline.tracking import RunHandle
from sharding.errors import UserError
from sharding.storage import Storage

RECORD = "run.json"

#: What may differ when a run goes on: it changes neither the weights nor the data they see.
_FREE_TO_CHANGE = {"loader_processes", "cache_mb", "max_failures", "bad_sample_limit"}


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


def run_path(job: JobConfig) -> str:
    """The run's folder relative to the job's storage."""
    return f"runs/{job.name}"


def open_run_folder(job: JobConfig, root: Storage, datasets: dict[str, str]) -> RunFolder:
    """The folder of the job's run: as it was left, or new.

    Raises:
        UserError: the folder holds a run of another configuration; names the field that differs.
    """
    storage = root.at(run_path(job))
    decisive = decisive_configuration(job)
    record = read_record(storage)
    if record is not None:
        _refuse_change(record["configuration"], decisive, storage)
        return RunFolder(root, storage, run_path(job), record)
    record = {
        "format": "glscl-run",
        "version": 1,
        "key": f"{job.name}-{uuid.uuid4().hex[:12]}",
        "configuration": decisive,
        "datasets": datasets,
    }
    storage.write_json(RECORD, record)
    return RunFolder(root, storage, run_path(job), record)


def read_record(storage: Storage) -> dict[str, Any] | None:
    """The record of a run's folder, or None where no run has begun."""
    try:
        record: dict[str, Any] = storage.read_json(RECORD)
    except FileNotFoundError:
        return None
    except UserError:
        raise  # a ValueError too: the storage refuses
    except ValueError as error:
        raise UserError(f"{error}: the run's record is damaged; give the job another name") from None
    return record


def decisive_configuration(job: JobConfig) -> dict[str, Any]:
    """The part of the job that a run cannot change once it has begun."""
    train = job.train.model_dump(mode="json")
    return {
        "seed": job.seed,
        "model": job.model.model_dump(mode="json"),
        "train": {key: value for key, value in train.items() if key not in _FREE_TO_CHANGE},
    }


def _refuse_change(before: dict[str, Any], now: dict[str, Any], storage: Storage) -> None:
    was, is_ = dict(_leaves("", before)), dict(_leaves("", now))
    changed = [key for key in sorted({*was, *is_}) if was.get(key) != is_.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {was.get(key)!r}, now {is_.get(key)!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{storage.url} holds a run of another configuration ({shown}{more}); "
            "give the job another name, or undo the change to go on"
        )


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}.{index}", item)
    else:
        yield re.sub(r"\s+", " ", prefix), value
