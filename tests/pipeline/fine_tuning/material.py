"""Tasks that fine-tune, small enough for tests: official files about a few emoji, and a checkpoint to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import ClusterConfig
from model import GLSCLForPreTraining
from pipeline.evaluation.actor import Assignment
from pipeline.evaluation.ledger import checkpoint_record
from pipeline.evaluation.tasks.base import TaskConfig
from pipeline.evaluation.tasks.nlvr2.config import NLVR2Task
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.vqa.config import VQATask
from pipeline.fine_tuning.launch import FineTuningSetup
from pipeline.tracking import TrackingConfig
from pipeline.training.checkpoints import FORMAT, VERSION, Checkpoint, record_digest
from sharding.prepare import PrepareConfig, prepare
from sharding.storage import Storage, open_storage
from tests.fixtures.corpora import write_rows
from tests.pipeline.evaluation.tasks.small import EMOJI, picture, tiny_model, write_lines

#: What the pictures show, by their number: a brown, a blue, a yellow and a pink thing.
NAMES = ("fist", "heart", "man", "tongue")
_STEMS = ("1f44a-1f3ff", "1f499", "1f468", "1f445")
_PICTURES = [[path.stem for path in EMOJI].index(stem) for stem in _STEMS]

#: A recipe that learns what there is to learn within a few dozen steps.
RECIPE = {
    "global_batch": 16,
    "lanes": 4,
    "loader_processes": 0,
    "learning_rate": 4e-3,
    "fusion_multiplier": 1,
    "head_multiplier": 2,
    "resolution": 24,
    "augmentation": {},
    "schedule": {"warmup": 0.0, "decay": "constant"},
    "workers": 2,
}


@dataclass(frozen=True)
class Run:
    """A job's storage with the files of all tasks and a run with one checkpoint."""

    storage: Storage
    run: Storage
    checkpoint: Checkpoint

    def assignment(self, task: TaskConfig, datasets: dict[str, Storage] | None = None) -> Assignment:
        """The first attempt at a task."""
        digest = task.data_digest(self.storage, datasets or {})
        name = task.dataset_name
        return Assignment(
            run=self.run,
            checkpoint=self.checkpoint,
            checkpoint_record=checkpoint_record(self.checkpoint),
            task=task,
            version=task.version(digest),
            storage=self.storage,
            dataset=None if name is None else (datasets or {})[name],
            data_digest=digest,
            tokenizer="builtin",
            seed=3,
            attempt=1,
            started=0.0,
        )

    def setup(self, datasets: dict[str, Storage] | None = None) -> FineTuningSetup:
        local = self.storage.local_path("")
        assert local is not None
        tracking = TrackingConfig(uri=f"sqlite:///{local}/mlflow.db")
        return FineTuningSetup(ClusterConfig(), tracking, datasets or {})


def make_run(folder: Path) -> Run:
    storage = open_storage(folder / "storage")
    run = storage.at("runs/one")
    for number in range(len(NAMES)):
        for copy in range(3):
            storage.write_bytes(f"images/{number}-{copy}.png", _picture(number, copy))
    return Run(storage, run, commit(run, folder / "model"))


def _picture(number: int, copy: int) -> bytes:
    """The same emoji at different sizes: no two files alike."""
    return picture(_PICTURES[number], size=(40 + copy, 36 + copy))


def commit(run: Storage, folder: Path, step: int = 10) -> Checkpoint:
    """A checkpoint as a training leaves it."""
    tiny_model(GLSCLForPreTraining).save_pretrained(folder)
    path, files = f"checkpoints/step-{step:08d}", {}
    for file in sorted(folder.iterdir()):
        uploaded = run.upload(file, f"{path}/model/{file.name}")
        files[f"model/{file.name}"] = {"size": uploaded.size, "sha256": uploaded.sha256}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "stage": 0,
        "stage_end": True,
        "files": files,
    }
    record |= {"stage_name": "pre-training", "data": {}, "tracking_key": "one", "bad_samples": {}}
    run.write_json(f"{path}/commit.json", {"record": record, "digest": record_digest(record)})
    return Checkpoint(step, 0, path, record_digest(record), record)


