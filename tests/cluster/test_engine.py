"""DeepSpeed in a process of its own, without Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = """
import sys
import torch
from cluster.engine import prepare_deepspeed
prepare_deepspeed(torch.device("cpu"))
prepare_deepspeed(torch.device("cpu"))
import deepspeed
module = torch.nn.Linear(2, 1)
engine, *_ = deepspeed.initialize(
    model=module,
    optimizer=torch.optim.AdamW(module.parameters(), lr=0.1),
    config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
)
before = module.weight.detach().clone()
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
print("MOVED", not torch.equal(before, module.weight))
print("COMPILER", "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.slow
def test_a_single_process_without_a_compiler_trains() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"CC": "/nonexistent", "CXX": "/nonexistent"}  # any attempt to compile fails
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "MOVED True" in done.stdout, done.stdout + done.stderr
    assert "COMPILER False" in done.stdout, "each start of a worker readies a compiler that nothing uses"
