"""A job that is sent to other machines means there what it means here, or is refused a line a field."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from cluster import jobs
from pipeline import cli
from pipeline.config import JobConfig, load_job
from pipeline.submission import load_for_cluster, modules_of_filters, variables
from sharding.errors import UserError
from sharding.given_path import IS_GIVEN_PATH
from tests.fixtures.jobs import tiny_job, write_job

#: Fields of a job that hold text and no path. Whoever adds a field says here, or by its type, which it is.
NO_PATHS = {
    # names, columns, patterns, words
    *(
        "name",
        "datasets",
        "dataset",
        "media_column",
        "path_column",
        "url_column",
        "caption_column",
        "columns",
    ),
    *(
        "caption_field",
        "where",
        "split",
        "media",
        "text",
        "subset",
        "hub",
        "revision",
        "image_name",
        "prompts",
    ),
    *(
        "keep",
        "words",
        "filter",
        "arguments",
        "scorer",
        "metric",
        "keep_best",
        "mixture",
        "experiment",
        "alpha",
    ),
    *("captions", "group_by", "experiment_id"),
    # blocks that are other programs', and a digest
    *("overrides", "deepspeed", "weights"),
    # of the network, or looked at by themselves
    *(
        "endpoint_url",
        "region",
        "user_agent",
        "contact",
        "opt_out",
        "address",
        "pip",
        "env_vars",
        "resources",
    ),
    *("uri", "tokenizer"),
}


def fields_of(model: type[BaseModel], seen: set[type] | None = None) -> Iterator[tuple[str, str, Any]]:
    """(model, field, annotation with its marks) of every field below a model, unions and tags included."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        yield model.__name__, name, annotation
        for inner in models_in(field.annotation):
            yield from fields_of(inner, seen)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in typing.get_args(annotation):
        if not isinstance(inner, str):
            yield from parts(inner)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    found = [
        part
        for part in parts(annotation)
        if isinstance(part, type) and not isinstance(part, types.GenericAlias)
    ]
    return [part for part in found if issubclass(part, BaseModel)]


def is_marked(annotation: Any) -> bool:
    return any(IS_GIVEN_PATH in getattr(part, "__metadata__", ()) for part in parts(annotation))


def test_every_field_of_a_job_that_holds_text_is_known_as_a_path_or_as_none() -> None:
    fields = list(fields_of(JobConfig))
    texts = [(model, name, kind) for model, name, kind in fields if str in parts(kind) or Any in parts(kind)]
    marked = {f"{model}.{name}" for model, name, kind in fields if is_marked(kind)}
    unknown = {
        f"{model}.{name}" for model, name, kind in texts if not is_marked(kind) and name not in NO_PATHS
    }
    assert unknown == set()
    assert len(fields) > 150
    assert {name.rpartition(".")[2] for name in marked} == {
        *("url", "path", "images", "videos", "annotations", "objects", "model", "prepared", "weights"),
        *("class_names", "answer2id", "questions", "statements"),
    }


def tree_of(folder: Path) -> dict[str, Any]:
    """A job with a path in every kind of block, all of them absolute."""
    tree = tiny_job(folder / "raw", folder / "storage")
    datasets = tree["datasets"]
    datasets["tars"] = {
        "modality": "image",
        "source": {"kind": "webdataset", "path": ["/data/{0..9}.tar", "s3://b/x.tar"]},
    }
    datasets["coco"] = {
        "modality": "image",
        "source": {"kind": "coco", "path": "/c.json", "images": "s3://b/images"},
    }
    datasets["there"] = {"modality": "image", "prepared": "s3://b/datasets/there-1"}
    datasets["emoji"]["filters"] = [{"kind": "blocked_words", "path": "file:///lists/words.txt"}]
    splits = {"questions": "/q.json", "annotations": "/a.json", "images": "/images"}
    tree["evaluate"]["tasks"] += [
        {
            "name": "vqa",
            "kind": "vqa",
            "data": dict(splits),
            "train": [dict(splits) | {"questions": "/t.json"}],
        },
        {"name": "objects", "kind": "classification", "images": "/val", "class_names": "s3://b/names.json"},
        {"name": "regions", "kind": "alignment", "annotations": "/pkls", "images": "/images"},
    ]
    tree["model"]["weights"] = ["/weights/clip.pt", "s3://b/roberta.safetensors"]
    return tree


RELATIVE = {
    "storage.url": "storage",
    "datasets.clips.source.path": "raw/clips.jsonl",
    "datasets.tars.source.path": "./{0..9}.tar",
    "datasets.coco.source.path": "../captions.json",
    "datasets.coco.source.images": "~/images",
    "datasets.there.prepared": "datasets/there-1",
    "datasets.emoji.filters.0.path": "words.txt",
    "evaluate.tasks.1.data.questions": "raw/q.json",
    "evaluate.tasks.1.train.0.images": "raw/images",
    "evaluate.tasks.2.class_names": "names.json",
    "evaluate.tasks.3.annotations": "pkls",
    "model.weights.1": "roberta.safetensors",
}