def vqa_task(storage: Storage, count: int = 48, **recipe: Any) -> VQATask:
    """Which of the four is it, asked ``count`` times of the first two copies, and once of each third."""
    _write_questions(storage, "train", [(number % 4, number // 4 % 2) for number in range(count)])
    _write_questions(storage, "test", [(number, 2) for number in range(4)])
    train, test = (
        {"questions": f"vqa/{split}-q.json", "annotations": f"vqa/{split}-a.json", "images": "images"}
        | {"image_name": "{image_id}.png"}
        for split in ("train", "test")
    )
    fine_tune = {**RECIPE, "steps": 20, **recipe}
    return VQATask.model_validate({"name": "vqa", "data": test, "train": [train], "fine_tune": fine_tune})


def _write_questions(storage: Storage, split: str, pictures: list[tuple[int, int]]) -> None:
    questions, annotations = [], []
    for question, (number, copy) in enumerate(pictures):
        questions.append(
            {"image_id": f"{number}-{copy}", "question": "what is this?", "question_id": question}
        )
        answers = [{"answer": NAMES[number], "answer_id": one} for one in range(10)]
        annotations.append(
            {"question_id": question, "answers": answers, "answer_type": "other"}
            | {"multiple_choice_answer": NAMES[number]}
        )
    storage.write_json(f"vqa/{split}-q.json", {"data_subtype": split, "questions": questions})
    storage.write_json(f"vqa/{split}-a.json", {"data_subtype": split, "annotations": annotations})


def nlvr2_task(storage: Storage, count: int = 48, **recipe: Any) -> NLVR2Task:
    """Is the left one a fist? ``count`` pairs to learn from, eight to be judged."""
    draws = np.random.default_rng(1)
    for split, number in (("train", count), ("dev", 8)):
        lines = []
        for pair in range(number):
            left, right = int(draws.integers(4)) * (pair % 2), int(draws.integers(4))
            for side, shown in enumerate((left, right)):
                copy = 2 if split == "dev" else pair // 2 % 2
                storage.write_bytes(f"pairs/{split}-{pair}-0-img{side}.png", _picture(shown, copy))
            sentence = {"identifier": f"{split}-{pair}-0-0", "sentence": "The left one is a fist."}
            lines.append({**sentence, "label": str(left == 0)})
        write_lines(storage, f"nlvr2/{split}.json", lines)
    fine_tune = {**RECIPE, "steps": 20, **recipe}
    train, dev = ({"statements": f"nlvr2/{split}.json", "images": "pairs"} for split in ("train", "dev"))
    return NLVR2Task.model_validate({"name": "nlvr2", "data": dev, "train": [train], "fine_tune": fine_tune})


def retrieval_datasets(run: Run, folder: Path) -> dict[str, Storage]:
    """Twelve pictures with a caption each to learn from, and others of the same to be found. Needs Ray."""
    found = {}
    for name, copies in (("pairs", (0, 1, 3)), ("held-out", (2,))):
        raw, rows = folder / f"raw-{name}", []
        raw.mkdir()
        for number in range(len(NAMES)):
            for copy in copies:
                (raw / f"{number}-{copy}.png").write_bytes(_picture(number, copy))
                rows.append({"path": f"{number}-{copy}.png", "caption": f"a picture of the {NAMES[number]}"})
        write_rows(raw / "pairs.jsonl", rows)
        source = {"kind": "table", "path": str(raw / "pairs.jsonl")}
        source |= {"path_column": "path", "caption_column": "caption"}
        config = PrepareConfig.model_validate({"source": source, "modality": "image", "samples_per_shard": 5})
        found[name] = run.storage.at(prepare(name, config, run.storage, in_flight=2).path)
    return found


def retrieval_task(**recipe: Any) -> RetrievalTask:
    """The pictures of ``held-out``, after a fine-tuning on ``pairs`` with three negatives."""
    fine_tune = {**RECIPE, "steps": 20, "dataset": "pairs", "negatives": 3, **recipe}
    return RetrievalTask.model_validate(
        {"name": "pairs", "dataset": "held-out", "rerank": 4, "fine_tune": fine_tune}
    )
