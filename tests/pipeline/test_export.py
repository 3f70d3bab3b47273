"""A checkpoint becomes a folder that transformers opens, with a card that says what the run's records say."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from model import (
    GLSCLConfig,
    GLSCLForImageTextRetrieval,
    GLSCLForNLVR2,
    GLSCLForPreTraining,
    GLSCLForVisualQuestionAnswering,
    GLSCLModel,
    GLSCLProcessor,
)
from pipeline.cli import main
from pipeline.export.folder import CARD
from pipeline.fine_tuning.launch import kept_fine_tunings
from pipeline.runs import open_run_folder
from pipeline.tracking import RunHandle
from sharding.storage import open_storage
from tests.end_to_end.command import ROOT
from tests.fixtures.s3 import S3Server
from tests.pipeline.trained_run import TrainedRun, make_trained_run, retrieval_metrics

Glscl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def glscl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Glscl:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()  # what making the run has printed
        monkeypatch.setattr(sys, "argv", ["glscl", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Steps 4, 8 and 12; 8 is the best by the ledger, and of 12 one evaluation failed. Only read by tests."""
    folder = tmp_path_factory.mktemp("trained")
    run = make_trained_run(folder)
    for step, recall in ((4, 0.125), (8, 0.5), (12, 0.25)):
        run.evaluated(run.checkpoint(step, folder / "scratch"), **retrieval_metrics(recall))
    return run


def _weights(run: TrainedRun, step: int) -> Path:
    path = run.run.local_path(f"checkpoints/step-{step:08d}/model/model.safetensors")
    assert path is not None
    return path


