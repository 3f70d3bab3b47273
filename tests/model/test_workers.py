"""Losses and averaged gradients do not depend on the number of workers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model import OBJECTIVES, GLSCLForPreTraining, backward_in_parts
from model.gather import gather_with_gradient
from tests.fixtures.groups import run_processes
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
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    """Samples of a batch with their texts trimmed to the longest of them."""
    part = batch.part(start, stop)
    longest = int(part.attention_mask.sum(1).max())
    part.input_ids, part.attention_mask = part.input_ids[:, :longest], part.attention_mask[:, :longest]
    part.masks = part.masks.trimmed(longest)
    return part


def _run(
    case: str, dtype: torch.dtype, rank: int, workers: int, *, parts: int = 1, **options: Any
) -> dict[str, Any]:
    """This worker's part of a case: values and gradients, the latter divided by the number of workers."""
    config = small_config(mltc_on_video=True, **options)
    model = small_model(config, dtype)
    batch: Batch = small_batch(config, group_size=_GROUP, **_CASES[case])
    size = len(batch.valid) // workers
    if parts == 1:
        mine = _cut(batch, rank * size, (rank + 1) * size)
        output = model(**mine.inputs(), objectives=_WEIGHTS, group_size=_GROUP)
        output.loss.backward()
    else:
        step = size // parts
        starts = range(rank * size, (rank + 1) * size, step)
        output = backward_in_parts(
            model,
            lambda loss: loss.backward(),
            [_cut(batch, start, start + step).inputs() for start in starts],
            config=config,
            objectives=_WEIGHTS,
            group_size=_GROUP,
            reseed=lambda number: None,
        )
    return {
        "loss": output.loss.detach(),
        "losses": output.losses,
        "metrics": output.metrics,
        "gradients": _gradients(model, workers),
    }


def _gradients(model: GLSCLForPreTraining, workers: int) -> dict[str, torch.Tensor]:
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad) / workers
        for name, p in model.named_parameters()
    }


def _worker(rank: int, workers: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    runs: dict[str, dict[str, Any]] = {}
    for case in _CASES:
        runs[f"{case}/float64"] = {"case": case, "dtype": torch.float64}
        runs[f"{case}/float32"] = {"case": case, "dtype": torch.float32}
        runs[f"{case}/hard"] = {"case": case, "dtype": torch.float64, "hard_negatives": True}
        if workers == 2:
            runs[f"{case}/parts"] = {"case": case, "dtype": torch.float64, "parts": 2}
    runs["images/reference"] = {"case": "images", "dtype": torch.float64, "reference_gather": True}
    results = {}
    for name, options in runs.items():
        result = _run(**options, rank=rank, workers=workers)
        for gradient in result["gradients"].values():
            dist.all_reduce(gradient)
        dist.all_reduce(result["loss"])
        result["loss"] /= workers
        results[name] = result
    local = torch.arange(2.0, dtype=torch.float64).requires_grad_()
    weight = torch.arange(2.0 * workers, dtype=torch.float64) + 100 * rank
    (gather_with_gradient(local, reference=True) * weight).sum().backward()
    results["reference gather"] = {"got": local.grad, "want": weight[2 * rank : 2 * rank + 2]}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several workers found."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    run_processes(_worker, request.param, port, str(folder), count=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("kind", ["float64", "float32", "hard", "parts"])
def test_workers_give_the_losses_and_gradients_of_one_with_the_whole_batch(
    results: list[dict[str, Any]], case: str, kind: str
) -> None:
    if kind == "parts" and len(results) > 2:
        pytest.skip("a part of each of four workers would be no whole group")
    dtype = torch.float32 if kind == "float32" else torch.float64
    want = _run(case, dtype, 0, 1, hard_negatives=kind == "hard")
    assert set(want["losses"]) == set(OBJECTIVES)
    largest = max(float(gradient.abs().max()) for gradient in want["gradients"].values())
    assert case == "nothing_valid" or largest > 1e-3
    for result in results:
        got = result[f"{case}/{kind}"]
        near = {"rtol": _TOLERANCE[dtype], "check_dtype": False}
        torch.testing.assert_close(got["loss"], want["loss"], atol=1e-12, **near)
        for values in ("losses", "metrics"):
            assert set(got[values]) == set(want[values])
            for name, value in want[values].items():
                torch.testing.assert_close(got[values][name], value, atol=1e-12, **near)
        assert set(got["gradients"]) == set(want["gradients"])
        for name, value in want["gradients"].items():
            # Sums that cancel (key biases) keep the rounding of their parts: relative to the largest gradient.
            torch.testing.assert_close(
                got["gradients"][name],
                value,
                atol=_TOLERANCE[dtype] * largest,
                msg=lambda text, at=(case, kind, name): f"{at}: {text}",
                **near,
            )
    if case == "nothing_valid":
        assert float(want["loss"]) == 0


def test_the_reference_gather_passes_back_the_own_loss_only(results: list[dict[str, Any]]) -> None:
    for result in results:
        torch.testing.assert_close(result["reference gather"]["got"], result["reference gather"]["want"])
        exact, reference = result["images/float64"], result["images/reference"]
        for name in ("itc", "itm", "mlm", "mgsc"):
            torch.testing.assert_close(reference["losses"][name], exact["losses"][name])
        for name in ("text_projection.out.weight", "vision_projection.out.weight"):
            relative = reference["gradients"][name] - exact["gradients"][name]
            assert relative.norm() > 1e-3 * exact["gradients"][name].norm()


def test_the_reference_gather_is_the_exact_one_for_a_single_worker() -> None:
    config = small_config()
    batch = small_batch(config, 4)
    exact, reference = (small_model(small_config(reference_gather=flag)) for flag in (False, True))
    for model in (exact, reference):
        model(**batch.inputs(), objectives=_WEIGHTS, group_size=4).loss.backward()
    for (name, want), got in zip(exact.named_parameters(), reference.parameters(), strict=True):
        assert want.grad is None or torch.equal(got.grad, want.grad), name
