"""What going on at any position of a large dataset costs: seconds and memory of a fresh process, by number of shards.

    python -m benchmarks.resume

Writes manifests of 1,000, 10,000 and 100,000 shards of 10,000 samples each (so up to 10^9 samples; the shards
themselves are not there). For each it starts processes of their own that do what a training does to go on: load
the manifest from the storage, take its digest, plan the epoch it is in, and name the samples of the first global
batch (4,096 in 64 lanes) at a random step of several epochs. "Hand over" is what passing the manifest to a loader
process adds. Seconds are the median of the rounds, memory the largest peak. CPU seconds are printed beside those
of the clock, since machines are shared. ``--samples 100000`` shows that nothing grows with the samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.training.config import TrainBlock
from pipeline.training.data_order import DataOrder
from sharding.manifest import MANIFEST_PATH, Counts, Manifest, ShardRecord, load_manifest
from sharding.storage import open_storage

#: What is aimed at: seconds of all phases, and the peak of the process's memory.
TARGET_S, TARGET_GIB = 2.0, 1.0
PHASES = ("load", "digest", "plan", "batch")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each number of shards")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the started processes are told
    parser.add_argument("--seed", type=int, default=0, help="of the random positions")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.seed)))
        return
    rows = []
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory(prefix="glscl-resume-") as folder:
            size = write_manifest(Path(folder), shards, arguments.samples)
            seeds = range(arguments.seed, arguments.seed + arguments.rounds)
            rows.append((shards, size, [in_fresh_process(Path(folder), seed) for seed in seeds]))
    print_table(arguments.samples, rows)


def write_manifest(folder: Path, shards: int, samples: int) -> int:
    """A manifest as ``glscl prepare`` leaves it; its size in bytes."""

    def digest(*parts: object) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    records = [
        ShardRecord(
            name=f"{number:06d}",
            samples=samples,
            bytes=samples * 20_000,
            sha256=digest("tar", number),
            index_bytes=samples * 80,
            index_sha256=digest("index", number),
        )
        for number in range(shards)
    ]
    manifest = Manifest(
        name="simulated",
        modality="image",
        configuration={},
        configuration_digest=digest("configuration"),
        source={"url": "file:///nowhere"},
        shards=records,
        counts=Counts(read=shards * samples, kept=shards * samples),
    )
    storage = open_storage(folder)
    storage.write_json(MANIFEST_PATH, manifest.model_dump(mode="json"))
    return storage.size(MANIFEST_PATH)


def in_fresh_process(folder: Path, seed: int) -> dict[str, float]:
    """What :func:`measure` gives in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.resume", "--measure", str(folder), "--seed", str(seed)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def measure(folder: Path, seed: int) -> dict[str, float]:
    """Seconds of each phase, and peak memory in GiB, of going on at a random step."""
    imported = _peak_gib()
    began = time.process_time()
    marks = [time.perf_counter()]
    manifest = load_manifest(open_storage(folder))
    marks.append(time.perf_counter())
    assert manifest.digest  # compared with that of the checkpoint
    marks.append(time.perf_counter())
    steps = 3 * manifest.samples // 4096
    stage = {"name": "simulated", "steps": steps, "mixture": {"simulated": 1.0}}
    train = TrainBlock.model_validate({"global_batch": 4096, "lanes": 64, "stages": [stage]})
    order = DataOrder(train, {"simulated": manifest}, seed)
    step = next(order.stage(train.stages[0], random.Random(seed).randrange(steps)))
    marks.append(time.perf_counter())
    slots = order.slots(step)
    marks.append(time.perf_counter())
    cpu = time.process_time() - began
    assert slots.shape == (4096, 2)
    handed = pickle.loads(pickle.dumps(manifest))  # noqa: S301 - its own
    assert handed.samples == manifest.samples
    seconds = {name: end - begin for name, begin, end in zip(PHASES, marks, marks[1:], strict=False)}
    return {
        **seconds,
        "total": marks[-1] - marks[0],
        "CPU": cpu,
        "hand over": time.perf_counter() - marks[-1],
        "imports": imported,
        "peak": _peak_gib(),
    }


def _peak_gib() -> float:
    # Not getrusage: what it says of a started process begins with the memory of the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


def print_table(samples: int, rows: list[tuple[int, int, list[dict[str, float]]]]) -> None:
    """A row for each number of shards."""
    table = Table(title=f"going on at a random step; shards of {samples:,} samples")
    timed = (*PHASES, "total", "CPU", "hand over")
    names = ("shards", "samples", "manifest MB", *(f"{name} s" for name in timed), "imports GiB", "peak GiB")
    for name in (*names, f"< {TARGET_S:g} s and {TARGET_GIB:g} GiB"):
        table.add_column(name, justify="right")
    for shards, size, rounds in rows:
        median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        peak = max(one["peak"] for one in rounds)
        table.add_row(
            f"{shards:,}",
            f"{shards * samples:,}",
            f"{size / 1e6:.1f}",
            *(f"{median[name]:.3f}" for name in timed),
            f"{median['imports']:.2f}",
            f"{peak:.2f}",
            "yes" if median["total"] < TARGET_S and peak < TARGET_GIB else "no",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