def _card(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def test_the_newest_checkpoint_of_a_run_opens_as_any_class_and_is_bit_for_bit_the_one_committed(
    trained: TrainedRun, tmp_path: Path, glscl: Glscl
) -> None:
    code, output, _ = glscl("export", trained.run.url, tmp_path / "out")
    assert code == 0
    assert "step 12, weights verified" in output
    assert (tmp_path / "out/model.safetensors").read_bytes() == _weights(trained, 12).read_bytes()
    theirs = load_file(_weights(trained, 12))
    whole = GLSCLForPreTraining.from_pretrained(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in whole.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, theirs[name])
    for bare in (GLSCLModel.from_pretrained(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out")):
        assert torch.equal(bare.token_type_embedding.weight, theirs["glscl.token_type_embedding.weight"])
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ours = GLSCLProcessor.from_config(whole.config)
    picture, text = np.zeros((50, 40, 3), dtype=np.uint8), "An emoji 🙂 " * 20
    for name, values in processor(images=picture, text=text).items():
        assert torch.equal(values, ours(images=picture, text=text)[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("form", ["url", "path", "slash"])
def test_a_single_checkpoint_is_named_by_its_folder(
    trained: TrainedRun, tmp_path: Path, glscl: Glscl, form: str
) -> None:
    path = f"checkpoints/step-{4:08d}"
    address = {
        "url": trained.run.url_of(path),
        "path": str(trained.run.local_path(path)),
        "slash": f"{trained.run.local_path(path)}/",
    }[form]
    (tmp_path / "out").mkdir()  # an empty folder will do
    assert glscl("export", address, tmp_path / "out")[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == _weights(trained, 4).read_bytes()


def test_the_best_is_the_ledgers(trained: TrainedRun, tmp_path: Path, glscl: Glscl) -> None:
    assert (
        glscl("export", trained.run.url_of("checkpoints"), tmp_path / "out", "--best", "held-out/t2i_R10")[0]
        == 0
    )
    assert (tmp_path / "out/model.safetensors").read_bytes() == _weights(trained, 8).read_bytes()


def test_the_card_says_what_the_records_say(trained: TrainedRun, tmp_path: Path, glscl: Glscl) -> None:
    address = trained.run.url_of(f"checkpoints/step-{8:08d}")
    assert glscl("export", address, tmp_path / "out", "--license", "apache-2.0")[0] == 0
    card = _card(tmp_path / "out")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "glscl-pipeline"
    for line in (
        "# tiny, step 8",
        "pre-trained on captioned images:",  # the stage with clips has not begun
        "| `held-out` | `held-out` | caption → picture | 50.0 % | 50.0 % | 50.0 % | 4.0 % | 17 "
        "| 50.0 % | 50.0 % | 50.0 % | 250 |",
        "| `held-out` | `held-out` | picture → caption | 50.0 % | 50.0 % | 50.0 % | 4.0 % | 17 "
        "| 50.0 % | 50.0 % | 50.0 % | 500 |",
        "| `emoji` | training | image | table | 1,040 | 1,000 | decode-failed 10, too-small 30 | "
        f"`{trained.digests['emoji'][:16]}` |",
        f"| `held-out` | evaluation | image | table | 1,040 | 1,000 | decode-failed 10, too-small 30 | "
        f"`{trained.digests['held-out'][:16]}` |",
        "| `images` | 8 | `emoji` 100 % | itc 0.5, itm 1, mgsc 1, mlm 1, mltc 0.2 | 32 | 4 | 16 |",
        "- learning rate: 0.001 for the encoders, x 5 for fusion, x 5 for the heads; warm-up over 10 % of 12 steps, "
        "then linear decay",
        "- precision: fp32; DeepSpeed ZeRO stage 1 on 2 workers, 1 contrastive batches a step",
        "- seed: 7",
        "- begun with: weights drawn at random",
        "- unreadable samples: checksum-mismatch 3",
        "- checkpoint: step 8 of 12, digest `",
        "- code: not recorded",
    ):
        assert line in card
    assert "`mixed`" not in card
    assert "`clips`" not in card


def test_the_hub_reads_the_cards_results(trained: TrainedRun, tmp_path: Path, glscl: Glscl) -> None:
    assert glscl("export", trained.run.url, tmp_path / "out")[0] == 0
    card = ModelCard(_card(tmp_path / "out"))
    assert card.data.license is None
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["t2i_R10"] == 0.25
    assert results["t2i_chance_R10"] == 0.04
    assert "None is stated" in card.text


@pytest.mark.parametrize("text", ["card", "readme"])
def test_what_is_said_of_use_runs_as_it_stands(
    trained: TrainedRun, tmp_path: Path, glscl: Glscl, text: str
) -> None:
    folder = tmp_path / "demo-model"
    assert glscl("export", trained.run.url, folder)[0] == 0
    page, here = (_card(folder), folder) if text == "card" else ((ROOT / "README.md").read_text(), tmp_path)
    Image.new("RGB", (60, 50), "red").save(here / "photo.jpg")
    snippet = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AutoProcessor" in block
    )
    ran = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"tensor\(\[\[ *-?0\.\d+, +-?0\.\d+\]\]", ran.stdout)


FINE_TUNED = {
    "vqa": GLSCLForVisualQuestionAnswering,
    "nlvr2": GLSCLForNLVR2,
    "pairs": GLSCLForImageTextRetrieval,
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Steps 4 and 8, of which 8 is fine-tuned for three tasks."""
    folder = tmp_path_factory.mktemp("tuned")
    run = make_trained_run(folder)
    run.evaluated(run.checkpoint(4, folder / "scratch"), **retrieval_metrics(0.5))
    newest = run.checkpoint(8, folder / "scratch")
    run.evaluated(newest, **retrieval_metrics(0.25))
    block = run.job.model
    config = GLSCLConfig.preset(block.preset, **block.overrides)
    for task, architecture in FINE_TUNED.items():
        its = copy.deepcopy(config)
        if task == "vqa":
            its.id2label = {0: "yes", 1: "red"}
            its.label2id = {"yes": 0, "red": 1}
        model = architecture(its)
        model.resize_images(48)
        run.fine_tuned(newest, task, model, folder / "scratch")
        run.evaluated(newest, task, accuracy=0.75)
    return run


@pytest.mark.parametrize("task", FINE_TUNED)
def test_a_fine_tuned_model_opens_as_its_class_and_its_card_tells_how_it_came_about(
    tuned: TrainedRun,
    tmp_path: Path,
    glscl: Glscl,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    code, output, error = glscl("export", tuned.run.url, folder, "--task", task)
    assert code == 0, error
    assert f"fine-tuning/{task}-v1-0123abcd/" in output
    [record] = [record for _, record in kept_fine_tunings(tuned.run) if record["task"] == task]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == record["files"]["model/model.safetensors"]["sha256"]
    card = _card(folder)
    for line in (
        f"# tiny, step 8, fine-tuned for {task}",
        f"`{task}` on `held-out`:",
        f"- `model.safetensors`: sha256 `{digest}`",
        "- learning rate: 0.0002",
        "- resolution: 48",
        "| `images` | 8 | `emoji` 100 % | itc 0.5, itm 1, mgsc 1, mlm 1, mltc 0.2 | 32 | 4 | 16 |",
    ):
        assert line in card
    assert "Zero-shot retrieval" not in card  # which are the pre-trained model's

    [snippet] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for name in ("photo", "left", "right"):
        Image.new("RGB", (60, 50), "red").save(folder / f"{name}.jpg")
    monkeypatch.chdir(folder)
    exec(snippet, {})
    shown = capsys.readouterr().out.strip()
    assert shown in ("yes", "red") if task == "vqa" else shown.startswith("tensor(")


def test_a_fine_tuning_that_is_not_there_or_damaged_is_told_in_a_line(
    tuned: TrainedRun, tmp_path: Path, glscl: Glscl
) -> None:
    run, out = tuned.run.url, tmp_path / "out"
    for arguments, message in (
        ((run, out, "--task", "vqaa"), "did you mean 'vqa'?"),
        ((f"{run}/checkpoints/step-00000004", out, "--task", "vqa"), "step 4 is not fine-tuned for it; of "),
        ((run, out, "--best", "held-out/t2i_R10", "--task", "vqa"), "step 4 is not fine-tuned for it; of "),
    ):
        code, _, error = glscl("export", *arguments)
        assert (code, len(error.splitlines())) == (2, 1), (arguments, error)
        assert message in error
    [place] = [place for place, record in kept_fine_tunings(tuned.run) if record["task"] == "nlvr2"]
    whole = place.read_bytes("model/model.safetensors")
    place.write_bytes("model/model.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, error = glscl("export", run, out, "--task", "nlvr2")
    place.write_bytes("model/model.safetensors", whole)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "has sha256" in error
    assert not out.exists()


def test_what_is_not_known_is_said_to_be(tmp_path: Path, glscl: Glscl) -> None:
    run = make_trained_run(tmp_path)
    checkpoint = run.checkpoint(10, tmp_path / "scratch")
    assert glscl("export", run.run.url, tmp_path / "first")[0] == 0
    assert "This checkpoint has not been evaluated." in _card(tmp_path / "first")
    assert "model-index" not in _card(tmp_path / "first")
    run.evaluated(checkpoint, cause="disk full")
    run.evaluated(checkpoint, task="answers", accuracy=0.75)
    run.root.delete("datasets/clips-0123", recursive=True)
    record = open_run_folder(run.job, run.root, {})
    start = {"version.torch": "2.14", "mlflow.source.git.commit": "0123abc", "git.modified": "true"}
    for code in (start, start, start | {"mlflow.source.git.commit": "4567def", "git.modified": "false"}):
        record.note_code(code)
    assert glscl("export", run.run.url, tmp_path / "second")[0] == 0
    card = _card(tmp_path / "second")
    assert "The evaluation `held-out` failed." in card
    assert "| accuracy | 0.7500 |" in card
    assert "| `mixed` | 2 of 4 | `clips` 50 %, `emoji` 50 % |" in card
    assert "| `clips` | training | not recorded: the dataset is gone |" in card
    assert (
        "- code: commit `0123abc` with changes that are not committed (torch 2.14); then commit `4567def` (torch 2.14)"
        in card
    )


def test_nothing_that_is_not_for_others_gets_into_the_folder(tmp_path: Path, glscl: Glscl) -> None:
    train: dict[str, Any] = {
        "deepspeed": {"zero_optimization": {"stage": 1}, "csv_monitor": {"output_path": "/hidden-one"}}
    }
    storage = {"access_key": "hidden-two", "secret_key": "hidden-three"}
    model = {"weights": ["s3://hidden-four/ViT-B-16.pt"]}
    run = make_trained_run(tmp_path / "hidden-five", train=train, storage=storage, model=model)
    run.checkpoint(12, tmp_path / "scratch")
    handle = RunHandle("key", "0", "1", "https://me:hidden-six@mlflow.example")
    open_run_folder(run.job, run.root, {}).note_tracking(handle)
    assert glscl("export", run.run.url, tmp_path / "out")[0] == 0
    assert "begun with: `ViT-B-16.pt`" in _card(tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"hidden-" not in file.read_bytes(), file
        assert b"/data/raw" not in file.read_bytes(), file


def test_a_checkpoint_that_is_not_what_was_committed_is_refused_or_passed_over(
    tmp_path: Path, glscl: Glscl, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_trained_run(tmp_path)
    for step in (4, 8):
        run.checkpoint(step, tmp_path / "scratch")
    damaged = bytearray(_weights(run, 8).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    _weights(run, 8).write_bytes(damaged)
    code, _, error = glscl("export", run.run.url_of(f"checkpoints/step-{8:08d}"), tmp_path / "out")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "model.safetensors has sha256" in error
    assert not (tmp_path / "out").exists()
    assert glscl("export", run.run.url, tmp_path / "out")[0] == 0  # the newest whole one
    assert "step-00000008 is damaged" in caplog.text
    assert (tmp_path / "out/model.safetensors").read_bytes() == _weights(run, 4).read_bytes()
    _weights(run, 4).unlink()
    code, _, error = glscl("export", run.run.url, tmp_path / "again")
    assert code == 2
    assert "step-00000004 is damaged" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch", "storage"]


def test_mistakes_end_with_one_clear_line(trained: TrainedRun, tmp_path: Path, glscl: Glscl) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    run, step, out = trained.run.url, trained.run.url_of("checkpoints/step-00000004"), tmp_path / "out"
    for arguments, message in (
        ((run, tmp_path / "full"), "full is not empty: give a new name"),
        ((run, tmp_path / "file"), "file is no folder"),
        ((run, tmp_path / "file/out"), "cannot be written"),
        ((tmp_path / "nowhere", out), "nowhere does not exist"),
        ((trained.root.url, out), "is no run: it has no run.json"),
        ((trained.run.url_of("checkpoints/step-00000005"), out), "those of steps 4, 8, 12"),
        ((step, out, "--best", "held-out/t2i_R10"), "is a single one"),
        ((run, out, "--best", "held-out/t2i_R11"), "did you mean 'held-out/t2i_R1"),
        (("ftp://host/run", out), "cannot open ftp://"),
    ):
        code, _, error = glscl("export", *arguments)
        assert (code, len(error.splitlines())) == (2, 1), (arguments, error)
        assert message in error
    assert (tmp_path / "full/mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_run_without_evaluations_or_checkpoints_says_so(tmp_path: Path, glscl: Glscl) -> None:
    run = make_trained_run(tmp_path)
    assert "holds no checkpoint yet" in glscl("export", run.run.url, tmp_path / "out")[2]
    run.checkpoint(4, tmp_path / "scratch")
    error = glscl("export", run.run.url, tmp_path / "out", "--best", "held-out/t2i_R10")[2]
    assert "no checkpoint" in error
    assert "is evaluated yet" in error


def test_a_better_checkpoint_that_is_deleted_is_mentioned(
    tmp_path: Path, glscl: Glscl, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_trained_run(tmp_path)
    for step, recall in ((4, 0.5), (8, 0.25)):
        run.evaluated(run.checkpoint(step, tmp_path / "scratch"), **retrieval_metrics(recall))
    run.run.delete("checkpoints/step-00000004", recursive=True)
    assert glscl("export", run.run.url, tmp_path / "out", "--best", "held-out/t2i_R10")[0] == 0
    assert "# tiny, step 8" in _card(tmp_path / "out")
    assert "step 4 was better" in caplog.text


@pytest.mark.server
def test_a_run_in_s3_is_exported_with_the_usual_variables(
    trained: TrainedRun, tmp_path: Path, glscl: Glscl, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = s3_server.fresh("storage")
    bucket = open_storage(url)
    for file in trained.root.list():
        bucket.write_bytes(file.path, trained.root.read_bytes(file.path))
    assert glscl("export", f"{url}/runs/tiny", tmp_path / "out", "--best", "held-out/t2i_R10")[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == _weights(trained, 8).read_bytes()
    assert "| 1,040 | 1,000 |" in _card(tmp_path / "out")
