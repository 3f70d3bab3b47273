"""Training under DeepSpeed ZeRO equals plain training, also when a step leaves parameters out."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GLSCLForPreTraining, backward_in_parts
from tests.fixtures.groups import run_processes
from tests.model.small import small_batch, small_config, small_model

_ALL = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}
# Heads, fusion layers, temporal embedding and mask token come and go from step to step.
_STEPS: list[tuple[dict[str, float], int]] = [
    (_ALL, 1),
    ({"itc": 1.0}, 1),
    (_ALL, 2),
    ({"mlm": 1.0}, 1),
    ({"mgsc": 1.0, "mltc": 0.2}, 2),
    ({"itc": 1.0, "itm": 1.0}, 1),
    (_ALL, 1),
]
_SAMPLES, _GROUP = 8, 2


def _optimizer(model: GLSCLForPreTraining) -> torch.optim.Optimizer:
    # Not Adam: it would blow the rounding noise of vanishing gradients (key biases) up to whole steps.
    return torch.optim.SGD(model.parameter_groups(1e-4, 0.01), momentum=0.9)


def _batch(number: int, frames: int) -> Any:
    return small_batch(small_config(), _SAMPLES, frames, invalid=(1, 6), group_size=_GROUP, seed=number)


def _plain() -> dict[str, Any]:
    model = small_model(small_config(), torch.float32)
    optimizer = _optimizer(model)
    losses, gradients = [], {}
    for number, (objectives, frames) in enumerate(_STEPS):
        output = model(**_batch(number, frames).inputs(), objectives=objectives, group_size=_GROUP)
        output.loss.backward()
        for parameter in model.parameters():  # as ZeRO does: no gradient counts as zero
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if number == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.zero_grad()
        losses.append({name: float(value) for name, value in output.losses.items()})
    return {"losses": losses, "gradients": gradients}


def _worker(rank: int, workers: int, port: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    ways = [
        (stage, parts) for stage in (1, 2, 3) for parts in (1, 2) if _SAMPLES // workers // parts >= _GROUP
    ]
    found = {f"ZeRO-{stage} in {parts} parts": _train(rank, workers, stage, parts) for stage, parts in ways}
    torch.save(found, Path(folder) / f"{rank}.pt")


def _train(rank: int, workers: int, stage: int, parts: int) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    size = _SAMPLES // workers
    model = small_model(small_config(), torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model),
        config={
            "train_micro_batch_size_per_gpu": size // parts,
            "gradient_accumulation_steps": parts,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default is 1.0
        },
    )
    losses: list[dict[str, float]] = []
    gradients: dict[str, torch.Tensor] = {}

    def backward(loss: torch.Tensor) -> None:
        engine.backward(loss * parts)  # DeepSpeed averages over the parts
        if not losses and engine.is_gradient_accumulation_boundary():
            for name, parameter in model.named_parameters():
                gradient = safe_get_full_grad(parameter)  # collective
                gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        engine.step()

    for number, (objectives, frames) in enumerate(_STEPS):
        batch = _batch(number, frames).part(size * rank, size * (rank + 1))
        if parts == 1:
            output = engine(**batch.inputs(), objectives=objectives, group_size=_GROUP)
            backward(output.loss)
        else:
            step = size // parts
            output = backward_in_parts(
                engine,
                backward,
                [batch.part(start, start + step).inputs() for start in range(0, size, step)],
                config=model.config,
                objectives=objectives,
                group_size=_GROUP,
                reseed=lambda number: None,
            )
        if stage == 3:
            # ZeRO-3 never clears the gradient of a parameter that the next step leaves out.
            engine.optimizer.grad_partitions_flat_buffer.zero_()
        losses.append({name: float(value) for name, value in output.losses.items()})
    return {"losses": losses, "gradients": gradients}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_zero_workers_train_as_one_plain_worker_when_parameters_come_and_go(
    workers: int, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    run_processes(_worker, workers, port, str(tmp_path), count=workers)
    expected = _plain()
    largest = max(float(gradient.abs().max()) for gradient in expected["gradients"].values())
    for rank in range(workers):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(found) == (6 if workers == 2 else 3)
        for way, got in found.items():
            for number, (want, losses) in enumerate(zip(expected["losses"], got["losses"], strict=True)):
                assert losses == pytest.approx(want, rel=1e-4, abs=1e-5), f"{way}, step {number}"
            assert got["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                error = float((got["gradients"][name] - gradient).abs().max())
                assert error < 1e-5 * largest, f"{way}, {name}"
