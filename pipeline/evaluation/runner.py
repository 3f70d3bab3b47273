"""Evaluates one checkpoint on one task: verified weights, processor, data, then the task itself."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.manifest import load_manifest

if TYPE_CHECKING:
    from model import GLSCLForPreTraining, GLSCLProcessor
    from pipeline.evaluation.actor import Assignment
    from pipeline.evaluation.config import TaskConfig
    from pipeline.training.checkpoints import Checkpoint
    from sharding.reader import ShardReader
    from sharding.storage import Storage


class Runner:
    """Keeps the model of the last checkpoint: the tasks of a checkpoint follow each other.

    Runs on a GPU when the process sees one, else on one thread: the cores belong to the training.
    """

    def __init__(self) -> None:
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights, in the middle of the training's own
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        self._digest = ""
        self._model: GLSCLForPreTraining | None = None

    def __call__(self, assignment: Assignment) -> Mapping[str, float]:
        """The metrics of the task.

        Raises:
            BadData: the checkpoint's files are not those that were committed.
            UserError: the dataset is not there.
            BadDataLimit: too many samples cannot be read.
        """
        from model import GLSCLProcessor
        from sharding.reader import ShardReader

        model = self._load(assignment.run, assignment.checkpoint)
        config = model.config
        if assignment.task.resolution is not None:
            config = copy.deepcopy(config)
            config.image_size = assignment.task.resolution
        processor = GLSCLProcessor.from_config(config, assignment.tokenizer)
        reader = ShardReader(assignment.dataset, load_manifest(assignment.dataset))
        return run_task(model, processor, reader, assignment.task)

    def _load(self, run: Storage, checkpoint: Checkpoint) -> GLSCLForPreTraining:
        if self._model is None or self._digest != checkpoint.digest:
            from model import GLSCLForPreTraining
            from pipeline.training.checkpoints import fetch_model

            self._model = None  # never two models at once
            with tempfile.TemporaryDirectory(prefix="glscl-evaluation-") as folder:
                weights = fetch_model(run, checkpoint, Path(folder))
                model = GLSCLForPreTraining.from_pretrained(weights)
            self._model, self._digest = model.to(self._device).eval(), checkpoint.digest
        return self._model


def run_task(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, reader: ShardReader, task: TaskConfig
) -> Mapping[str, float]:
    """Runs ``task.kind``; the home of further kinds."""
    from pipeline.evaluation.tasks import retrieval

    kinds = {"retrieval": retrieval.evaluate}
    return kinds[task.kind](model, processor, reader, task)
