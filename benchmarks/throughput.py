"""Samples/s of the loader alone, of the training step alone, and of both together, in one process.

    python -m benchmarks.throughput glscl-demo/job.yaml --stage 0 --steps 20

The job's datasets must be prepared (``glscl prepare``). "Both together" over "step alone" is what the training
loses to its data; machines are shared and noisy, so the ratio of one run is the figure to quote.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from cluster.workers import WorkerContext
from pipeline.config import JobConfig, load_job
from pipeline.runs import read_record, run_path
from pipeline.training.batches import Batch, stage_loader
from pipeline.training.config import StageBlock
from pipeline.training.engine import build_engine, build_model, model_config, optimizer_step
from sharding.errors import UserError
from sharding.manifest import load_manifest
from sharding.reader import ShardReader
from sharding.storage import open_storage

WARMUP = 3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    parser.add_argument("--stage", type=int, default=0, help="number of the stage, from 0")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each measurement")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the step (the loader has its own process)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    job = load_job(arguments.job)
    job = job.model_copy(update={"train": job.train.model_copy(update={"workers": 1})})
    stage = job.train.stages[arguments.stage]
    readers = open_readers(job, stage)

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    step = make_step(
        job,
        stage,
        WorkerContext(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, device=device),
    )
    loader = make_loader(job, stage, readers, arguments.steps + WARMUP)
    in_memory = list(itertools.islice(loader, 4))
    rates = {
        "loader alone": measure(loader, lambda batch: None),
        "training step alone": measure(
            list(itertools.islice(itertools.cycle(in_memory), arguments.steps + WARMUP)), step
        ),
        "both together": measure(loader, step),
    }
    dist.destroy_process_group()
    print_table(job, stage, rates)


def open_readers(job: JobConfig, stage: StageBlock) -> dict[str, ShardReader]:
    """Readers of the stage's datasets as the job's run has recorded them."""
    storage = open_storage(job.storage)
    record = read_record(storage.at(run_path(job)))
    if record is None:
        raise UserError(f"{storage.url_of(run_path(job))} holds no run: `glscl run` the job first")
    readers = {}
    for name in stage.mixture:
        dataset = storage.resolve(record["datasets"][name])
        readers[name] = ShardReader(dataset, load_manifest(dataset))
    return readers


def make_loader(
    job: JobConfig, stage: StageBlock, readers: dict[str, ShardReader], steps: int
) -> Iterable[Batch]:
    """The stage's loader, cut to so many steps."""
    return stage_loader(
        stage.model_copy(update={"steps": steps}),
        job.train,
        readers,
        model_config(job.model),
        tokenizer=job.model.tokenizer,
        seed=job.seed,
    )


def make_step(job: JobConfig, stage: StageBlock, context: WorkerContext) -> Callable[[Batch], None]:
    """Forward, backward and optimizer of one batch, as in the training loop."""
    engine, _ = build_engine(build_model(job.model, job.train, job.seed), job.train, context)

    def step(batch: Batch) -> None:
        batch = batch.to(context.device)
        output = engine(**batch.model_inputs(), objectives=stage.objectives)
        engine.backward(output.loss)
        optimizer_step(engine, job.train)
        if context.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(batches: Iterable[Batch], consume: Callable[[Batch], None]) -> float:
    """Samples per second, the first batches (start of processes, first touch of memory) left out."""
    sizes: list[int] = []
    marks: list[float] = []
    for batch in batches:
        consume(batch)
        sizes.append(len(batch.keys))
        marks.append(time.perf_counter())
    seconds = marks[-1] - marks[WARMUP - 1]
    return sum(sizes[WARMUP:]) / seconds


def print_table(job: JobConfig, stage: StageBlock, rates: dict[str, float]) -> None:
    """Samples/s and each rate's share of the step alone."""
    table = Table(
        title=f"{job.name}, stage '{stage.name}', global batch {stage.global_batch or job.train.global_batch}"
    )
    table.add_column("what")
    table.add_column("samples/s", justify="right")
    table.add_column("of step alone", justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}", f"{rate / rates['training step alone']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
