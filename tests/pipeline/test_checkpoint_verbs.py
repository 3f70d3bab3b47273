"""``glscl checkpoints``: what is listed, checked, cleared away, converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline import patience
from pipeline.cli import app
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.checkpoints.fragments import Pieces, Stretch, write_pieces
from pipeline.training.checkpoints.record import commit
from sharding.errors import BadData, StorageFault, UserError
from tests.pipeline.trained_run import TrainedRun, make_trained_run, retrieval_metrics


def with_state(run: TrainedRun, step: int, scratch: Path, **details: Any) -> None:
    """A checkpoint with the weights of a model and, in two workers' files, pieces of each parameter."""
    checkpoint = run.checkpoint(step, scratch)
    weights = load_file(scratch / f"{step}/model.safetensors")
    files = dict(checkpoint.files)
    for rank in range(2):
        values, updates = {}, {}
        for name, tensor in weights.items():
            half = tensor.numel() // 2
            start, length = (0, half) if rank == 0 else (half, tensor.numel() - half)
            if length:
                stretch = Stretch(name, start, length)
                part = tensor.reshape(-1)[start : start + length].clone()
                values[stretch] = {"weight": part, "exp_avg": part / 2, "exp_avg_sq": part**2}
                updates[stretch] = step
        path = scratch / f"{rank}.safetensors"
        write_pieces(path, values, updates)
        name = f"state/worker-{rank:05d}.safetensors"
        uploaded = run.run.upload(path, f"{checkpoint.path}/{name}")
        files[name] = {"size": uploaded.size, "sha256": uploaded.sha256}
    commit(run.run, checkpoint.path, {**checkpoint.record, "files": files, **details})


@pytest.fixture
def run(tmp_path: Path) -> TrainedRun:
    made = make_trained_run(tmp_path)
    for step in (4, 8, 12):
        with_state(made, step, tmp_path / "scratch", stage_end=step == 8)
    return made


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoints", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def listed(run: TrainedRun) -> dict[int, list[str]]:
    code, output = call("ls", run.run.url, "--json")
    assert code == 0
    return {row["step"]: row["kept_as"] for row in json.loads(output)["checkpoints"]}


def test_ls_says_what_keeps_each(run: TrainedRun) -> None:
    waits = "waits for an evaluation"
    assert listed(run) == {
        4: ["newest", waits],
        8: ["newest", "end of a stage", waits],
        12: ["newest", waits],
    }
    for checkpoint in list_checkpoints(run.run):
        run.evaluated(checkpoint, **retrieval_metrics(50.0))
    assert listed(run) == {4: ["newest"], 8: ["newest", "end of a stage"], 12: ["newest"]}
    code, output = call("ls", run.run.url)
    assert code == 0
    assert "end of a stage" in output


def test_prune_keeps_what_waits_for_an_evaluation_and_clears_killed_writes_away(run: TrainedRun) -> None:
    run.run.write_bytes("checkpoints/step-00000010-0a/state/worker-00000.safetensors", b"part")
    run.run.write_bytes("checkpoints/step-00000016-0b/state/worker-00000.safetensors", b"under way")
    first = list_checkpoints(run.run)[0]
    code, output = call("prune", run.run.url, "--keep-last", "1", "--json")
    assert (code, json.loads(output)["deleted"]) == (0, [])
    run.evaluated(first, **retrieval_metrics(50.0))
    _, output = call("prune", run.run.url, "--keep-last", "1", "--dry-run", "--json")
    assert json.loads(output)["deleted"] == [4]
    assert [one.step for one in list_checkpoints(run.run)] == [4, 8, 12]
    call("prune", run.run.url, "--keep-last", "1")
    assert [one.step for one in list_checkpoints(run.run)] == [8, 12]
    folders = {file.path.split("/")[1] for file in run.run.list("checkpoints")}
    assert folders == {"step-00000008", "step-00000012", "step-00000016-0b"}


def test_verify_names_each_file_that_is_not_what_was_committed(run: TrainedRun) -> None:
    code, output = call("verify", run.run.url)
    assert code == 0
    assert "3 of 3 checkpoints" in output
    newest = list_checkpoints(run.run)[-1]
    path = f"{newest.path}/state/worker-00001.safetensors"
    data = bytearray(run.run.read_bytes(path))
    data[-1] ^= 1
    run.run.write_bytes(path, bytes(data))
    run.run.delete(f"{newest.path}/model/config.json")
    code, output = call("verify", run.run.url, "--json")
    assert code == 1
    faults = {found["file"] for found in json.loads(output)["faults"]}
    assert faults == {"state/worker-00001.safetensors", "model/config.json"}
    assert call("verify", run.run.url, "--step", "8")[0] == 0


def test_convert_gives_whole_parameters_and_moments(run: TrainedRun, tmp_path: Path) -> None:
    code, _ = call("convert", run.run.url, str(tmp_path / "whole"), "--step", "8")
    assert code == 0
    weights = load_file(tmp_path / "scratch/8/model.safetensors")
    whole = load_file(tmp_path / "whole/weights.safetensors")
    squares = load_file(tmp_path / "whole/exp_avg_sq.safetensors")
    assert whole.keys() == squares.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(whole[name], tensor)
        assert torch.equal(squares[name], tensor**2)
    state = json.loads((tmp_path / "whole/state.json").read_text())
    assert state["step"] == 8
    assert set(state["updates"].values()) == {8}
    with pytest.raises(UserError, match="is there already"):
        call("convert", run.run.url, str(tmp_path / "whole"))


def test_pieces_are_read_across_files_and_a_hole_is_told(tmp_path: Path) -> None:
    numbers = torch.arange(10.0)
    cuts = {0: (0, 4), 1: (4, 7), 2: (8, 10)}  # 7 is in no file
    for rank, (start, end) in cuts.items():
        stretch = Stretch("w", start, end - start)
        write_pieces(tmp_path / f"{rank}", {stretch: {"weight": numbers[start:end].clone()}}, {stretch: rank})
    with Pieces(tmp_path / f"{rank}" for rank in cuts) as pieces:
        assert torch.equal(pieces.read(Stretch("w", 2, 4), "weight"), numbers[2:6])
        assert pieces.updates(Stretch("w", 2, 4)) == 1
        assert pieces.missing([Stretch("w", 0, 7), Stretch("w", 6, 4), Stretch("v", 0, 1)]) == [
            Stretch("w", 6, 4),
            Stretch("v", 0, 1),
        ]
        with pytest.raises(BadData, match="1 numbers"):
            pieces.read(Stretch("w", 6, 2), "weight")
    (tmp_path / "0").write_bytes(b"not a file of pieces")
    with pytest.raises(BadData, match="not-pieces"):
        Pieces([tmp_path / "0"])


def test_a_write_outlasts_an_outage_of_the_storage_and_not_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = [StorageFault("away"), StorageFault("still away")]

    def act() -> str:
        if faults:
            raise faults.pop()
        return "done"

    monkeypatch.setattr(patience, "_AGAIN_S", 0.0)
    assert patience.patiently(act, "it") == "done"
    faults.append(StorageFault("away for good"))
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    with pytest.raises(StorageFault, match="away for good"):
        patience.patiently(act, "it")
