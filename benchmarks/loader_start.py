"""What loader processes cost to start: each importing for itself, or forked from a server that has imported once.

    python -m benchmarks.loader_start glscl-demo/job.yaml --processes 4

The job must have been run. Measured from the start of the first stage's loader to its first batch, and once more for
a second loader as the next stage has one: seconds, CPU of all its processes and of their server, and their memory
(proportional set sizes: what several share counts once). One batch a process, so that what is loaded weighs little.
"""

# Nothing heavy is imported here: as in a worker of Ray, the main module is not what brings torch.
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

WAYS = {"each by itself": False, "forked from a server that has imported": True}


def main() -> None:
    """Measure each way in a process of its own, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        print("FOUND", json.dumps(_measure(arguments.job, arguments.processes, WAYS[arguments.way])))
        return
    table = Table("way", "stage", "seconds", "CPU s", "MiB", title=f"{arguments.processes} loader processes")
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.loader_start", *sys.argv[1:], "--way", way],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
        for number, row in enumerate(json.loads(found.removeprefix("FOUND "))):
            table.add_row(way, f"{number}", f"{row['s']:.1f}", f"{row['cpu_s']:.1f}", f"{row['mib']:,.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _measure(path: Path, processes: int, ahead: bool) -> list[dict[str, Any]]:
    from benchmarks.throughput import make_loader, open_readers
    from pipeline.config import load_job
    from pipeline.training.loading import import_ahead

    job = load_job(path)
    train = job.train.model_copy(update={"workers": 1, "loader_processes": processes})
    job = job.model_copy(update={"train": train})
    stage = job.train.stages[0]
    readers = open_readers(job, stage)
    found, before = [], 0.0
    began = time.monotonic()
    if ahead:
        import_ahead("pipeline.training.batches")
    for _ in range(2):
        batches = iter(make_loader(job, stage, readers, processes))
        next(batches)
        seconds, own = time.monotonic() - began, psutil.Process()
        others = own.children(recursive=True)
        cpu = sum(sum(one.cpu_times()[:2]) for one in others)
        memory = sum(one.memory_full_info().pss for one in others) / 2**20
        found.append({"s": seconds, "cpu_s": cpu - before, "mib": memory})
        for _ in batches:
            pass
        began = time.monotonic()
        before = sum(sum(one.cpu_times()[:2]) for one in own.children(recursive=True))
    return found


if __name__ == "__main__":
    main()
