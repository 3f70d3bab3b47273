"""The present version of each task: of its settings and of the data it is measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.evaluation.tasks.base import TaskConfig
from sharding.errors import BadData, StorageFault, UserError

if TYPE_CHECKING:
    from sharding.storage import Storage

log = logging.getLogger("pipeline.evaluation")


@dataclass(frozen=True)
class TaskVersion:
    """A task's version. ``fault``: why its data cannot be used, in one line; then the digest is empty."""

    version: str
    data_digest: str
    fault: str | None = None


class TaskVersions:
    """Finds out the versions one after the other, as reading a task's data may take long.

    A task whose data cannot be used has a version of its own, under which that is recorded: once the data are
    there, the version is another, and everything due is evaluated. The data are looked at once in a life.

    Args:
        tasks: all of the configuration.
        storage: the job's.
        datasets: the job's prepared datasets by name.
    """

    def __init__(
        self, tasks: Iterable[TaskConfig], storage: Storage, datasets: Mapping[str, Storage]
    ) -> None:
        self._unknown = list(tasks)
        self._storage, self._datasets = storage, datasets
        self._known: dict[str, TaskVersion] = {}

    def learn(self) -> bool:
        """Looks at the data of one more task; False when there was none left.

        Raises:
            StorageFault: the storage is away; to be tried again.
        """
        if not self._unknown:
            return False
        task = self._unknown[0]
        try:
            digest, fault = task.data_digest(self._storage, self._datasets), None
        except StorageFault:
            raise
        except Exception as error:  # noqa: BLE001 - one task's data must not end the others; it is reported
            digest, fault = "", _line(error)
            log.error("evaluation task %s cannot run: %s", task.name, fault)
        self._known = {**self._known, task.name: TaskVersion(task.version(digest), digest, fault)}
        self._unknown.pop(0)
        return True

    @property
    def complete(self) -> bool:
        """Whether all are known."""
        return not self._unknown

    def get(self, task: TaskConfig) -> TaskVersion | None:
        """The version of a task, if it is known already."""
        return self._known.get(task.name)

    def present(self) -> set[tuple[str, str]]:
        """(task, version) of all that are known."""
        return {(name, found.version) for name, found in self._known.items()}


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    expected = isinstance(error, UserError | BadData | OSError) and text
    return text if expected else f"{type(error).__name__}: {text}"
