"""What a job needs before it can run on other machines: ``glscl submit`` refuses it, or sends it along."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster import import_path
from pipeline.config import JobConfig, load_job
from pipeline.tracking.config import without_credentials
from pipeline.yaml_reader import read_content
from sharding.errors import UserError
from sharding.filters.config import CustomFilter
from sharding.prepare import PrepareConfig

_VARIABLE = "MLFLOW_TRACKING_URI"
_EXPERIMENT_VARIABLES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
_RIGHT = "an MLflow server (http://host:5000) or a database at an absolute path (sqlite:////data/mlflow.db)"


def load_for_cluster(path: Path, overrides: list[str], content: bytes | None = None) -> JobConfig:
    """A job as :func:`pipeline.config.load_job` reads it, that means the same on every machine.

    Args:
        content: of the file, where it was read already: a pipe gives it once.

    Raises:
        UserError: one line for each fault: also for each path that is relative, and where nothing says where to
            track.
    """
    content = read_content(path) if content is None else content
    try:
        job = load_job(path, overrides, sent=True, content=content)
        lines = []
    except UserError as error:
        lines = str(error).splitlines()
        job = load_job(path, overrides, content=content)  # raises where anything else is wrong
    lines += [f"{path}: {fault}" for fault in _tracking_faults(job, os.environ)]
    if lines:
        raise UserError("\n".join(lines))
    return job


def variables(job: JobConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of this process's environment that say where the job is tracked, for the cluster.

    Credentials are not among them: they are the machines', or the job says them in ``cluster.environment.env_vars``.
    """
    wanted = [*_EXPERIMENT_VARIABLES, *([] if job.tracking.uri is not None else [_VARIABLE])]
    own = job.cluster.environment.env_vars
    return {name: environment[name] for name in wanted if environment.get(name) and name not in own}


def modules_of_filters(job: JobConfig) -> list[Path]:
    """Files and folders in the current folder that the job's ``custom`` filters are made of.

    Of the modules that are loaded, thus with those that a filter's module imports itself.
    """
    blocks = [dataset.filters for dataset in job.datasets.values() if isinstance(dataset, PrepareConfig)]
    if not any(isinstance(block, CustomFilter) for filters in blocks for block in filters):
        return []
    here, found = Path.cwd(), set()
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if "." in name or not origin or name in import_path.PACKAGES or name == "__main__":
            continue
        place = Path(origin)
        place = place.parent if place.stem == "__init__" else place
        if place.parent == here and here != Path(import_path.ROOT):
            found.add(place)
    return sorted(found)


def _tracking_faults(job: JobConfig, environment: Mapping[str, str]) -> list[str]:
    given = job.cluster.environment.env_vars.get(_VARIABLE)
    field, uri = "tracking.uri", job.tracking.uri
    if uri is None and given is not None:
        field, uri = f"cluster.environment.env_vars.{_VARIABLE}", given.get_secret_value()
    elif uri is None:
        field, uri = _VARIABLE, environment.get(_VARIABLE)
    if not uri:
        return [f"tracking.uri: is required of a job sent to a cluster (or {_VARIABLE}): {_RIGHT}"]
    scheme, _, place = uri.partition("://")
    database = scheme.partition("+")[0] == "sqlite"
    if (database and not place.startswith("//")) or "://" not in uri:
        return [f"{field}: got {without_credentials(uri)!r}; a job sent to a cluster needs {_RIGHT}"]
    return []
