"""What a worker holds in memory while it trains, by ZeRO stage and offload, and what its host holds for it.

Modelled on what the installed DeepSpeed (``runtime/zero``) allocates, and held against measurements by
``benchmarks/plan_memory.py``. N parameters, W workers, w bytes of a weight, all else fp32 (4 bytes):

    stage       weights           optimizer             gradients while they come
    0           w N               8 N                   w N
    1           w N               (4 + 8) N / W         w N, then the own N / W, through a buffer
    2           w N               (4 + 8) N / W         the own N / W, the rest through a buffer
    3           w N / W           8 N / W, and 4 N / W    the own w N / W, the rest through a buffer
                                  more unless fp32

The buffer has ``reduce_bucket_size`` numbers. A GPU holds all of it, of a CPU's memory only what is written to is
taken; ZeRO-3 keeps it for good. ZeRO-3 gives gathered weights back only where they are not needed within the next
``stage3_max_reuse_distance`` (10^9) parameters: a model smaller than that is whole on every worker between forward
and backward.

Two moments can be the fullest: one in the backward, when activations meet gradients, and the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.planning.simulation import SimulatedStep
from pipeline.training.config import Recipe

_FP32 = 4
_MOMENTS = 8  # Adam's two, fp32
_BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size, in numbers
_LIVE = 1_000_000_000  # and stage3_max_live_parameters
_PREFETCH = 50_000_000  # and stage3_prefetch_bucket_size
_LIBRARIES = {"cpu": 0, "cuda": 700 * 2**20}  # context and kernels of CUDA, cuBLAS' workspace, NCCL


@dataclass(frozen=True)
class Layout:
    """How weights and their gradients are spread.

    Attributes:
        groups: parameters of each group of the optimizer.
        width: bytes of a weight.
        optimizer, weights: where they are offloaded to: "cpu", "nvme" or None.
        bucket: numbers in the buffer for gradients.
        buffers: so many of them (2 where communication overlaps).
        live, prefetch: most parameters that ZeRO-3 holds gathered, and gathers ahead.
    """

    groups: tuple[int, ...]
    stage: int
    workers: int
    width: int
    optimizer: str | None = None
    weights: str | None = None
    bucket: int = _BUCKET
    buffers: int = 1
    live: int = _LIVE
    prefetch: int = _PREFETCH

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(self.groups)


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes:
        worker: on the device of a worker, at the fullest moment.
        host: in the host's memory for each worker (offloaded).
        moment: the fullest: "backward" or "optimizer".
    """

    worker: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    moment: str = "backward"

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return sum(self.worker.values())


def layout_of(recipe: Recipe, groups: Sequence[int]) -> Layout:
    """As a job's ``train`` block has it."""
    zero: dict[str, Any] = recipe.deepspeed.get("zero_optimization", {})
    stage = recipe.zero_stage

    def place(key: str) -> str | None:
        device = (zero.get(key) or {}).get("device")
        return device if stage and device in ("cpu", "nvme") else None

    overlap = zero.get("overlap_comm", stage == 3)
    return Layout(
        groups=tuple(groups),
        stage=stage,
        workers=recipe.workers,
        width=2 if recipe.precision in ("bf16", "fp16") else _FP32,
        optimizer=place("offload_optimizer"),
        weights=place("offload_param") if stage == 3 else None,
        bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
        buffers=2 if overlap and stage in (1, 2) else 1,
        live=int(zero.get("stage3_max_live_parameters", _LIVE)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)),
    )


def estimate(
    layout: Layout, step: SimulatedStep, device: str = "cuda", *, accumulates: bool = False
) -> Memory:
    """The memory of a worker and of its host.

    Args:
        step: what the worker computes, see :func:`pipeline.planning.simulation.simulate`.
        device: ``cuda`` or ``cpu``.
        accumulates: gradients of several backwards are added up.
    """
    resident, host = _resident(layout, device)
    libraries = {"libraries": _LIBRARIES[device]} if _LIBRARIES[device] else {}
    backward = _backward(layout, step, device, accumulates=accumulates)
    update = _update(layout, device)
    fuller = sum(backward.values()) >= sum(update.values())
    moment = backward if fuller else update
    return Memory({**resident, **moment, **libraries}, host, "backward" if fuller else "optimizer")


