"""A run as a training leaves it in the storage, made without one: record, datasets, checkpoints, evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from model import GLSCLConfig, GLSCLForPreTraining
from pipeline.config import JobConfig, parse_job
from pipeline.evaluation.ledger import Ledger, Outcome, checkpoint_record
from pipeline.fine_tuning.config import FineTuning
from pipeline.fine_tuning.launch import FOLDER, RECORD
from pipeline.fine_tuning.launch import FORMAT as LAUNCH_FORMAT
from pipeline.runs import open_run_folder
from pipeline.training.checkpoints import FORMAT, VERSION, Checkpoint, record_digest
from sharding.manifest import Counts, Manifest, Modality
from sharding.storage import Storage, open_storage
from tests.fixtures.jobs import tiny_job


@dataclass
class TrainedRun:
    """``digests`` by dataset."""

    job: JobConfig
    root: Storage
    run: Storage
    digests: dict[str, str]

    def checkpoint(self, step: int, scratch: Path) -> Checkpoint:
        """Commit one with the weights of a model drawn from ``step``, as the training does."""
        torch.manual_seed(step)
        block = self.job.model
        model = GLSCLForPreTraining(GLSCLConfig.preset(block.preset, **block.overrides))
        model.save_pretrained(scratch / f"{step}")
        path, files = f"checkpoints/step-{step:08d}", {}
        for file in sorted((scratch / f"{step}").iterdir()):
            uploaded = self.run.upload(file, f"{path}/model/{file.name}")
            files[f"model/{file.name}"] = {"size": uploaded.size, "sha256": uploaded.sha256}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "stage": int(step > 8),
            "world_size": 2,
            "files": files,
            "seed": self.job.seed,
            "zero_stage": self.job.train.zero_stage,
            "precision": self.job.train.precision,
            "data": {name: self.digests[name] for name in ("emoji", "clips")},
            "bad_samples": {"checksum-mismatch": 3},
        }
        self.run.write_json(f"{path}/commit.json", {"record": record, "digest": record_digest(record)})
        return Checkpoint(step, record["stage"], path, record_digest(record), record)

    def evaluated(
        self, checkpoint: Checkpoint, task: str = "held-out", cause: str | None = None, **metrics: float
    ) -> None:
        """Write an evaluation into the ledger: ``metrics``, or given up for ``cause``."""
        outcome = Outcome(
            checkpoint=checkpoint_record(checkpoint),
            task=task,
            version="1-0123abcd",
            dataset={"name": "held-out", "digest": self.digests["held-out"]},
            started=1.0,
            finished=2.0,
            attempt=1,
            metrics=metrics,
            cause=cause,
        )
        ledger = Ledger(self.run)
        ledger.fail(outcome, give_up=True) if cause else ledger.finish(outcome)

    def fine_tuned(self, checkpoint: Checkpoint, task: str, model: PreTrainedModel, scratch: Path) -> Storage:
        """Keep ``model`` as a fine-tuning for ``task`` does."""
        version = "1-0123abcd"
        place = self.run.at(f"{FOLDER}/{task}-v{version}/{checkpoint.digest[:16]}")
        model.save_pretrained(scratch / task / "model")
        files = {}
        for file in sorted((scratch / task / "model").iterdir()):
            uploaded = place.upload(file, f"model/{file.name}")
            files[f"model/{file.name}"] = {"size": uploaded.size, "sha256": uploaded.sha256}
        block = FineTuning(steps=20, learning_rate=2e-4, resolution=48)
        record = {
            "format": LAUNCH_FORMAT,
            "files": files,
            "task": task,
            "task_version": version,
            "checkpoint": checkpoint_record(checkpoint),
            "data": "89abcdef" * 8,
            "seed": 7,
            "steps": 20,
            "recipe": block.model_dump(mode="json"),
            "finished": 3.0,
        }
        place.write_json(RECORD, record)
        return place


def retrieval_metrics(recall: float) -> dict[str, float]:
    """What the retrieval task measures, all recalls alike."""
    found = {"candidates_images": 250.0, "candidates_texts": 500.0, "skipped": 0.0}
    for way in ("t2i", "i2t"):
        for kind in (way, f"{way}_rerank"):
            found |= {f"{kind}_R{k}": recall for k in (1, 5, 10)}
            found[f"{kind}_median_rank"] = 17.0
        found[f"{way}_chance_R10"] = 0.04
    return found


def make_trained_run(folder: Path, **changes: Any) -> TrainedRun:
    """The run of ``tests.fixtures.jobs.tiny_job`` below ``folder``; ``changes`` to the job by block."""
    tree = tiny_job("/data/raw", folder / "storage")
    for block, values in changes.items():
        tree[block] = tree[block] | values
    job = parse_job(tree, "job.yaml")
    root = open_storage(folder / "storage")
    digests, paths = {}, {}
    media: dict[str, Modality] = {"emoji": "image", "held-out": "image", "clips": "video"}
    for name, modality in media.items():
        manifest = Manifest(
            name=name,
            modality=modality,
            configuration={"source": tree["datasets"][name]["source"]},
            configuration_digest="0",
            source={"url": "file:///data/raw"},
            shards=[],
            counts=Counts(read=1040, kept=1000, dropped={"too-small": 30, "decode-failed": 10}),
            dropped_keys=[name],
        )
        paths[name] = f"datasets/{name}-0123"
        root.write_json(f"{paths[name]}/manifest.json", manifest.model_dump(mode="json"))
        digests[name] = manifest.digest
    return TrainedRun(job, root, open_run_folder(job, root, paths).storage, digests)
