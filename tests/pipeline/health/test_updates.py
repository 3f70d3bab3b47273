"""A step that is not made leaves no trace, under any ZeRO stage and at any number of workers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.workers import WorkerContext
from pipeline.training.config import Course
from pipeline.training.engine import build_engine, optimizer_step
from pipeline.training.health.updates import drop_update, make_update, settle_loss_scale
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


def _scaling(course: Course, context: WorkerContext) -> list[bool]:
    """What is to be true of fp16's loss scale, which falls from four times its minimum with each overflow."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # slowly, on any CPU
    engine, _ = build_engine(small_model(), course, context)  # type: ignore[arg-type]
    settle_loss_scale(engine)
    optimizer = engine.optimizer
    least = optimizer.loss_scaler.min_scale
    optimizer.loss_scale = 4 * least
    before = weights_of(engine)
    _backwards(engine, course, context, 2, math.nan)
    drop_update(engine, course)
    truths = [optimizer.loss_scale == 4 * least]
    scales = []
    for _ in range(8):
        scales.append(optimizer.loss_scale)
        _backwards(engine, course, context, 2, math.nan)
        truths.append(make_update(engine, course) == ("scaled-down" if scales[-1] > least else "non-finite"))
    truths += [scales[0] == 4 * least, scales[-1] == least, _same(before, weights_of(engine))]
    _backwards(engine, course, context, 1, 1.0)
    truths += [make_update(engine, course) == "made", not _same(before, weights_of(engine))]
    return truths


#: Global batches in one go, the ones that are made and those that are not in between.
_ALL = [(1, ""), (2, "nan, dropped"), (3, ""), (2, "dropped"), (4, ""), (6, "nan"), (5, ""), (7, "")]


def _worker(context: WorkerContext, folder: str) -> None:
    found = {}
    for zero, offload, precision in _WAYS:
        course = _course(context.world_size, zero, offload, precision)
        plain = _train(course, context, [(number, fate) for number, fate in _ALL if not fate])
        weights = _train(course, context, _ALL)
        made = [number for number, (_, fate) in enumerate(_ALL) if not fate]
        wanted = [plain[sum(one <= number for one in made) - 1] for number in range(len(_ALL))]
        found[f"ZeRO {zero}, {offload}, {precision}"] = [
            *(_same(*pair) for pair in zip(weights, wanted, strict=True)),
            *(not _same(*pair) for pair in itertools.pairwise(plain)),
        ]
    for zero in (1, 2, 3):
        found[f"ZeRO {zero}, fp16"] = _scaling(
            small_course(context.world_size, zero=zero, precision="fp16"), context
        )
    (Path(folder) / f"{context.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_that_is_not_made_leaves_weights_and_later_steps_as_if_its_batch_had_not_been(
    workers: int, tmp_path: Path
) -> None:
    run_group(_worker, workers, str(tmp_path))
    for rank in range(workers):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == len(_WAYS) + 3
        assert {way: steps for way, steps in found.items() if not all(steps)} == {}
