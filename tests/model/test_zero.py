"""Training under DeepSpeed ZeRO equals plain training, also when a step leaves parameters out."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from model import GLSCLForPreTraining
from tests.model.small import small_batch, small_config, small_model

_ALL = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}
# Heads, fusion layers, temporal embedding and mask token come and go from step to step.
_STEPS: list[tuple[dict[str, float], int]] = [
    ({"itc": 1.0}, 1),
    (_ALL, 1),
    (_ALL, 2),
    ({"mlm": 1.0}, 1),
    ({"mgsc": 1.0, "mltc": 0.2}, 2),
    ({"itc": 1.0, "itm": 1.0}, 1),
    (_ALL, 1),
]
_GROUP = 2


def _optimizer(model: GLSCLForPreTraining) -> torch.optim.Optimizer:
    # Not Adam: it would blow the rounding noise of vanishing gradients (key biases) up to whole steps.
    return torch.optim.SGD(model.parameter_groups(1e-4, 0.01), momentum=0.9)


def _plain() -> list[dict[str, float]]:
    config = small_config()
    model = small_model(config, torch.float32)
    optimizer = _optimizer(model)
    reported = []
    for number, (objectives, frames) in enumerate(_STEPS):
        batch = small_batch(config, 8, frames, invalid=(1, 6), group_size=_GROUP, seed=number)
        output = model(**batch.inputs(), objectives=objectives, group_size=_GROUP)
        output.loss.backward()
        for parameter in model.parameters():  # as ZeRO does: no gradient counts as zero
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        model.zero_grad()
        reported.append({name: float(value) for name, value in output.losses.items()})
    return reported


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    reported = {}
    for stage in (1, 2, 3):
        config = small_config()
        model = small_model(config, torch.float32)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(model),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # the default is 1.0
            },
        )
        reported[stage] = []
        for number, (objectives, frames) in enumerate(_STEPS):
            batch = small_batch(config, 8, frames, invalid=(1, 6), group_size=_GROUP, seed=number)
            batch = batch.part(4 * rank, 4 * rank + 4)
            output = engine(**batch.inputs(), objectives=objectives, group_size=_GROUP)
            engine.backward(output.loss)
            engine.step()
            if stage == 3:
                # ZeRO-3 never clears the gradient of a parameter that the next step leaves out.
                engine.optimizer.grad_partitions_flat_buffer.zero_()
            reported[stage].append({name: float(value) for name, value in output.losses.items()})
    (Path(folder) / f"{rank}.json").write_text(json.dumps(reported))


@pytest.mark.slow
def test_two_zero_workers_train_as_one_plain_worker_when_parameters_come_and_go(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)
    expected = _plain()
    for rank in range(2):
        reported = json.loads((tmp_path / f"{rank}.json").read_text())
        for stage in ("1", "2", "3"):
            for number, (want, got) in enumerate(zip(expected, reported[stage], strict=True)):
                assert got == pytest.approx(want, rel=1e-4, abs=1e-5), f"ZeRO-{stage}, step {number}"
