"""``glscl demo``: the main job on the bundled corpus, with everything it makes in one folder."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pipeline.config import JobConfig, load_job
from pipeline.job import run_job
from pipeline.progress import show_progress
from pipeline.scenes.command import BUNDLED, write_scenes
from pipeline.scenes.request import Request
from pipeline.yaml_reader import parse_yaml
from sharding.scenes.config import SceneRules
from sharding.storage import Storage, open_storage

_SCENES, _OBJECTS = "scenes", "scene-objects.jsonl"  # below raw/ in the job's storage
_UPLOADS = 16  # at once: small files, so that latency counts


def run_demo(folder: Path, storage_url: str | None, overrides: list[str], console: Console) -> None:
    """Stage the corpus in the storage, write ``FOLDER/job.yaml``, run it.

    Args:
        folder: gets the job file, the MLflow database and, without ``storage_url``, the storage.
        storage_url: object storage to use instead of a folder.
        overrides: as for ``glscl run --set``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file = folder / "job.yaml"
    job_file.write_text(_job_text(folder.resolve(), storage_url), encoding="utf-8")
    job = load_job(job_file, overrides)
    stage_corpus(job, console)
    raw = open_storage(job.storage).at("raw")
    write_scenes(raw.at(_SCENES), _sets(raw.url_of(_OBJECTS)), console)
    run_job(job, console)
    console.print(
        f"\nThe job's file: {job_file}. Run again after any interruption, it goes on: glscl run {job_file}"
    )


def _sets(objects: str) -> Request:
    """The evaluation sets that demo.yaml names; of the objects that its scenes show."""
    return Request(
        objects=objects,
        splits={"train": 300, "test": 100},
        tasks=("vqa", "nlvr2", "classification", "alignment"),
        rules=SceneRules(width=96, height=96, vocabulary=16, most_kinds=2, most_alike=3),
    )


def stage_corpus(job: JobConfig, console: Console) -> None:
    """Copy the bundled corpus to ``raw/`` in the job's storage; files that are there are left alone.

    And the table of what scenes may show: no emoji that is held out, since scenes are trained on.
    """
    storage = open_storage(job.storage)
    storage.check(write=True)
    raw = storage.at("raw")
    corpus = Path(str(resources.files("pipeline.demo"))) / "corpus"
    present = {file.path: file.size for file in raw.list()}
    files = sorted(path for path in corpus.rglob("*") if path.is_file())
    missing = [
        path for path in files if present.get(path.relative_to(corpus).as_posix()) != path.stat().st_size
    ]
    with (
        show_progress(console, "staging the corpus", len(missing)) as task,
        ThreadPoolExecutor(_UPLOADS) as pool,
    ):
        uploads = pool.map(lambda path: _upload(raw, corpus, path), missing)
        for done, _ in enumerate(uploads, start=1):
            task.update(done)
    raw.write_bytes(_OBJECTS, _objects_of_training(corpus))


def _objects_of_training(corpus: Path) -> bytes:
    """``objects.jsonl`` without the emoji of the held-out split."""
    rows = [json.loads(line) for line in (corpus / "images.jsonl").read_text("utf-8").splitlines()]
    held_out = {row["path"] for row in rows if row["split"] == "held-out"}
    objects = (corpus / BUNDLED.name).read_text("utf-8").splitlines(keepends=True)
    return "".join(line for line in objects if json.loads(line)["path"] not in held_out).encode()


def _upload(raw: Storage, corpus: Path, path: Path) -> None:
    raw.write_bytes(path.relative_to(corpus).as_posix(), path.read_bytes())


def _job_text(folder: Path, storage_url: str | None) -> str:
    """demo.yaml with this run's addresses in place of its own."""
    text = resources.files("pipeline.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = parse_yaml(text, "demo.yaml")
    url = storage_url or (folder / "storage").as_uri()
    before = tree["storage"]["url"]
    tree["storage"]["url"] = url
    for dataset in tree["datasets"].values():
        source = dataset["source"]
        place = "objects" if source["kind"] == "scenes" else "path"
        source[place] = source[place].replace(before, url.rstrip("/"), 1)
    tree["tracking"] = {"uri": f"sqlite:///{folder}/mlflow.db", "experiment": "glscl-demo"}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