def test_relative_paths_are_refused_a_line_a_field_and_absolute_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path / "job.yaml", tree_of(tmp_path))
    (tmp_path / "vocabulary").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_for_cluster(job, []) == load_job(job)

    relative = RELATIVE | {"model.tokenizer": "vocabulary", "tracking.uri": "sqlite:///mlflow.db"}
    overrides = [f"{field}={value!r}" for field, value in relative.items()]
    load_job(job, overrides)  # here they mean something
    with pytest.raises(UserError) as refused:
        load_for_cluster(job, overrides)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(relative), str(refused.value)
    for value in relative.values():
        (line,) = [line for line in lines if repr(value) in line]
        assert "a job sent to a cluster needs" in line
        assert "absolute path" in line
    for field in (
        "storage.url",
        "datasets.there.prepared",
        "model.weights.1",
        "model.tokenizer",
        "tracking.uri",
    ):
        assert any(line.startswith(f"{job}: {field}: got ") for line in lines), field


def test_a_job_says_where_it_is_tracked_or_the_environment_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tree = tree_of(tmp_path)
    del tree["tracking"]
    job = write_job(tmp_path / "job.yaml", tree)
    with pytest.raises(
        UserError, match=r"tracking\.uri: is required of a job sent to a cluster \(or MLFLOW_"
    ):
        load_for_cluster(job, [])
    for relative in ("sqlite:///mlflow.db", "sqlite+pysqlite:///data/mlflow.db", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", relative)
        with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: got .*; a job sent to a cluster needs"):
            load_for_cluster(job, [])
    for given in ("sqlite:////data/mlflow.db", "http://me:secret@tracking:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        config = load_for_cluster(job, [])
        assert variables(config, {"MLFLOW_TRACKING_URI": given, "OTHER": "x"}) == {
            "MLFLOW_TRACKING_URI": given
        }
    # What the job itself says comes first.
    own = "cluster.environment.env_vars.MLFLOW_TRACKING_URI='http://of-the-job:5000'"
    assert variables(load_for_cluster(job, [own]), {}) == {}
    of_the_job = load_for_cluster(job, ["tracking.uri='http://of-the-job:5000'"])
    shell = {
        "MLFLOW_TRACKING_URI": "http://x",
        "MLFLOW_EXPERIMENT_NAME": "birds",
        "MLFLOW_TRACKING_PASSWORD": "secret",
    }
    assert variables(of_the_job, shell) == {"MLFLOW_EXPERIMENT_NAME": "birds"}


def test_modules_of_custom_filters_are_sent_with_what_they_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sent_helpers").mkdir()
    (tmp_path / "sent_helpers" / "__init__.py").write_text("LONGEST = 10\n")
    (tmp_path / "not_imported.py").write_text("")
    (tmp_path / "sent_filters.py").write_text(
        "from sent_helpers import LONGEST\n\n\nclass Short:\n    level = 'caption'\n\n"
        "    def keeps(self, caption):\n        return len(caption) <= LONGEST\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    tree = tree_of(tmp_path)
    assert modules_of_filters(load_job(write_job(tmp_path / "without.yaml", tree))) == []
    tree["datasets"]["emoji"]["filters"] = [{"kind": "custom", "filter": "sent_filters.Short"}]
    found = modules_of_filters(load_job(write_job(tmp_path / "with.yaml", tree)))
    assert [path.name for path in found] == ["sent_filters.py", "sent_helpers"]


def test_a_job_that_comes_through_a_pipe_is_read_once_and_sent_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_job(tmp_path / "job.yaml", tree_of(tmp_path))
    reader, writer = os.pipe()
    os.write(writer, file.read_bytes())
    os.close(writer)
    sent: list[bytes | None] = []

    def submitted(job_yaml: Path, address: str, **options: Any) -> str:
        sent.append(options["content"])
        return "an-id"

    monkeypatch.setattr(jobs, "submit", submitted)
    address = ["--address", "http://me:hunter2@head:8265"]
    shown = CliRunner().invoke(cli.app, ["submit", f"/dev/fd/{reader}", *address])
    os.close(reader)
    assert shown.exit_code == 0, shown.output
    assert sent == [file.read_bytes()]
    assert "glscl status an-id --address http://***@head:8265" in shown.output
    assert "hunter2" not in shown.output


def test_help_shows_no_password_of_the_job_servers_address() -> None:
    environment = os.environ | {"RAY_API_SERVER_ADDRESS": "http://me:hunter2@head:8265"}
    code = "from pipeline.cli import app; app(['status', '--help'])"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "RAY_API_SERVER_ADDRESS" in shown
    assert "hunter2" not in shown
