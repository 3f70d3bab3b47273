"""Options that make a step quicker or smaller change its losses and gradient within their precision only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# A process for each option: DeepSpeed keeps autocast, once on, in a global.
STEP = """
import json, sys, torch
from cluster.workers import WorkerContext
from pipeline.config import ModelBlock
from pipeline.training.config import TrainBlock
from pipeline.training.engine import build_engine, build_model, gradient_norm, model_config, optimizer_step
from tests.fixtures.jobs import MODEL
from tests.model.small import small_batch

torch.set_num_threads(1)
options = json.loads(sys.argv[1])
train = TrainBlock(
    global_batch=8, lanes=4, clipping=1e9, stages=[{"name": "s", "steps": 1, "mixture": {"x": 1}}], **options
)
block = ModelBlock.model_validate(MODEL)
context = WorkerContext(0, 1, 0, 1, 0, torch.device("cpu"))
engine, _ = build_engine(build_model(block, train, seed=1), train, context)
batch = small_batch(model_config(block), 8, group_size=2)
weights = {str(name): weight for name, weight in train.stages[0].objectives.items()}
output = engine(**batch.inputs(), objectives=weights, group_size=2)
engine.backward(output.loss)
optimizer_step(engine, train)
dtype = str(next(engine.module.parameters()).dtype)
found = {name: float(value) for name, value in output.losses.items()}
print("FOUND", json.dumps({"dtype": dtype, "norm": gradient_norm(engine), **found}))
"""


def _step(**options: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps(options)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, done.stdout + done.stderr
    return dict(json.loads(line.removeprefix("FOUND ")))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return _step()


def _assert_equal(got: dict[str, Any], want: dict[str, Any], relative: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name != "dtype":
            assert got[name] == pytest.approx(value, rel=relative), name


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_bf16_gives_the_losses_of_fp32_within_its_eight_bits(plain: dict[str, Any], precision: str) -> None:
    found = _step(precision=precision)
    assert found["dtype"] == ("torch.bfloat16" if precision == "bf16" else "torch.float32")
    _assert_equal(found, plain, 0.03)
    assert found != plain


def test_activation_checkpointing_gives_the_same_losses_and_gradient(plain: dict[str, Any]) -> None:
    _assert_equal(_step(activation_checkpointing=True), plain, 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_blocks_give_the_same_losses_and_gradient(plain: dict[str, Any]) -> None:
    _assert_equal(_step(compile=True), plain, 1e-4)
