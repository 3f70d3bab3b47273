"""Evaluates one checkpoint on one task: verified weights, processor, data, then the task itself."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.registry import evaluator
from sharding.manifest import load_manifest

if TYPE_CHECKING:
    from model import GLSCLForPreTraining
    from pipeline.evaluation.actor import Assignment
    from pipeline.evaluation.result import TaskResult
    from pipeline.fine_tuning.launch import FineTuningSetup
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage


class Runner:
    """Keeps the model of the last checkpoint: the tasks of a checkpoint follow each other.

    Runs on a GPU when the process sees one, else on one thread: the cores belong to the training.

    Args:
        setup: what tasks that fine-tune need; None: there are none.
    """

    def __init__(self, setup: FineTuningSetup | None = None) -> None:
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights, in the middle of the training's own
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        self._setup = setup
        self._digest = ""
        self._model: GLSCLForPreTraining | None = None

    def __call__(self, assignment: Assignment) -> TaskResult:
        """What the task finds.

        Raises:
            BadData: the checkpoint's files are not those that were committed.
            UserError: the dataset is not there.
            BadDataLimit: too many samples cannot be read.
            WorkerGroupError, Unhealthy: the fine-tuning failed, where the task has one.
        """
        if assignment.task.fine_tuning is not None:
            return self._fine_tuned(assignment)
        return self._evaluated(assignment, self._load(assignment.run, assignment.checkpoint))

    def _fine_tuned(self, assignment: Assignment) -> TaskResult:
        """Fine-tunes the checkpoint, or takes what came of it earlier, and evaluates that."""
        from pipeline.fine_tuning.launch import fine_tuned
        from pipeline.fine_tuning.learner import model_class

        assert self._setup is not None, "tasks that fine-tune need a setup"
        self._model = None  # never two models at once
        with tempfile.TemporaryDirectory(prefix="glscl-evaluation-") as folder:
            found = fine_tuned(assignment, self._setup, Path(folder))
            model = model_class(assignment.task.kind).from_pretrained(found.model)
        result = self._evaluated(assignment, model.to(self._device).eval())
        facts = {"model": found.url, "steps": found.record["steps"], "recipe": found.record["recipe"]}
        return dataclasses.replace(result, details={**result.details, "fine_tuning": facts})

    def _evaluated(self, assignment: Assignment, model: Any) -> TaskResult:
        from model import GLSCLProcessor
        from sharding.reader import ShardReader

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
