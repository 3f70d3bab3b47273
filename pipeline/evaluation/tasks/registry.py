"""The kinds of tasks there are. A new one is named here, and has a folder beside this file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Discriminator, Tag

from pipeline.evaluation.tasks.alignment.config import AlignmentTask
from pipeline.evaluation.tasks.classification.config import ClassificationTask
from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.vqa.config import VQATask

if TYPE_CHECKING:
    from pipeline.evaluation.result import TaskResult
    from pipeline.evaluation.tasks.base import TaskConfig, TaskContext

KINDS = ("retrieval", "classification", "alignment", "vqa", "nlvr2")

_DEFAULT = "retrieval"


def task_tag(kind: str) -> str:
    """The kind within pydantic's error locations. It is no key of the YAML: error messages leave it out."""
    return f"(task {kind})"


#: The tags of all kinds, and the kind of each.
TASK_TAGS = {task_tag(kind): kind for kind in KINDS}


def _tag_of(block: Any) -> str:
    kind = block.get("kind", _DEFAULT) if isinstance(block, dict) else getattr(block, "kind", _DEFAULT)
    return task_tag(str(kind))


#: A task's block of the YAML, told apart by its ``kind``: retrieval where there is none.
AnyTask = Annotated[
    Annotated[RetrievalTask, Tag(task_tag("retrieval"))]
    | Annotated[ClassificationTask, Tag(task_tag("classification"))]
    | Annotated[AlignmentTask, Tag(task_tag("alignment"))]
    | Annotated[VQATask, Tag(task_tag("vqa"))]
    | Annotated[NLVR2Task, Tag(task_tag("nlvr2"))],
    Discriminator(_tag_of),
]


def evaluator(kind: str) -> Callable[[TaskContext, TaskConfig], TaskResult]:
    """The function ``evaluate(context, task)`` of a kind; imported when it is asked for, as it brings torch."""
    module: Any = importlib.import_module(f"pipeline.evaluation.tasks.{kind}.task")
    return cast("Callable[[TaskContext, TaskConfig], TaskResult]", module.evaluate)
