"""Workers that train the small job with every ZeRO stage and some of DeepSpeed's options, as the training loop does.

One set of processes serves all numbers of workers: importing DeepSpeed takes longer than what is measured.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.workers import WorkerContext
from pipeline.config import JobConfig, ModelBlock, parse_job
from pipeline.training.batches import Batch
from pipeline.training.engine import (
    begin_stage,
    build_engine,
    build_model,
    gradient_norm,
    model_config,
    optimizer_step,
)
from pipeline.training.learner import Part
from pipeline.training.loading import Slot
from pipeline.training.pretraining import Pretraining
from pipeline.training.schedule import learning_rate_at, set_learning_rates
from pipeline.training.weights import load_weights
from sharding.errors import UserError
from sharding.storage import open_storage
from tests.fixtures.jobs import tiny_job
from tests.model.small import small_batch, small_config

#: Descending: DeepSpeed numbers modules over a process's life, and workers of a group must agree on the numbers.
WORKERS = (4, 2, 1)
#: ZeRO 3 puts another in its place for the rest of the process, with which stages 1 and 2 are not the same any more.
LINEAR = torch.nn.functional.linear
SEED = 7
#: Without dropout: each worker draws its own.
MODEL = {
    "preset": "tiny",
    "overrides": {
        name: value
        for name, value in small_config().to_diff_dict().items()
        if name not in ("model_type", "transformers_version")
    },
}
STAGES = [
    # Two steps of one backward a part, then steps of two: the engine has to count anew.
    {"name": "images", "steps": 2, "mixture": {"emoji": 1}, "global_batch": 8},
    {
        **{"name": "clips", "steps": 2, "mixture": {"clips": 1}, "frames": 2, "global_batch": 16},
        **{"accumulation": 2, "learning_rate": 5e-4, "schedule": {"warmup": 0.4, "decay": "cosine"}},
        "objectives": {"itc": 1.0, "itm": 1.0, "mlm": 1.0},  # parameters go
    },
]
#: Ways to train beside the plain four, at two workers: what differs from ``stage`` alone.
OPTIONS: dict[str, dict[str, Any]] = {
    "overlap": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500, "contiguous_gradients": False},
    "optimizer on CPU": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "all on CPU": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
    "checkpointed": {"stage": 3},
}


def job_of(folder: Path, zero: dict[str, Any], workers: int, **train: Any) -> JobConfig:
    """The job with two stages, clipping, accumulation, and a worker's share worked off in parts of two samples."""
    tree = tiny_job("/data/raw", folder)
    deepspeed = {"zero_optimization": zero, **train.pop("deepspeed", {})}
    tree["train"] |= {"workers": workers, "micro_batch": 2, "clipping": 0.5, "stages": STAGES}
    tree["train"] |= {"deepspeed": deepspeed, **train}
    tree["model"] = MODEL
    return parse_job(tree, "job.yaml")


def train(folder: Path, job: JobConfig, rank: int) -> dict[str, Any]:
    """Losses and gradient norm of each step; what the engine goes by."""
    torch.nn.functional.linear = LINEAR
    workers = job.train.workers
    context = WorkerContext(rank, workers, rank, workers, 0, torch.device("cpu"))
    learner = Pretraining(job, open_storage(folder), {}, context, folder / "scratch")
    engine, peaks = build_engine(learner.build_model(), job.train, context)
    curve: list[dict[str, float]] = []
    for stage in job.train.stages:
        begin_stage(engine, job.train, stage)
        for _ in range(stage.steps):
            step = len(curve)
            set_learning_rates(engine.optimizer.param_groups, peaks, learning_rate_at(job.train, step))
            accumulation = job.train.accumulation_of(stage)
            found: dict[str, float] = {}
            for number in range(accumulation):
                batch = _batch(job, stage, 10 * step + number, rank)
                losses = learner.forward_backward(engine, stage, batch, Part(step, number)).losses
                optimizer_step(engine, job.train)
                for name, value in losses.items():
                    found[name] = found.get(name, 0.0) + float(value) / accumulation
            curve.append({**found, "norm": gradient_norm(engine)})
    found_of = {"curve": curve, "steps": engine.global_steps, "holds": _bytes_of_parameters(engine.module)}
    return {**found_of, "effective": _effective(engine)}


