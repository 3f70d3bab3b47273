"""Out of memory ends a run with what to change and the sizes at hand, whoever noticed it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ray.exceptions import OutOfMemoryError

from cluster.workers import WorkerContext, _EndOnError, _KilledForMemory
from pipeline.errors import OutOfMemory
from pipeline.training.config import TrainBlock
from pipeline.training.health.memory import advice, explained
from tests.pipeline.health.small import small_course

CONTEXT = WorkerContext(1, 2, 1, 2, 0, torch.device("cpu"))
TRAIN = TrainBlock.model_validate(
    {
        "workers": 2,
        "global_batch": 512,
        "lanes": 8,
        "micro_batch": 64,
        "stages": [{"name": "all", "steps": 1, "mixture": {"made": 1}, "resolution": 224}],
    }
)


def test_what_torch_cannot_allocate_on_the_host_is_told_with_sizes_and_what_helps() -> None:
    with pytest.raises(OutOfMemory) as caught, explained(TRAIN, CONTEXT):
        torch.empty(1 << 58)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert message.startswith("worker 1 ran out of memory of ")
    assert "64 of 256 samples a worker at once, resolution 224, 4 frames a clip, ZeRO stage 1" in message
    assert "you tried to allocate" in message
    for change in (
        "train.activation_checkpointing: true",
        "train.micro_batch below 64",
        "train.deepspeed.zero_optimization.stage above 1",
        "offload_optimizer",
        "train.loader_processes (now 1)",
        "global_batch",
        "resolution",
    ):
        assert change in message


def test_what_numpy_cannot_allocate_is_told_too() -> None:
    with pytest.raises(OutOfMemory, match="Unable to allocate"), explained(small_course(1), CONTEXT):
        np.empty(1 << 58, dtype=np.uint8)


def test_a_gpu_s_allocator_is_told_without_advice_that_is_followed_already() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    course = TRAIN.model_copy(
        update={"activation_checkpointing": True, "deepspeed": {"zero_optimization": {"stage": 3}}}
    )
    message = advice(course, "worker 0", "device", said)
    assert "worker 0 ran out of GPU memory, with 64 of 256 samples" in message
    assert said in message
    assert "activation_checkpointing" not in message
    assert "stage above" not in message
    with pytest.raises(OutOfMemory, match="ran out of GPU memory"), explained(TRAIN, CONTEXT):
        raise torch.OutOfMemoryError(said)


def test_shared_memory_that_is_too_small_leads_to_the_loader_processes() -> None:
    said = "unable to allocate shared memory(shm) for file </torch_1>: Cannot allocate memory (12)"
    with (
        pytest.raises(OutOfMemory, match=r"\(/dev/shm\).*loader_processes.*--shm-size"),
        explained(TRAIN, CONTEXT),
    ):
        raise RuntimeError(said)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), explained(TRAIN, CONTEXT):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_a_worker_that_ray_kills_for_memory_ends_the_run_at_once() -> None:
    killed = OutOfMemoryError(
        "Task was killed due to the node running low on memory.\nMemory on the node ..."
    )
    with pytest.raises(_KilledForMemory) as caught:
        _EndOnError().after_exception(None, {0: RuntimeError("connection reset"), 3: killed})
    assert (caught.value.rank, caught.value.summary) == (
        3,
        "Task was killed due to the node running low on memory.",
    )
