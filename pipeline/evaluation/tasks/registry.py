"""The kinds of tasks there are. A new one is named here, and has a folder beside this file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from pipeline.evaluation.tasks.retrieval.config import RetrievalTask

if TYPE_CHECKING:
    from pipeline.evaluation.result import TaskResult
    from pipeline.evaluation.tasks.base import TaskConfig, TaskContext

#: A task's block of the YAML, told apart by its ``kind``.
AnyTask = Annotated[RetrievalTask, Field()]

#: Where a kind's ``evaluate(context, task)`` is; imported when it runs, as it brings torch.
_MODULES = {"retrieval": "pipeline.evaluation.tasks.retrieval.task"}


def evaluator(kind: str) -> Callable[[TaskContext, TaskConfig], TaskResult]:
    """The function that evaluates tasks of a kind."""
    module: Any = importlib.import_module(_MODULES[kind])
    return cast("Callable[[TaskContext, TaskConfig], TaskResult]", module.evaluate)
