"""How much longer the step is that triggers a checkpoint.

    python -m benchmarks.checkpoints                       # preset tiny, ZeRO 1, one process
    python -m benchmarks.checkpoints --batch 64 --every 8 --saves 10

Steps of ``preset tiny`` under DeepSpeed, every so many of them followed by a checkpoint into a local folder. A step is
timed from the end of the one before to its own end, its part of the checkpoint included: ``with checkpoint`` are those
that trigger one, ``after it`` those beside whose computing it is hashed, written and committed, ``neighbours`` the
others. Medians, and their ratio to the neighbours'. ``waiting`` is the ratio if the training waited for the commit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from cluster.workers import WorkerContext
from pipeline.config import ModelBlock
from pipeline.training.checkpoints.writer import CheckpointWriter
from pipeline.training.config import StageBlock, TrainBlock
from pipeline.training.engine import build_engine, build_model, model_config, optimizer_step
from sharding.storage import open_storage
from tests.model.small import small_batch

WARMUP = 3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=6, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=8, help="checkpoints written")
    parser.add_argument("--zero", type=int, default=1, choices=range(4))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="glscl-benchmark-") as folder:
        measure(arguments, Path(folder))
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Time the steps and print the table."""
    train = TrainBlock(
        global_batch=arguments.batch,
        lanes=arguments.batch // 2,
        deepspeed={"zero_optimization": {"stage": arguments.zero}},
        stages=[StageBlock(name="s", steps=1, mixture={"x": 1})],
    )
    block = ModelBlock(preset="tiny")
    context = WorkerContext(0, 1, 0, 1, 0, torch.device("cpu"))
    engine, _ = build_engine(build_model(block, train, seed=1), train, context)
    weights = {str(name): weight for name, weight in train.stages[0].objectives.items()}
    batch = small_batch(model_config(block), arguments.batch, group_size=2)
    writer = CheckpointWriter(open_storage(folder), context, folder)
    kinds: dict[str, list[float]] = {"neighbours": [], "with checkpoint": [], "after it": []}
    background, blocking = [], []
    for step in range(WARMUP + arguments.every * arguments.saves):
        began = time.perf_counter()
        output = engine(**batch.inputs(), objectives=weights, group_size=2)
        engine.backward(output.loss)
        optimizer_step(engine, train)
        place = (step - WARMUP) % arguments.every
        if step >= WARMUP and place == arguments.every // 2:
            asked = time.perf_counter()
            writer.save(engine, step=step, stage=0, details={}, before_commit=dict)
            blocking.append(time.perf_counter() - asked)
        kind = {arguments.every // 2: "with checkpoint", arguments.every // 2 + 1: "after it"}.get(place)
        if step >= WARMUP:
            kinds[kind or "neighbours"].append(time.perf_counter() - began)
        background += [seconds] if (seconds := writer.seconds()) is not None else []
    writer.close()
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    print_table(arguments, parameters, kinds, blocking, background)


def print_table(
    arguments: argparse.Namespace,
    parameters: int,
    kinds: dict[str, list[float]],
    blocking: list[float],
    background: list[float],
) -> None:
    """Medians in ms, and ratios to the neighbours'."""
    reference = statistics.median(kinds["neighbours"])
    title = f"{parameters / 1e6:.1f}M parameters, batch {arguments.batch}, ZeRO {arguments.zero}"
    table = Table("steps", "number", "median, ms", "ratio", title=title)
    for kind, seconds in kinds.items():
        median = statistics.median(seconds)
        table.add_row(kind, str(len(seconds)), f"{1000 * median:.0f}", f"{median / reference:.2f}")
    for name, seconds in (("snapshot alone", blocking), ("background", background)):
        median = statistics.median(seconds)
        table.add_row(name, str(len(seconds)), f"{1000 * median:.0f}", f"{median / reference:.2f}")
    waiting = 1 + statistics.median(blocking) / reference + statistics.median(background) / reference
    table.add_row("waiting", "", "", f"{waiting:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
