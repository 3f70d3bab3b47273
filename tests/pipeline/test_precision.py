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

# All in one process, most of whose time is its start; autocast last: DeepSpeed keeps it, once on, in a global.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    **({"compile": {"compile": True}} if shutil.which("g++") else {}),
    "bf16": {"precision": "bf16"},
    "bf16-autocast": {"precision": "bf16-autocast"},
}

STEPS = """
import json, sys, torch
from cluster.workers import WorkerContext
from pipeline.config import ModelBlock
from pipeline.training.config import TrainBlock
from pipeline.training.engine import build_engine, build_model, gradient_norm, model_config, optimizer_step
from tests.fixtures.jobs import MODEL
from tests.model.small import small_batch

torch.set_num_threads(1)
block = ModelBlock.model_validate(MODEL)
context = WorkerContext(0, 1, 0, 1, 0, torch.device("cpu"))
for name, options in json.loads(sys.argv[1]).items():
    train = TrainBlock(
        global_batch=8, lanes=4, clipping=1e9, stages=[{"name": "s", "steps": 1, "mixture": {"x": 1}}], **options
    )
    engine, _ = build_engine(build_model(block, train, seed=1), train, context)
    batch = small_batch(model_config(block), 8, group_size=2)
    weights = {str(key): weight for key, weight in train.stages[0].objectives.items()}
    output = engine(**batch.inputs(), objectives=weights, group_size=2)
    engine.backward(output.loss)
    optimizer_step(engine, train)
    dtype = str(next(engine.module.parameters()).dtype)
    found = {key: float(value) for key, value in output.losses.items()}
    print("FOUND", json.dumps([name, {"dtype": dtype, "norm": gradient_norm(engine), **found}]))
"""


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """What one step of each option found."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(OPTIONS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(OPTIONS), done.stdout + done.stderr
    return dict(json.loads(line) for line in lines)


def _assert_equal(got: dict[str, Any], want: dict[str, Any], relative: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name != "dtype":
            assert got[name] == pytest.approx(value, rel=relative), name


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_bf16_gives_the_losses_of_fp32_within_its_eight_bits(
    steps: dict[str, dict[str, Any]], precision: str
) -> None:
    found = steps[precision]
    assert found["dtype"] == ("torch.bfloat16" if precision == "bf16" else "torch.float32")
    _assert_equal(found, steps["plain"], 0.03)
    assert found != steps["plain"]


def test_activation_checkpointing_gives_the_same_losses_and_gradient(
    steps: dict[str, dict[str, Any]],
) -> None:
    _assert_equal(steps["activation checkpointing"], steps["plain"], 1e-5)


@pytest.mark.skipif("compile" not in OPTIONS, reason="torch.compile needs a compiler")
def test_compiled_blocks_give_the_same_losses_and_gradient(steps: dict[str, dict[str, Any]]) -> None:
    _assert_equal(steps["compile"], steps["plain"], 1e-4)
