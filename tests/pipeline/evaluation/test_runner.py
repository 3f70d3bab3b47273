"""A committed checkpoint is evaluated on tasks that read official formats, without any of the job's datasets."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.actor import Assignment
from pipeline.evaluation.runner import Runner
from pipeline.evaluation.tasks.alignment.config import AlignmentTask
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.classification.config import ClassificationTask
from tests.pipeline.evaluation.tasks.small import picture
from tests.pipeline.trained_run import make_trained_run


def test_zero_shot_tasks_run_on_a_checkpoint(tmp_path: Path) -> None:
    trained = make_trained_run(tmp_path)
    checkpoint = trained.checkpoint(4, tmp_path)
    for number in range(6):
        trained.root.write_bytes(f"raw/{'cat' if number % 2 else 'dog'}/{number}.png", picture(number))
        part = {"bbox_mask": (0, 0, 20, 20), "pixel_mask": np.ones((33, 40), bool)}
        value = {"caption": "a dog", "annotation": {"dog": [part]}}
        trained.root.write_bytes(f"pkls/{'cat' if number % 2 else 'dog'}/{number}.pkl", pickle.dumps(value))
    runner = Runner()

    def run(task: TaskConfig) -> dict[str, float]:
        digest = task.data_digest(trained.root, {})
        assignment = Assignment(
            run=trained.run,
            checkpoint=checkpoint,
            checkpoint_record={},
            task=task,
            version=task.version(digest),
            storage=trained.root,
            dataset=None,
            data_digest=digest,
            tokenizer="builtin",
            seed=trained.job.seed,
            attempt=1,
            started=0.0,
        )
        return runner(assignment).metrics

    found = run(ClassificationTask(name="c", images="raw"))
    assert (found["images"], found["classes"], found["top5"]) == (6.0, 2.0, 1.0)
    at_other_size = AlignmentTask(name="a", annotations="pkls", images="raw", resolution=64)
    found = run(at_other_size)
    assert (found["images"], found["phrases"]) == (6.0, 6.0)
    assert found["local_pixel"] == pytest.approx(1.0)
    assert 0.1 < found["local_box"] < 0.5
