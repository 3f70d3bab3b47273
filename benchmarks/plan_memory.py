"""What `glscl plan` says of a worker's memory, against what real training steps on the CPU take.

    python -m benchmarks.plan_memory                         # 1 and 2 workers, ZeRO 0-3, with and without checkpointing

Each row trains a model of some 60 million parameters (gloo, DeepSpeed, AdamW, the five objectives) for two steps in
processes of its own. Measured is the peak of resident memory in the second step above what the process held
before it built the model; freed memory goes back to the system at once (``MALLOC_MMAP_THRESHOLD_``), so that what is
resident is what is in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.step import reset_peak, resident
from cluster.workers import WorkerContext
from model import GLSCLForPreTraining, backward_in_parts
from pipeline.config import ModelBlock
from pipeline.planning.memory import estimate, layout_of
from pipeline.planning.simulation import Shape, inputs_of, meta_model, simulate
from pipeline.training.config import PAPER_OBJECTIVES, TrainBlock
from pipeline.training.engine import build_engine, build_model, model_config, optimizer_step

#: Wide rather than deep: memory is what is measured, not time.
MODEL = {
    "image_size": 96,
    "patch_size": 16,
    "vocab_size": 20000,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vision_layers": 3,
    "text_layers": 3,
    "fusion_layers": 3,
}
TOKENS = 24
OBJECTIVES = {str(name): weight for name, weight in PAPER_OBJECTIVES.items()}
STEPS = 2


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=24, help="samples of a worker")
    parser.add_argument(
        "--ways", nargs="+", default=["plain", "checkpointing"], choices=["plain", "checkpointing", "parts"]
    )
    parser.add_argument("--bucket", type=int, help="DeepSpeed's reduce_bucket_size; default: its own")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what the started processes are told
    arguments = parser.parse_args()
    if arguments.worker:
        _worker(json.loads(arguments.worker))
        return
    rows = []
    for workers, stage, way in itertools.product(arguments.workers, arguments.stages, arguments.ways):
        settings = {"workers": workers, "stage": stage, "way": way, "batch": arguments.batch}
        settings["bucket"] = arguments.bucket
        began = time.monotonic()
        rows.append((settings, predict(settings), measure(settings)))
        said, found = rows[-1][1] / 2**20, rows[-1][2] / 2**20
        print(
            f"{settings}: {said:.0f} and {found:.0f} MiB, {time.monotonic() - began:.0f} s", file=sys.stderr
        )
    print_table(rows)


def recipe(settings: dict[str, Any]) -> TrainBlock:
    """The job's ``train`` block of a row."""
    zero: dict[str, Any] = {"stage": settings["stage"]}
    if settings["bucket"]:
        zero["reduce_bucket_size"] = settings["bucket"]
    batch = settings["batch"] * settings["workers"]
    return TrainBlock.model_validate(
        {
            "workers": settings["workers"],
            "global_batch": batch,
            "lanes": batch // 4,
            "micro_batch": settings["batch"] // 4 if settings["way"] == "parts" else None,
            "activation_checkpointing": settings["way"] == "checkpointing",
            "deepspeed": {"zero_optimization": zero},
            "stages": [{"name": "one", "steps": STEPS, "mixture": {"none": 1}}],
        }
    )


def shape_of(settings: dict[str, Any]) -> Shape:
    """A worker's batch of a row."""
    parts = 4 if settings["way"] == "parts" else 1
    return Shape(settings["batch"] // parts, 1, MODEL["image_size"], TOKENS, 4, parts)


def predict(settings: dict[str, Any]) -> float:
    """Bytes that `glscl plan` says."""
    train = recipe(settings)
    block = ModelBlock(preset="tiny", overrides=MODEL)
    model = meta_model(model_config(block), checkpointing=train.activation_checkpointing)
    step = simulate(model, shape_of(settings), OBJECTIVES, workers=train.workers, device="cpu")
    groups = [sum(p.numel() for p in group["params"]) for group in model.parameter_groups(1e-4, 0.01)]
    parts = settings["way"] == "parts"
    return float(estimate(layout_of(train, groups), step, "cpu", accumulates=parts).total)


def measure(settings: dict[str, Any]) -> float:
    """Bytes that the fullest of the row's workers took."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(settings["workers"]),
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--worker"]
        processes = [
            subprocess.Popen(
                [*command, json.dumps({**settings, "folder": folder, "rank": rank})],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(settings["workers"])
        ]
        found = []
        for process in processes:
            output, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(errors[-3000:])
            found.append(float(output.splitlines()[-1]))
    return max(found)


def _worker(settings: dict[str, Any]) -> None:
    rank, workers = settings["rank"], settings["workers"]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(settings['folder'])}/meet", rank=rank, world_size=workers
    )
    context = WorkerContext(rank, workers, rank, workers, 0, torch.device("cpu"))
    train = recipe(settings)
    block = ModelBlock(preset="tiny", overrides=MODEL)
    shape = shape_of(settings)
    parts = [
        inputs_of(model_config(block), shape, number, torch.device("cpu")) for number in range(shape.parts)
    ]
    _warm_up()
    reset_peak(context.device)
    level = resident("VmRSS")
    engine, _ = build_engine(build_model(block, train, 0), train, context)
    for number in range(STEPS):
        if number == 1:
            reset_peak(context.device)  # what only building takes does not count
        _step(engine, train, parts, shape)
    print((resident("VmHWM") - level) * 1024)


def _warm_up() -> None:
    """Load what a first step would load: libraries are no part of what is planned."""
    import deepspeed  # noqa: F401

    layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
    layer(torch.randn(2, 8, 32)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    dist.all_reduce(torch.ones(1024))


def _step(engine: Any, train: TrainBlock, parts: list[dict[str, Any]], shape: Shape) -> None:
    model: GLSCLForPreTraining = engine.module
    if len(parts) == 1:
        engine.backward(engine(**parts[0], objectives=OBJECTIVES, group_size=shape.group).loss)
        optimizer_step(engine, train)
        return
    done = 0

    def backward(loss: torch.Tensor) -> None:
        nonlocal done
        if done:
            optimizer_step(engine, train)
        engine.backward(loss * len(parts))
        done += 1

    backward_in_parts(
        engine,
        backward,
        parts,
        config=model.config,
        objectives=OBJECTIVES,
        group_size=shape.group,
        reseed=lambda number: None,
    )
    optimizer_step(engine, train)


def print_table(rows: list[tuple[dict[str, Any], float, float]]) -> None:
    """One row for each way of training."""
    model = meta_model(model_config(ModelBlock(preset="tiny", overrides=MODEL)))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    table = Table(
        title=f"peak memory of a worker, MiB; {numbers / 1e6:.0f}M parameters, fp32, CPU",
        title_justify="left",
    )
    for name in ("workers", "ZeRO", "way", "samples", "planned", "measured", "planned / measured"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for settings, said, found in rows:
        table.add_row(
            str(settings["workers"]),
            str(settings["stage"]),
            settings["way"],
            str(settings["batch"]),
            f"{said / 2**20:,.0f}",
            f"{found / 2**20:,.0f}",
            f"{said / found:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
