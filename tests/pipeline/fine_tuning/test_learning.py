"""Fine-tunings on real Ray and DeepSpeed: they learn, whatever the number of workers and whatever is killed."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from cluster.config import ClusterConfig
from cluster.workers import WorkerContext, run_workers
from model import GLSCLProcessor
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.dispatcher import Dispatcher
from pipeline.evaluation.result import TaskResult
from pipeline.evaluation.runner import Runner
from pipeline.evaluation.tasks.base import TaskConfig, TaskContext
from pipeline.evaluation.tasks.registry import evaluator
from pipeline.fine_tuning.launch import RECORD, _subject
from pipeline.fine_tuning.learner import model_class
from pipeline.tracking import open_run
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.loop import TrainingPlan, train
from sharding.manifest import load_manifest
from sharding.reader import ShardReader
from sharding.storage import Storage
from tests.pipeline.fine_tuning.material import (
    Run,
    make_run,
    nlvr2_task,
    retrieval_datasets,
    retrieval_task,
    vqa_task,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

STEPS, EVERY = 20, 4


@dataclass(frozen=True)
class Notes:
    """Stands for the driver's board: keeps every note of worker 0."""

    file: Path

    def post(self, topic: str, note: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def losses(self) -> list[dict[str, float]]:
        notes = [json.loads(line) for line in self.file.read_text().splitlines()]
        return [{name: note[name] for name in note if name.startswith("loss/")} for note in notes]


def _train_all(context: WorkerContext, plans: list[TrainingPlan]) -> None:
    for plan in plans:
        train(context, plan)


def run_all(
    run: Run, tasks: list[TaskConfig], datasets: dict[str, Storage], folder: Path, workers: int
) -> None:
    """Fine-tune for each task, one after the other in one group of workers, below ``ft/<folder's name>``."""
    folder.mkdir()
    plans = []
    for task in tasks:
        place = run.run.at(f"ft/{folder.name}/{task.name}")
        setup = run.setup(datasets)
        subject = _subject(run.assignment(task, datasets), setup, place)
        key = f"{folder.name}-{task.name}"
        plans.append(
            TrainingPlan(
                subject=subject,
                course=subject.course,
                seed=3,
                run=place,
                checkpoint_every=1000,
                keep_last=2,
                tracking=setup.tracking,
                tracking_key=key,
                tracking_run=open_run(setup.tracking, name=key, key=key, params={}, tags={}).run_id,
                scratch=folder / task.name,
                board=Notes(folder / f"{task.name}.jsonl"),  # type: ignore[arg-type]
            )
        )
    run_workers(
        _train_all,
        plans,
        workers=workers,
        config=ClusterConfig(),
        name="test",
        max_failures=0,
        scratch=folder / "ray",
    )


@dataclass(frozen=True)
class Trained:
    """All three tasks fine-tuned by two workers, nothing killed."""

    run: Run
    tasks: dict[str, TaskConfig]
    datasets: dict[str, Storage]
    folder: Path

    def weights(self, task: str) -> str:
        last = list_checkpoints(self.run.run.at(f"ft/two/{task}"))[-1]
        return str(last.files["model/model.safetensors"]["sha256"])

    def evaluated(self, name: str) -> TaskResult:
        task = self.tasks[name]
        place = self.run.run.at(f"ft/two/{name}")
        folder = place.local_path(f"{list_checkpoints(place)[-1].path}/model")
        model = model_class(task.kind).from_pretrained(folder).eval()
        reader = None
        if task.dataset_name is not None:
            dataset = self.datasets[task.dataset_name]
            reader = ShardReader(dataset, load_manifest(dataset))
        processor = GLSCLProcessor.from_config(model.config)
        context = TaskContext(model, processor, self.run.storage, reader, 3)
        return evaluator(task.kind)(context, task)


@pytest.fixture(scope="module")
def trained(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("learning")
    run = make_run(folder)
    datasets = retrieval_datasets(run, folder)
    tasks = [
        nlvr2_task(run.storage, steps=10),
        retrieval_task(steps=20),
        vqa_task(run.storage, steps=STEPS, checkpoint_every=EVERY),
    ]
    run_all(run, tasks, datasets, folder / "two", workers=2)
    return Trained(run, {task.name: task for task in tasks}, datasets, folder)


@pytest.mark.parametrize(
    ("task", "metric", "constant", "least"),
    [
        ("vqa", "accuracy", 0.25, 1.0),
        ("nlvr2", "accuracy", 0.5, 1.0),
        ("pairs", "i2t_rerank_R1", 0.25, 1.0),
    ],
)
def test_the_fine_tuned_model_has_learnt_what_there_is_to_learn(
    trained: Trained, task: str, metric: str, constant: float, least: float
) -> None:
    """``constant``: of one that says the same of everything."""
    losses = Notes(trained.folder / f"two/{task}.jsonl").losses()
    first = "rank" if task == "pairs" else task
    assert losses[-1][f"loss/{first}"] < 0.25 * losses[0][f"loss/{first}"]
    metrics = trained.evaluated(task).metrics
    assert metrics.get("best_constant", constant) == constant
    assert metrics[metric] >= least


def test_two_checkpoints_are_kept_while_it_runs(trained: Trained) -> None:
    kept = list_checkpoints(trained.run.run.at("ft/two/vqa"))
    assert [checkpoint.step for checkpoint in kept] == [STEPS - EVERY, STEPS]
    assert kept[-1].record["fine_tuned_from"] == trained.run.checkpoint.digest


def test_one_worker_has_the_losses_of_two(trained: Trained) -> None:
    alone = [
        type(task).model_validate(
            {**task.model_dump(), "fine_tune": {**task.model_dump()["fine_tune"], "workers": 1, "steps": 3}}
        )
        for task in trained.tasks.values()
    ]
    run_all(trained.run, alone, trained.datasets, trained.folder / "one", workers=1)
    for task in alone:
        one, two = (Notes(trained.folder / f"{many}/{task.name}.jsonl").losses() for many in ("one", "two"))
        assert len(one) == 3
        for mine, theirs in zip(one, two, strict=False):
            assert mine == pytest.approx(theirs, rel=1e-5), task.name


def until(condition: Callable[[], bool], dispatcher: Dispatcher, limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert not dispatcher.wait(0.02), [outcome.cause for outcome in dispatcher.outcomes()]
        assert time.monotonic() < deadline


def processes(name: str) -> list[psutil.Process]:
    """Those of this test's Ray."""
    return [
        process
        for process in psutil.Process(os.getpid()).children(recursive=True)
        if name in " ".join(process.cmdline())
    ]


def test_killed_fine_tunings_go_on_to_the_same_weights_and_others_fail_alone(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    run, task = trained.run, trained.tasks["vqa"]
    broken = copy.deepcopy(nlvr2_task(run.storage).model_dump()) | {"name": "broken"}
    lines = run.storage.read_bytes("nlvr2/train.json").replace(b', "label": "True"', b"", 1)
    run.storage.write_bytes("nlvr2/unlabelled.json", lines)
    broken["train"] = [{**broken["train"][0], "statements": "nlvr2/unlabelled.json"}]
    config = EvaluateConfig.model_validate(
        {"tasks": [task.model_dump(), broken], "after": "end", "attempts": 2}
    )
    setup = run.setup()
    parent = open_run(setup.tracking, name="one", key="one", params={}, tags={})
    run.run.write_json("run.json", {"tracking_run": parent.run_id})
    dispatcher = Dispatcher(
        run.run, config, run.storage, {}, seed=3, runner=partial(Runner, setup), poll_s=0.2
    )
    [folder] = {
        run.run.at(f"fine-tuning/vqa-v{task.version(task.data_digest(run.storage, {}))}").at(
            run.checkpoint.digest[:16]
        )
    }

    def steps() -> int:
        return max((checkpoint.step for checkpoint in list_checkpoints(folder)), default=0)

    dispatcher.start()
    try:
        until(lambda: steps() >= EVERY, dispatcher)
        for worker in processes("RayTrainWorker")[:1]:
            worker.kill()
        killed_at = steps()
        assert killed_at < STEPS
        until(lambda: steps() > killed_at, dispatcher)
        for actor in processes("EvaluationActor.evaluate"):
            actor.kill()
        assert steps() < STEPS
        assert not folder.exists(RECORD)
        while not dispatcher.wait(1.0):
            pass
    finally:
        dispatcher.stop()

    outcomes = {outcome.task: outcome for outcome in dispatcher.outcomes()}
    assert outcomes["vqa"].cause is None, outcomes["vqa"].cause
    assert outcomes["vqa"].attempt == 2, "the first was killed"
    assert outcomes["vqa"].metrics["accuracy"] == 1.0
    assert outcomes["broken"].attempt == 1, "it would fail the same way again"
    cause = str(outcomes["broken"].cause)
    assert cause.startswith("train.0.statements: nlvr2/unlabelled.json: train-")
    assert cause.endswith("has no label to train on")

    record = folder.read_json(RECORD)
    assert record["files"]["model/model.safetensors"]["sha256"] == trained.weights("vqa")
    assert record["steps"] == STEPS
    assert record["checkpoint"]["digest"] == run.checkpoint.digest
    names = {file.path.split("/")[0] for file in folder.list()}
    assert names == {"model", RECORD}, "only the model is kept"

    client = MlflowClient(tracking_uri=setup.tracking.uri)
    [child] = [
        found
        for found in client.search_runs([parent.experiment_id])
        if found.data.tags.get("mlflow.parentRunId") == parent.run_id
    ]
    assert child.info.status == "FINISHED"
    points = client.get_metric_history(child.info.run_id, "loss/vqa")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1)), "each step once"
