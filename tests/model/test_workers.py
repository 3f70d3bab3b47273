"""Losses and averaged gradients do not depend on the number of workers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import OBJECTIVES
from tests.model.small import Batch, small_batch, small_config, small_model

_WEIGHTS = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}
_GROUP = 2
_CASES: dict[str, dict[str, Any]] = {
    "images": {"samples": 8},
    "images_with_invalid_samples": {"samples": 8, "invalid": (1, 6)},
    "one_worker_without_a_valid_sample": {"samples": 8, "invalid": (4, 5, 6, 7)},
    "nothing_valid": {"samples": 8, "invalid": tuple(range(8))},
    "videos": {"samples": 8, "frames": 2, "invalid": (3,)},
}


def _run(case: str, rank: int, workers: int) -> dict[str, Any]:
    """This worker's part of a case: values and gradients, the latter divided by the number of workers."""
    config = small_config(mltc_on_video=True)
    model = small_model(config)
    batch: Batch = small_batch(config, group_size=_GROUP, **_CASES[case])
    size = len(batch.valid) // workers
    part = batch.part(rank * size, (rank + 1) * size)
    longest = int(part.attention_mask.sum(1).max())
    part.input_ids, part.attention_mask = part.input_ids[:, :longest], part.attention_mask[:, :longest]
    text = ("mlm_input_ids", "mlm_labels", "completion_input_ids", "completion_positions")
    trimmed = {name: getattr(part.masks, name)[:, :longest] for name in text}
    part.masks = type(part.masks)(**{**part.masks.__dict__, **trimmed})
    output = model(**part.inputs(), objectives=_WEIGHTS, group_size=_GROUP)
    output.loss.backward()
    gradients = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad) / workers
        for name, p in model.named_parameters()
    }
    return {
        "loss": output.loss.detach(),
        "losses": output.losses,
        "metrics": output.metrics,
        "gradients": gradients,
    }


def _worker(rank: int, workers: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    results = {}
    for case in _CASES:
        result = _run(case, rank, workers)
        for gradient in result["gradients"].values():
            dist.all_reduce(gradient)
        dist.all_reduce(result["loss"])
        result["loss"] /= workers
        results[case] = result
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_give_the_losses_and_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    expected = {case: _run(case, 0, 1) for case in _CASES}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_worker, args=(2, port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for case, want in expected.items():
            got = results[case]
            torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-10, atol=1e-12)
            for kind in ("losses", "metrics", "gradients"):
                assert set(got[kind]) == set(want[kind])
                for name, value in want[kind].items():
                    torch.testing.assert_close(
                        got[kind][name],
                        value,
                        rtol=1e-9,
                        atol=1e-10,
                        msg=lambda text, at=(case, kind, name): f"{at}: {text}",
                    )
    assert set(expected["images"]["losses"]) == set(OBJECTIVES)
    assert float(expected["nothing_valid"]["loss"]) == 0
