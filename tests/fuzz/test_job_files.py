"""Job files with damaged YAML: a job, or a ``UserError`` that names the file; no other error, and no code runs."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.config import JobConfig, load_job
from sharding.errors import UserError
from tests.fixtures.fuzz import Fuzz, read_or_refuse
from tests.fuzz.mutations import mutated_bytes, mutated_tree

_JOB: dict[str, Any] = {
    "name": "fuzzed",
    "seed": 3,
    "storage": {"url": "/nowhere/storage"},
    "datasets": {
        "pictures": {
            "modality": "image",
            "source": {"kind": "folder", "path": "/nowhere/raw", "captions": ".txt"},
            "image": {"resize": 64},
            "filters": [{"kind": "caption", "min_words": 2}, {"kind": "duplicates"}],
        },
        "there": {"prepared": "/nowhere/shards", "modality": "image"},
    },
    "model": {
        "preset": "tiny",
        "overrides": {"image_size": 32, "hidden_dropout": 0.1, "layer_norm_eps": 1.0e-5},
    },
    "train": {
        "global_batch": 8,
        "lanes": 4,
        "learning_rate": 1.0e-3,
        "stages": [{"name": "s", "steps": 2, "mixture": {"pictures": 1, "there": 2}}],
    },
    "evaluate": {"tasks": [{"name": "pairs", "kind": "retrieval", "dataset": "pictures"}]},
    "tracking": {"uri": "sqlite:////nowhere/mlflow.db"},
}
_TOKENS = [
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system ['true']",
        b"!!binary ",
        b"!!set ",
        b"!!timestamp ",
    ),
    *(
        b"? [a]: b",
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n",
        b"\t",
        b"{",
        b"[" * 200,
        b"2024-01-01",
        b"12:30:45",
        b"1e5",
    ),
    *(
        b"0o17",
        b"010",
        b".nan",
        b"-.inf",
        b"yes",
        b"null",
        b"~",
        b"\xc2\x85",
        b"\x07",
        b"|\n",
        b">-\n",
        b"# ",
    ),
]


def _yaml(tree: Any) -> bytes:
    # Half a surrogate pair has no spelling in a file; the bytes of one are no UTF-8.
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def test_a_damaged_job_file_is_a_job_or_refused_by_name(fuzz: Fuzz, tmp_path):
    path = tmp_path / "job.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            job = load_job(path)
        except UserError as error:
            for line in str(error).splitlines():
                assert line.startswith(f"{path}:"), line
            return
        JobConfig.model_validate(job.model_dump())

    strategy = mutated_tree([_JOB]).map(_yaml) | mutated_bytes([_yaml(_JOB)], _TOKENS)
    fuzz("job_files", strategy, check, 150)


def test_a_damaged_override_is_taken_or_refused(fuzz: Fuzz, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(_yaml(_JOB))
    seeds = [
        b"train.stages.0.steps=3",
        b"model.overrides={hidden_dropout: 0.2}",
        b"datasets.pictures.image.resize=32",
    ]

    def check(data: bytes) -> None:
        # An argument of a command reaches Python with what is not UTF-8 escaped.
        override = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
        read_or_refuse(lambda: load_job(path, [override]), UserError, "--set", str(path))

    fuzz("overrides", mutated_bytes(seeds, [*_TOKENS, b".", b"="]), check, 100)