def _batch(job: JobConfig, stage: Any, seed: int, rank: int) -> Batch:
    samples = job.train.batch_of(stage) // job.train.accumulation_of(stage)
    group, share = samples // job.train.lanes, samples // job.train.workers
    frames = stage.frames if "clips" in stage.mixture else 1
    config = model_config(job.model)
    mine = small_batch(config, samples, frames, invalid=(1,), group_size=group, seed=seed).part(
        share * rank, share * (rank + 1)
    )
    keys = [str(number) for number in range(share)]
    return Batch(
        **{name: getattr(mine, name) for name in ("input_ids", "attention_mask", "pixel_values", "masks")},
        valid=mine.valid,
        keys=keys,
        slots=[Slot("emoji", 0, 0, 0)] * share,
        causes=[None] * share,
        group_size=group,
    )


def _bytes_of_parameters(model: torch.nn.Module) -> int:
    """Of what this worker holds between steps."""
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    whole = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    return sum(one.numel() * one.element_size() for one in (*held, *whole))


def _effective(engine: Any) -> dict[str, Any]:
    optimizer = engine.optimizer
    return {
        "overlap": bool(getattr(optimizer, "overlap_comm", False)),
        "bucket": int(getattr(optimizer, "reduce_bucket_size", 0)),
        "contiguous": bool(getattr(optimizer, "contiguous_gradients", True)),
        "optimizer_device": str(getattr(optimizer, "device", "")),
        "offloads": bool(getattr(optimizer, "cpu_offload", getattr(optimizer, "offload_optimizer", False))),
        "communication": str(engine.communication_data_type),
        "breakdown": engine.wall_clock_breakdown(),
    }


def start(folder: Path, clip: Path, job: JobConfig, rank: int) -> dict[str, Any]:
    """The model as it is made, partitioned: every parameter, what a worker held, and the same after an import."""
    context_device = torch.device("cpu")
    block = ModelBlock.model_validate(MODEL)
    largest = _Largest()
    with largest:
        model = build_model(block, job.train, SEED, context_device)
    found: dict[str, Any] = {
        "parameters": gathered(model),
        "held": _bytes_of_parameters(model),
        "largest": largest.alive,
        "empty": all(parameter.numel() == 0 for parameter in model.parameters()),
    }
    load_weights(model, [str(clip)], open_storage(folder), folder / f"weights-{rank}", tell=False)
    found["imported"] = gathered(model)
    try:
        load_weights(model, ["nowhere.safetensors"], open_storage(folder), folder / f"w{rank}", tell=False)
    except UserError as error:
        found["missing"] = str(error)
    return found


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of tensors made since its beginning that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self._now, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self._now += size
                self.alive = max(self.alive, self._now)
                weakref.finalize(storage, self._gone, key, size)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter in full."""
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def work(rank: int, folder: str, clip: str) -> None:
    """What each process does; leaves ``RANK-WORKERS.pt``."""
    torch.set_num_threads(1)
    os.environ.update(DS_ACCELERATOR="cpu")
    place = Path(folder)
    for workers in WORKERS:
        if rank >= workers:
            continue
        _enter(rank, workers, place)
        found: dict[str, Any] = {}
        for stage in (0, 1, 2, 3):
            found[f"ZeRO-{stage}"] = train(place, job_of(place, {"stage": stage}, workers), rank)
        for precision in ("fp32", "bf16"):
            job = job_of(place, {"stage": 3}, workers, precision=precision)
            found[f"start {precision}"] = start(place, Path(clip), job, rank)
        if workers == 2:
            for name, zero in OPTIONS.items():
                more: dict[str, Any] = {"activation_checkpointing": name == "checkpointed"}
                if name == "overlap":
                    profile = {"enabled": True, "profile_step": 1, "output_file": str(place / "flops.txt")}
                    more["deepspeed"] = {
                        "communication_data_type": "fp32",
                        "wall_clock_breakdown": True,
                        "flops_profiler": profile,
                    }
                found[name] = train(place, job_of(place, zero, workers, **more), rank)
        torch.save(found, place / f"{rank}-{workers}.pt")
        _leave()


def _enter(rank: int, workers: int, place: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/group-{workers}", rank=rank, world_size=workers
    )


def _leave() -> None:
    """Of the group and of what DeepSpeed remembers of it."""
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    dist.barrier()
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for name in ("_WORLD_GROUP", "_CLONED_WORLD_GROUP", "mpu"):
        if hasattr(groups, name):
            setattr(groups, name, None)
