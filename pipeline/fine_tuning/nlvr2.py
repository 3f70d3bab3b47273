"""Fine-tuning on NLVR2: a sentence, a pair of images, and whether it is true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from model import GLSCLForNLVR2
from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
from pipeline.evaluation.tasks.nlvr2.data import load_statements
from pipeline.evaluation.tasks.pictures import ImageReader
from pipeline.fine_tuning.examples import Example, ExampleDataset, ExampleTable, FineTuningBatch
from pipeline.fine_tuning.learner import Judged, Material, right_labels
from pipeline.training.config import Stage
from sharding.errors import UserError
from sharding.storage import Storage

#: What is trained, and evaluated.
MODEL = GLSCLForNLVR2


def open_training(task: NLVR2Task, material: Material) -> NLVR2Training:
    """The statements of ``task.train``.

    Raises:
        UserError: see ``load_statements``; or a statement without a label.
    """
    return NLVR2Training(ExampleTable(_examples(task, material.storage)), material.storage)


def _examples(task: NLVR2Task, storage: Storage) -> Iterator[Example]:
    for place, split in enumerate(task.train):
        field = f"train.{place}"
        for statement in load_statements(storage, split, field):
            if statement.label is None:
                raise UserError(
                    f"{field}.statements: {split.statements}: {statement.identifier} has no label to train on"
                )
            pair = [statement.left, statement.right]
            yield Example(
                f"{place}/{statement.identifier}", statement.sentence, pair, [(int(statement.label), 1.0)]
            )


class NLVR2Training:
    """See :class:`pipeline.fine_tuning.learner.TaskTraining`."""

    weights: ClassVar[dict[str, float]] = {"nlvr2": 1.0}
    labels = 2

    def __init__(self, data: ExampleTable, storage: Storage) -> None:
        self.data, self._storage = data, storage

    def load_model(self, folder: Path) -> GLSCLForNLVR2:
        model: GLSCLForNLVR2 = MODEL.from_pretrained(folder)
        return model

    def dataset(self, stage: Stage, seed: int) -> ExampleDataset:
        return ExampleDataset(self.data, ImageReader(self._storage), stage, images=2, seed=seed)

    def judge(self, engine: Any, batch: FineTuningBatch) -> Judged:
        assert batch.labels is not None
        output = engine(
            batch.input_ids,
            batch.attention_mask,
            batch.pixel_values,
            labels=batch.labels.argmax(dim=1),
            valid=batch.valid,
        )
        return Judged(output.loss, {"nlvr2": output.loss}, right_labels(output.logits, batch.labels))
