"""A job on shards that were there before is stopped by a regression, then evaluated and exported by its address."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from urllib.parse import quote, quote_plus

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from pipeline.evaluation.attachments import items_from_parquet
from pipeline.evaluation.ledger import Ledger, Outcome
from pipeline.runs import read_record
from sharding.storage import Storage, open_storage
from tests.cluster.test_import_path import users_folder
from tests.end_to_end.command import Command, committed
from tests.end_to_end.conftest import Glscl
from tests.fixtures.jobs import prepared_job, write_job

pytestmark = pytest.mark.slow

SECRET = "q7X/secret+zz= 9"


def holders_of_the_secret(folder: Path) -> list[str]:
    """Files that hold the secret in one of its spellings."""
    spellings = [SECRET, quote(SECRET), quote(SECRET, safe=""), quote_plus(SECRET), json.dumps(SECRET)[1:-1]]
    spellings += [base64.b64encode(SECRET.encode()).decode(), "secret+zz", "secret%2Bzz"]
    return [
        str(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and any(one.encode() in file.read_bytes() for one in spellings)
    ]


def finished(run: Storage) -> list[Outcome]:
    return [outcome for outcome in Ledger(run).outcomes() if outcome.cause is None]


def perfect(run: Storage, outcome: Outcome) -> None:
    """Rewrite an outcome as if every caption had found its picture first."""
    path = Ledger(run).file_path(outcome, "items.parquet")
    table = pq.read_table(io.BytesIO(run.read_bytes(path)))
    place = table.schema.get_field_index("t2i_R1")
    ones = pa.array(
        np.where(table["t2i_R1"].is_null(), np.nan, 1.0), mask=table["t2i_R1"].is_null().to_numpy()
    )
    target = io.BytesIO()
    pq.write_table(table.set_column(place, "t2i_R1", ones), target)
    run.write_bytes(path, target.getvalue())
    assert items_from_parquet(target.getvalue())[0].metrics["t2i_R1"].value == 1.0
    record = run.read_json(f"{outcome.key.path}.json")
    record["metrics"]["t2i_R1"] = 1.0
    record["files"]["items.parquet"]["sha256"] = hashlib.sha256(target.getvalue()).hexdigest()
    run.write_json(f"{outcome.key.path}.json", record)


def test_a_job_on_prepared_shards_is_stopped_by_a_fall_then_evaluated_and_exported_by_its_address(
    glscl: Glscl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also, since it leaves every kind of record: that none of them holds a password of the job or the environment."""
    tree = prepared_job(tmp_path) | {"name": "falls"}
    tree["cluster"]["environment"] = {  # nothing is installed on this machine
        "pip": [
            f"x @ https://me:{quote(SECRET, safe='')}@h/x.whl",
            f"y @ postgresql://me:{SECRET}@h/y",
        ],
        "env_vars": {"OWN": SECRET},
    }
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    tree["train"]["workers"] = 1
    tree["train"]["stages"][0] |= {"steps": 4000, "checkpoint_every": 20}
    tree["checkpoints"] = {"keep_last": 1, "keep_best": "held-out/t2i_R1"}
    file, run = write_job(tmp_path / "job.yaml", tree), open_storage(tmp_path / "storage").at("runs/falls")
    # In a folder of modules with the names of ours and of others: none of them is imported, in any process.
    folder = users_folder(
        tmp_path / "work", ("model", "sharding", "cluster", "statistics", "random", "torch")
    )
    command = Command("run", str(file), log=tmp_path / "first", folder=folder)
    command.wait_until(lambda: len(finished(run)) >= 1)
    command.kill()
    best = min(finished(run), key=lambda outcome: outcome.step)
    perfect(run, best)

    # The next life sees the next checkpoint fall, ends the workers, and says why.
    tree["evaluate"]["regression"] = [{"metric": "held-out/t2i_R1", "drop": 0.05, "action": "stop"}]
    write_job(file, tree)
    again = Command("run", str(file), log=tmp_path / "second", folder=folder)
    assert again.wait() == 1, again.output
    errors = [line for line in again.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the training is stopped: held-out/t2i_R1 fell from 1 at step" in errors[0]
    assert "Traceback" not in again.output
    steps = [checkpoint.step for checkpoint in committed(run)]
    assert max(steps) < 4000
    assert best.step in steps  # it is the best, and kept
    record = read_record(run)
    assert record is not None
    assert record["datasets"]["emoji"] == f"file://{tmp_path}/laion"
    assert run.exists("reports/evaluation.html")
    assert [block["regression"] for block in record["evaluate"]] == [
        [],
        [{"metric": "held-out/t2i_R1", "drop": 0.05, "action": "stop"}],
    ]
    client = MlflowClient(tracking_uri=tree["tracking"]["uri"])
    parent = client.get_run(record["tracking_run"])
    assert parent.info.status == "FAILED"
    assert "fell from 1" in parent.data.tags["regression.held-out/t2i_R1"]
    alias = client.get_model_version_by_alias(record["key"], "best-held-out-t2i_R1")
    assert int(alias.tags["step"]) == best.step
    assert client.get_model_version_by_alias(record["key"], "best").version == alias.version

    # By the run's address alone, with another version of the task.
    override = ("--set", "evaluate.after=end", "--set", "evaluate.tasks.0.rerank=2")
    output = Command(
        *("evaluate", run.url, *override, "--missing", "--tasks", "held-out"),
        log=tmp_path / "third",
        folder=folder,
    ).succeed()
    assert not (folder / "seen").exists(), (folder / "seen").read_text()
    assert [o.step for o in finished(run) if o.version != best.version] == steps
    assert all(str(step) in output for step in steps)

    code, output = glscl("export", run.url, tmp_path / "model")
    assert code == 0, output
    card = (tmp_path / "model" / "README.md").read_text()
    assert "`held-out`" in card
    assert "not recorded" not in card  # the manifests are found though they are not in the job's storage

    assert (tmp_path / "mlflow.db").stat().st_size > 0
    assert holders_of_the_secret(tmp_path) == [str(file)]  # the job's own file
