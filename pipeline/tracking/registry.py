"""A run's registered model: versions for checkpoints that were the best by some metric, aliases on those that are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.tracking.connection import is_missing
from pipeline.tracking.runs import RunHandle

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.tracking.results import CheckpointEntry

DIGEST = "glscl.checkpoint_digest"
BEST = "best"


def alias_of(metric: str) -> str:
    """``best-TASK-METRIC``: MLflow's aliases have letters, digits, ``_`` and ``-`` only."""
    task, _, name = metric.partition("/")
    return f"{BEST}-{task}-{re.sub(r'[^A-Za-z0-9_]', '_', name)}"[:255]


class Registry:
    """Moves aliases; made new versions only for checkpoints that have none yet.

    Args:
        client: a connected client.
        run: whose ``key`` names the registered model, made at the first use.
    """

    def __init__(self, client: MlflowClient, run: RunHandle) -> None:
        self._client, self._run = client, run
        self._versions: dict[str, str] | None = None  # by the checkpoint's digest
        self._aliases: dict[str, str] = {}  # versions

    def move(self, alias: str, checkpoint: CheckpointEntry, model_id: str) -> None:
        """Puts an alias on a checkpoint, in one write of the server's.

        Args:
            model_id: the checkpoint's logged model.
        """
        from mlflow.exceptions import MlflowException

        try:
            if self._versions is None:
                self._versions = self._open()
            version = self._versions.get(checkpoint.digest)
            if version is None:
                version = self._versions[checkpoint.digest] = self._create(checkpoint, model_id)
            if self._aliases.get(alias) != version:
                self._client.set_registered_model_alias(self._run.key, alias, version)
                self._aliases[alias] = version
        except MlflowException as error:
            if is_missing(error):
                self._versions = None  # somebody deleted it: found out, and mended, at the next attempt
            raise

    def _open(self) -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        name = self._run.key
        try:
            model = self._client.get_registered_model(name)
        except MlflowException as error:
            if not is_missing(error):
                raise
            text = f"Checkpoints of run {self._run.run_id} that were the best by some metric"
            model = self._client.create_registered_model(name, description=text)
        self._aliases = {alias: str(version) for alias, version in model.aliases.items()}
        versions: dict[str, str] = {}
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            versions |= {v.tags[DIGEST]: str(v.version) for v in page if DIGEST in v.tags}
            token = page.token
            if not token:
                return versions

    def _create(self, checkpoint: CheckpointEntry, model_id: str) -> str:
        # A server refuses links to folders, and a database opened directly does not find its own logged models here.
        through_server = self._run.uri.startswith(("http:", "https:"))
        version = self._client.create_model_version(
            self._run.key,
            source=f"models:/{model_id}" if through_server else checkpoint.url,
            run_id=self._run.run_id,
            model_id=model_id,
            tags={
                DIGEST: checkpoint.digest,
                "step": str(checkpoint.step),
                "checkpoint": checkpoint.url,
                "logged_model": model_id,
            },
        )
        return str(version.version)
