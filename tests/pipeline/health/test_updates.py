"""A step that is not made leaves no trace, under any ZeRO stage and at any number of workers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.workers import WorkerContext
from pipeline.training.config import Course
from pipeline.training.engine import build_engine, optimizer_step
from pipeline.training.health.updates import drop_update, make_update
from tests.pipeline.health.small import WIDTH, run_group, small_course, small_model, weights_of

#: (ZeRO stage, offloaded, precision)
_WAYS = [
    *[(stage, False, "fp32") for stage in range(4)],
    *[(stage, True, "fp32") for stage in (2, 3)],
    *[(stage, False, "bf16") for stage in (1, 2, 3)],
]


def _course(workers: int, zero: int, offload: bool, precision: str) -> Course:
    block = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    return small_course(workers, zero=zero, zero_block=block, precision=precision)


def _backwards(engine: Any, course: Course, context: WorkerContext, number: int, factor: float) -> None:
    """The parts of global batch ``number`` up to the last one's update; the odd ones leave the second head out."""
    for part in range(2):
        generator = torch.Generator().manual_seed(10 * number + part)
        inputs = torch.rand(4, WIDTH, generator=generator).chunk(context.world_size)[context.rank]
        losses = engine(inputs.to(next(engine.module.parameters()).dtype), second=number % 2 == 0)
        engine.backward(sum(losses.values()) * (factor if part == 0 and context.rank == 0 else 1.0))
        if part == 0:
            optimizer_step(engine, course)


def _train(course: Course, context: WorkerContext, batches: list[tuple[int, str]]) -> list[Any]:
    """Weights after each global batch: (number, what happens to it)."""
    engine, _ = build_engine(small_model(), course, context)  # type: ignore[arg-type]
    weights = []
    for number, fate in batches:
        _backwards(engine, course, context, number, math.nan if "nan" in fate else 1.0)
        if "dropped" in fate:
            drop_update(engine, course)
        else:
            assert make_update(engine, course) == ("non-finite" if fate == "nan" else "made"), fate
        weights.append(weights_of(engine))
    engine.destroy()
    return weights


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def _worker(context: WorkerContext, folder: str) -> None:
    found = {}
    for zero, offload, precision in _WAYS:
        course = _course(context.world_size, zero, offload, precision)
        plain = _train(course, context, [(1, ""), (3, ""), (4, "")])
        for fate in ("nan, dropped", "dropped", "nan"):
            weights = _train(course, context, [(1, ""), (2, fate), (3, ""), (4, "")])
            wanted = [plain[0], plain[0], plain[1], plain[2]]
            found[f"ZeRO {zero}, {offload}, {precision}, {fate}"] = [
                _same(*pair) for pair in zip(weights, wanted, strict=True)
            ]
        found[f"ZeRO {zero}, {offload}, {precision}, moves"] = [not _same(plain[0], plain[1])]
    (Path(folder) / f"{context.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_that_is_not_made_leaves_weights_and_later_steps_as_if_its_batch_had_not_been(
    workers: int, tmp_path: Path
) -> None:
    run_group(_worker, workers, str(tmp_path))
    for rank in range(workers):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 4 * len(_WAYS)
        assert {way: steps for way, steps in found.items() if not all(steps)} == {}
