"""What all tasks have in common: the keys of their block, and what a task is given when it runs."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from model import GLSCLForPreTraining, GLSCLProcessor
    from pipeline.fine_tuning.config import FineTuning
    from sharding.reader import ShardReader
    from sharding.storage import Storage

#: Which checkpoints are due: every one, those at the end of a stage, or the last alone.
After = Literal["checkpoint", "stage", "end"]


class TaskConfig(BaseModel):
    """One evaluation of a checkpoint: the keys that every kind of task has.

    Attributes:
        name: of the task in the ledger, in MLflow and in the report.
        kind: what is measured.
        after, attempts, timeout_s, gpus: as in ``evaluate``; None: what stands there.
        priority: of several evaluations that wait, the task with the highest goes first.
        resolution: side in pixels; by default the checkpoint's own.
        limit: only the first so many samples.
        batch_size: samples, or pairs, in one pass.
        bad_limit: share of samples that may be unreadable before the evaluation fails.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Raised when the kind's numbers change for the same checkpoint and data: its old results no longer count.
    VERSION: ClassVar[int] = 1
    #: Fields that change the cost of an evaluation, or when it runs, not its numbers.
    COST_ONLY: ClassVar[frozenset[str]] = frozenset(
        {"name", "after", "attempts", "timeout_s", "gpus", "priority", "batch_size"}
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=80)]
    kind: str
    after: After | None = None
    priority: int = 0
    attempts: Annotated[int, Field(ge=1)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    resolution: Annotated[int, Field(gt=0)] | None = None
    limit: Annotated[int, Field(ge=2)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64
    bad_limit: Annotated[float, Field(ge=0, le=1)] = 0.01

    @property
    def dataset_name(self) -> str | None:
        """The one of the job's ``datasets`` that the task reads; None for one that reads an official format."""
        return None

    @property
    def frames_taken(self) -> int:
        """The most frames that the model is given at once."""
        return 1

    @property
    def fine_tuning(self) -> FineTuning | None:
        """How the checkpoint is fine-tuned first (key ``fine_tune``); None: it is evaluated as it is."""
        return None

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the numbers, as plain data."""
        excluded: dict[str, Any] = dict.fromkeys(self.COST_ONLY, True)
        recipe = self.fine_tuning
        excluded["fine_tune"] = True if recipe is None else set(recipe.COST_ONLY)
        return self.model_dump(mode="json", exclude=excluded)

    def version(self, data_digest: str) -> str:
        """``<version of the kind>-<8 hex digits>``: changes with whatever changes the numbers.

        Args:
            data_digest: see :meth:`data_digest`.
        """
        text = json.dumps(self.decisive() | {"digest": data_digest}, sort_keys=True)
        return f"{self.VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @abstractmethod
    def data_digest(self, storage: Storage, datasets: Mapping[str, Storage]) -> str:
        """sha256 of what the task is measured on: other data are another version of the task.

        Args:
            storage: the job's; relative addresses of the task are below it.
            datasets: the job's prepared datasets by name.

        Raises:
            UserError: data that are not there, naming the field and the address.
        """


@dataclass(frozen=True)
class TaskContext:
    """What a task's ``evaluate`` works with.

    Attributes:
        model: the checkpoint, in evaluation mode, on the device to use.
        processor: at the resolution to use.
        storage: the job's; addresses in the task's block are resolved against it.
        reader: of the prepared dataset ``task.dataset_name``; None where the task names none.
        seed: of the run.
    """

    model: GLSCLForPreTraining
    processor: GLSCLProcessor
    storage: Storage
    reader: ShardReader | None
    seed: int
