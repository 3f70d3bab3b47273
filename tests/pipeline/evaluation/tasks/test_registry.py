"""A task's block is told by its kind, and an error in it names its own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_job
from pipeline.evaluation.tasks.alignment.config import AlignmentTask
from pipeline.evaluation.tasks.classification.config import ClassificationTask
from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
from pipeline.evaluation.tasks.registry import KINDS, evaluator
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.vqa.config import VQATask
from sharding.errors import UserError
from tests.fixtures.jobs import tiny_job

VQA = {"questions": "q.json", "annotations": "a.json", "images": "i"}
NLVR2 = {"statements": "s.json", "images": "i"}
TASKS: dict[str, tuple[type, dict[str, Any]]] = {
    "retrieval": (RetrievalTask, {"dataset": "held-out"}),
    "classification": (ClassificationTask, {"images": "s3://b/birds"}),
    "alignment": (AlignmentTask, {"annotations": "pkls", "images": "images"}),
    "vqa": (VQATask, {"data": VQA, "train": [{**VQA, "questions": "t.json"}]}),
    "nlvr2": (NLVR2Task, {"data": NLVR2, "train": [{**NLVR2, "statements": "t.json"}]}),
}


def parsed(tmp_path: Path, *tasks: Any) -> list[Any]:
    tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
    tree["evaluate"]["tasks"] = list(tasks)
    return list(parse_job(tree, "job").evaluate.tasks)


def refused(tmp_path: Path, *tasks: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        parsed(tmp_path, *tasks)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_block_and_its_evaluation(tmp_path: Path, kind: str) -> None:
    block, keys = TASKS[kind]
    (task,) = parsed(tmp_path, {"name": "t", "kind": kind, **keys})
    assert type(task) is block
    assert task.kind == kind
    assert callable(evaluator(kind))
    assert parsed(tmp_path, task) == [task]


def test_a_task_without_a_kind_is_retrieval(tmp_path: Path) -> None:
    (task,) = parsed(tmp_path, {"name": "t", "dataset": "held-out"})
    assert type(task) is RetrievalTask


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vqaa", "got 'vqaa'; did you mean 'vqa'?"),
        ("classify", "got 'classify'; did you mean 'classification'?"),
        ("segments", "got 'segments'; known: alignment, classification, nlvr2, retrieval, vqa"),
        (3, "got 3; known: alignment, classification, nlvr2, retrieval, vqa"),
        (None, "got None; known: alignment, classification, nlvr2, retrieval, vqa"),
        (["vqa"], "got ['vqa']; did you mean 'vqa'?"),
    ],
)
def test_an_unknown_kind_is_one_line_with_the_nearest(tmp_path: Path, kind: Any, said: str) -> None:
    assert refused(tmp_path, {"name": "t", "kind": kind}) == [f"job: evaluate.tasks.0.kind: {said}"]


def test_errors_name_the_keys_of_the_kind_and_no_tags(tmp_path: Path) -> None:
    nlvr2 = {"name": "n", "kind": "nlvr2", "data": {**NLVR2, "imagez": "i"}, "train": []}
    lines = refused(
        tmp_path,
        {"name": "a", "dataset": "held-out", "reranked": 3},
        {"name": "b", "kind": "classification", "imagez": "i"},
        nlvr2,
        "retrieval",
    )
    assert lines == [
        "job: evaluate.tasks.0.reranked: unknown key; did you mean 'rerank'?",
        "job: evaluate.tasks.1.images: is required",
        "job: evaluate.tasks.1.imagez: unknown key; did you mean 'images'?",
        "job: evaluate.tasks.2.data.imagez: unknown key; did you mean 'images'?",
        "job: evaluate.tasks.2.train: got []; list should have at least 1 item after validation, not 0",
        "job: evaluate.tasks.3: got 'retrieval'; must be a block of keys",
    ]
    # The key is another kind's: it is not offered.
    assert refused(tmp_path, {"name": "a", "dataset": "held-out", "class_names": "x"}) == [
        "job: evaluate.tasks.0.class_names: unknown key"
    ]


def test_a_dataset_may_be_called_as_a_kind(tmp_path: Path) -> None:
    tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
    tree["datasets"]["vqa"] = {**tree["datasets"]["emoji"], "modalitty": "image"}
    with pytest.raises(
        UserError, match=r"^job: datasets\.vqa\.modalitty: unknown key; did you mean 'modality'\?$"
    ):
        parse_job(tree, "job")
