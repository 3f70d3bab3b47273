"""Every ZeRO stage at every number of workers trains the same, and DeepSpeed's options do what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model import import_weights
from pipeline.config import ModelBlock
from pipeline.training.config import TrainBlock
from pipeline.training.engine import build_model, model_config
from tests.fixtures.groups import run_processes
from tests.model.importers.sources import noise, openai_clip
from tests.pipeline import zero_run

pytestmark = pytest.mark.slow

#: fp32 sums in another order, carried on by AdamW. Measured: at most 5e-7 over six steps.
TOLERANCE = {"rel": 1e-5, "abs": 1e-7}
BLOCK = ModelBlock.model_validate(zero_run.MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("zero")
    state = noise(openai_clip(model_config(BLOCK), blocks=2, grid=4), torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / "clip.safetensors")
    run_processes(zero_run.work, str(place), str(place / "clip.safetensors"), count=max(zero_run.WORKERS))
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each worker found, by number of workers."""
    return {
        workers: [torch.load(folder / f"{rank}-{workers}.pt", weights_only=True) for rank in range(workers)]
        for workers in zero_run.WORKERS
    }


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model as one worker makes it that does not partition."""
    train = TrainBlock(stages=[{"name": "s", "steps": 1, "mixture": {"x": 1}}])  # type: ignore[list-item]
    return build_model(BLOCK, train, zero_run.SEED)


def assert_same_curve(got: list[dict[str, float]], want: list[dict[str, float]], way: str) -> None:
    assert len(got) == len(want) == 4, way
    for step, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.keys() == other.keys(), way
        for name, value in one.items():
            if name == "norm" and value != value:
                assert way.startswith("ZeRO-0")  # which does not say
            else:
                assert value == pytest.approx(other[name], **TOLERANCE), f"{way}, step {step}, {name}"


def test_loss_curves_of_all_stages_agree_at_1_2_and_4_workers(found: dict[int, list[dict[str, Any]]]) -> None:
    want = found[1][0]["ZeRO-1"]["curve"]
    assert all(step["norm"] > 0.5 for step in want)  # clipping acts
    assert set(want[0]) == {"itc", "itm", "mlm", "mgsc", "mltc", "norm"}
    assert set(want[3]) == {"itc", "itm", "mlm", "norm"}
    for workers, ranks in found.items():
        for rank in ranks:
            for stage in range(4):
                way = f"ZeRO-{stage}, {workers} workers"
                assert_same_curve(rank[f"ZeRO-{stage}"]["curve"], want, way)
                # One update a step: the engine counted anew where the stages' accumulation differs.
                assert rank[f"ZeRO-{stage}"]["steps"] == 4, way


@pytest.mark.parametrize("way", zero_run.OPTIONS)
def test_options_change_the_cost_and_not_the_curve(found: dict[int, list[dict[str, Any]]], way: str) -> None:
    for rank in found[2]:
        assert_same_curve(rank[way]["curve"], found[1][0]["ZeRO-1"]["curve"], way)


def test_options_reach_the_engine(found: dict[int, list[dict[str, Any]]], folder: Path) -> None:
    ways = {way: found[2][0][way]["effective"] for way in ("ZeRO-2", *zero_run.OPTIONS)}
    names = ("overlap", "bucket", "contiguous", "communication", "breakdown")
    assert [ways["overlap"][name] for name in names] == [True, 500, False, "torch.float32", True]
    assert ways["ZeRO-2"]["bucket"] == 500_000_000
    assert [ways["ZeRO-2"][name] for name in ("overlap", "contiguous", "breakdown")] == [False, True, False]
    assert [way for way, effective in ways.items() if effective["offloads"]] == [
        *("optimizer on CPU", "all on CPU")
    ]
    assert "Flops Profiler" in (folder / "flops.txt").read_text()


def test_a_partitioned_model_begins_with_the_weights_of_a_whole_one_bit_for_bit(
    found: dict[int, list[dict[str, Any]]], plain: Any
) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for workers, ranks in found.items():
            for rank in ranks:
                start = rank[f"start {precision}"]
                assert start["empty"]  # no worker holds a parameter whole
                for name, parameter in plain.named_parameters():
                    got = start["parameters"][name]
                    assert got.dtype == dtype
                    assert torch.equal(got, parameter.to(dtype)), (precision, workers, name)


def test_an_import_into_a_partitioned_model_is_that_into_a_whole_one(
    found: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    train = TrainBlock(stages=[{"name": "s", "steps": 1, "mixture": {"x": 1}}])  # type: ignore[list-item]
    model = build_model(BLOCK, train, zero_run.SEED)
    report = import_weights(model, folder / "clip.safetensors")
    assert report.loaded
    for ranks in found.values():
        for rank in ranks:
            for name, parameter in model.named_parameters():
                assert torch.equal(rank["start fp32"]["imported"][name], parameter), name
            assert rank["start fp32"]["missing"].startswith("model.weights: there is no ")  # on every worker


def test_a_worker_holds_its_share_alone_also_while_the_model_is_made(
    found: dict[int, list[dict[str, Any]]], plain: Any
) -> None:
    sizes = [parameter.numel() * 4 for parameter in plain.parameters()]
    modules = [
        sum(parameter.numel() * 4 for parameter in module.parameters(recurse=False))
        for module in plain.modules()
    ]
    for workers, ranks in found.items():
        padding = 4 * workers * len(sizes)
        for rank in ranks:
            start = rank["start fp32"]
            assert sum(sizes) / workers <= start["held"] <= sum(sizes) / workers + padding
            # Its share, and what draws a module's values: a few copies of the largest.
            assert start["largest"] <= start["held"] + 6 * max(modules) + padding
