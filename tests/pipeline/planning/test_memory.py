"""The arithmetic of a worker's memory, and what is suggested where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import JobConfig, parse_job
from pipeline.planning.advice import Planner, changed
from pipeline.planning.memory import Layout, estimate
from pipeline.planning.simulation import SimulatedStep
from tests.fixtures.jobs import tiny_job

#: 600 and 200 bytes of activations while the gradients of 100 parameters come.
STEP = SimulatedStep([(100, 0), (600, 0), (200, 400)])
GIB = 2**30


def _layout(stage: int, workers: int = 2, **more: Any) -> Layout:
    return Layout(groups=(60, 40), stage=stage, workers=workers, **{"width": 4, "bucket": 50, **more})


def test_weights_and_optimizer_are_spread_by_stage() -> None:
    found = {stage: estimate(_layout(stage), STEP, "cpu").worker for stage in range(4)}
    assert {stage: parts["weights"] for stage, parts in found.items()} == {0: 400, 1: 400, 2: 400, 3: 200}
    # Two moments; and from stage 1 on the fp32 copy of the shard, which stage 3 needs of other weights alone.
    assert {stage: parts["optimizer"] for stage, parts in found.items()} == {0: 800, 1: 600, 2: 600, 3: 400}
    half = estimate(_layout(3, width=2), STEP, "cpu").worker
    assert (half["weights"], half["optimizer"]) == (100, 600)


def test_the_fullest_moment_of_the_backward_counts() -> None:
    alone = estimate(_layout(0, workers=1), STEP, "cpu")
    assert alone.moment == "backward"
    assert (alone.worker["activations"], alone.worker["gradients"]) == (600, 0)
    late = estimate(_layout(0, workers=1), SimulatedStep([(600, 0), (500, 400)]), "cpu")
    assert (late.worker["activations"], late.worker["gradients"]) == (500, 400)
    added = estimate(_layout(0, workers=1), STEP, "cpu", accumulates=True)
    assert (added.worker["activations"], added.worker["gradients"]) == (600, 400)


def test_a_gpu_holds_the_whole_buffer_for_gradients() -> None:
    cpu, gpu = (estimate(_layout(2, bucket=1000), STEP, device).worker for device in ("cpu", "cuda"))
    assert gpu["activations"] == 600
    assert gpu["gradients"] == 4000
    assert cpu["gradients"] <= 800
    twice = estimate(_layout(2, bucket=1000, buffers=2), STEP, "cuda").worker
    assert twice["gradients"] == 8000


def test_stage_3_holds_weights_gathered_and_its_buffer_for_good() -> None:
    found = estimate(_layout(3, live=80, prefetch=10), STEP, "cpu").worker
    assert (found["gathered weights"], found["buffer"], found["own gradients"]) == (4 * 90, 4 * 50, 4 * 50)
    assert "gathered weights" not in estimate(_layout(3, workers=1), STEP, "cpu").worker


def test_what_is_offloaded_is_on_the_host() -> None:
    plain = estimate(_layout(2), STEP, "cpu")
    moved = estimate(_layout(2, optimizer="cpu"), STEP, "cpu")
    assert "optimizer" not in moved.worker
    assert moved.host["optimizer"] == plain.worker["optimizer"] + 8 * 50
    assert estimate(_layout(3, optimizer="nvme"), STEP, "cpu").host == {}
    everything = estimate(_layout(3, optimizer="cpu", weights="cpu"), STEP, "cpu")
    assert everything.host["weights"] == 200
    assert "weights" not in everything.worker


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    tree = tiny_job("/data/raw", tmp_path_factory.mktemp("plan") / "storage")
    tree["train"]["global_batch"] = 128
    tree["train"]["lanes"] = 8
    tree["train"]["deepspeed"]["zero_optimization"]["reduce_bucket_size"] = 1_000_000
    return parse_job(tree, "job.yaml")


def test_suggestions_fit_and_are_single_changes_where_one_is_enough(job: JobConfig) -> None:
    planner = Planner(job, "cpu")

    def total(**change: Any) -> int:
        block = changed(job.train, change)
        assert block is not None
        return planner.memory(block).total

    half, quarter = total(micro_batch=32), total(micro_batch=16)
    both = total(micro_batch=16, activation_checkpointing=True)
    assert both < quarter < half < total()
    told = dict(planner.suggestions(half))
    assert told["train.micro_batch: 32"].total == half
    assert "train.workers: 4" in told
    assert all(memory.total <= half for memory in told.values())
    assert "train.micro_batch: 16" in dict(planner.suggestions(quarter))
    tight = planner.suggestions(both)
    assert tight
    assert all(memory.total <= both for _, memory in tight)
    assert planner.suggestions(1000) == []


def test_what_the_configuration_refuses_is_not_suggested(job: JobConfig) -> None:
    assert changed(job.train, {"workers": 3}) is None
    block = changed(job.train, {"zero": {"stage": 2}, "activation_checkpointing": True})
    assert block is not None
    assert (block.zero_stage, block.activation_checkpointing) == (2, True)
    assert block.deepspeed["zero_optimization"]["reduce_bucket_size"] == 1_000_000


def test_the_fullest_stage_is_planned_for(job: JobConfig) -> None:
    work = Planner(job, "cpu").fullest(job.train)
    assert (work.stage.name, work.modality, work.shape.frames, work.shape.samples) == (
        "mixed",
        "video",
        2,
        64,
    )


def test_a_size_is_read_as_written() -> None:
    from pipeline.planning.command import size
    from sharding.errors import UserError

    assert [size(text) for text in ("80GiB", "1.5 GB", "2g", "1024")] == [
        80 * GIB,
        1_500_000_000,
        2 * 10**9,
        1024,
    ]
    for wrong in ("", "much", "1..5GB", "4 PiB"):
        with pytest.raises(UserError, match="--memory"):
            size(wrong)


def test_a_plan_without_shards_says_so_and_refuses_what_cannot_fit(job: JobConfig, tmp_path: Path) -> None:
    from rich.console import Console

    from pipeline.planning.command import plan
    from sharding.errors import UserError

    console = Console(width=160, record=True)
    needed = Planner(job, "cuda").memory(job.train).total
    with pytest.raises(UserError, match=r"fits: train\.micro_batch") as refused:
        plan(job, console, device="v100-16gb", memory=str(needed - 1), mfu=0.4)
    assert "v100-16gb has 0." in str(refused.value)
    text = console.export_text()
    assert "a rule of thumb: not prepared" in text
    assert "mixed" in text
    assert not (tmp_path / "storage").exists()
    with pytest.raises(UserError, match="--device: got 'abacus'"):
        plan(job, console, device="abacus", memory=None, mfu=0.4)
