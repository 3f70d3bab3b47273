"""Evaluates one checkpoint on one task: verified weights, processor, data, then the task itself."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.registry import evaluator
from sharding.manifest import load_manifest

if TYPE_CHECKING:
    from model import GLSCLForPreTraining
    from pipeline.evaluation.actor import Assignment
    from pipeline.evaluation.result import TaskResult
    from pipeline.training.checkpoints import Checkpoint
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

    def __call__(self, assignment: Assignment) -> TaskResult:
        """What the task finds.

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
        dataset = assignment.dataset
        reader = None if dataset is None else ShardReader(dataset, load_manifest(dataset))
        context = TaskContext(model, processor, assignment.storage, reader, assignment.seed)
        return evaluator(assignment.task.kind)(context, assignment.task)

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