def _resident(layout: Layout, device: str) -> tuple[dict[str, int], dict[str, int]]:
    """Weights and optimizer, which are there all the time: on the device, and on the host."""
    numbers, shard = layout.parameters, -(-layout.parameters // layout.workers)
    weights = layout.width * (shard if layout.stage == 3 else numbers)
    # ZeRO-1 and 2 keep fp32 copies of their shard even of fp32 weights; ZeRO-3 only of others, or offloaded.
    copied = layout.stage in (1, 2) or layout.width != _FP32 or (layout.stage == 3 and layout.optimizer)
    optimizer = _MOMENTS * (shard if layout.stage else numbers) + (_FP32 * shard if copied else 0)
    worker, host = {"weights": weights, "optimizer": optimizer}, {}
    if layout.optimizer:
        # Beside the optimizer its gradients, and weights on their way back.
        del worker["optimizer"]
        if layout.optimizer == "cpu":
            host["optimizer"] = optimizer + (_FP32 + layout.width) * shard
    if layout.weights:
        del worker["weights"]
        if layout.weights == "cpu":
            host["weights"] = weights
    if layout.stage == 3:
        if not layout.optimizer:
            worker["own gradients"] = layout.width * shard
        # Unlike those of the other stages it is never given back.
        worker["buffer"] = layout.width * (layout.bucket if device == "cuda" else min(layout.bucket, numbers))
    return worker, host


def _backward(layout: Layout, step: SimulatedStep, device: str, *, accumulates: bool) -> dict[str, int]:
    """At the fullest moment of the backward, or right after it, when gradients are reduced."""
    numbers, shard = layout.parameters, -(-layout.parameters // layout.workers)
    held = layout.width * min(layout.bucket, numbers)
    reserved = layout.width * layout.bucket * layout.buffers if device == "cuda" and layout.stage else 0
    own = layout.width * shard if layout.stage else 0
    if layout.stage == 3:
        return _backward_of_stage_3(layout, step, held)
    whole = layout.stage < 2  # gradients stay where the backward leaves them
    if whole and accumulates:
        activations, gradients = step.peak(0), float(layout.width * numbers)
    else:
        activations, gradients = _split(step, limit=None if whole else held)
    during = activations + gradients
    # Reducing: every gradient is there, and the own shard of them once more.
    after = layout.width * numbers if whole else held
    after += (
        own if layout.stage else (layout.width * min(layout.bucket, numbers) if layout.workers > 1 else 0)
    )
    if reserved:
        during += reserved - (0 if whole else gradients)
        after += reserved if whole else reserved - held
    if layout.stage == 2 and accumulates:
        during += own
    if during >= after:
        return {"activations": int(activations), "gradients": int(during - activations)}
    return {"gradients": int(after)}


def _backward_of_stage_3(layout: Layout, step: SimulatedStep, held: int) -> dict[str, int]:
    """Gathered weights beside the activations; or, at its end, the buffer's gradients once more for their exchange."""
    if layout.workers == 1:
        return {"activations": int(step.peak(0))}
    numbers, shard = layout.parameters, -(-layout.parameters // layout.workers)
    # Weights are gathered many at a time into one tensor, which lives until the last of them was used.
    gathered = layout.width * (min(layout.live, numbers) + min(layout.prefetch, numbers))
    activations, exchanged = int(step.peak(0)), held + layout.width * shard
    if gathered + activations >= exchanged:
        return {"gathered weights": gathered, "activations": activations}
    return {"gradients": exchanged}


def _split(step: SimulatedStep, limit: int | None) -> tuple[float, float]:
    """(activations, gradients) at the fullest moment, of the gradients never more than ``limit``."""
    kept = [(a, g if limit is None else min(g, limit)) for a, g in step.moments]
    return max(kept, key=sum)


def _update(layout: Layout, device: str) -> dict[str, int]:
    """In the optimizer's step: gradients that are left, and Adam's intermediates for its largest tensor."""
    numbers, shard = layout.parameters, -(-layout.parameters // layout.workers)
    if layout.optimizer:
        return {}
    if layout.stage == 0:
        # One parameter at a time on a CPU; all of a group on a GPU (foreach).
        return {
            "gradients": layout.width * numbers,
            "intermediates": _FP32 * max(layout.groups) if device == "cuda" else 0,
        }
    largest = _FP32 * -(-max(layout.groups) // layout.workers)
    flat = largest if layout.stage == 3 else 0
    return {
        "gradients": (0 if layout.stage == 3 else layout.width * shard) + flat,
        "intermediates": 2 * largest,
    }
