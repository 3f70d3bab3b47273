"""The training job end to end against the bare step loop, its waiting for data, and how soon it goes on after a kill.

    python -m benchmarks.job glscl-demo/job.yaml --stage 1 --steps 60 --kills 5

The job must have run once (its shards are used). "Bare" is one process that repeats forward, backward and optimizer on
batches in memory, with as many threads as there are cores. "Job" is ``glscl run`` of the stage with two workers on the
same cores: Ray, DeepSpeed, loader processes, checkpoints, MLflow. Bare is measured before and after the job; the ratio
is against the mean of both. Both ratios are printed, of samples/s and of CPU seconds a sample: on a machine that others
use, the latter is the one to believe. For the kills one worker gets SIGKILL at a random moment after a checkpoint;
measured is the time until the first step after it is done. Aims: 90 % of the bare loop, under 2 % of the steps' time
waiting for data, under 30 s from a kill to the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.throughput import WARMUP, make_loader, make_step, open_readers
from cluster.workers import WorkerContext
from pipeline.config import JobConfig, load_job
from pipeline.goodput.accounting import Attempt, account
from pipeline.goodput.records import read_records
from pipeline.training.checkpoints import list_checkpoints
from sharding.storage import Storage, open_storage

WORKERS = 2
AIM, AIM_WAIT, AIM_RESTART_S = 0.9, 0.02, 30.0


@dataclass(frozen=True)
class Rate:
    """Samples/s, and CPU seconds of all processes that train for one sample."""

    samples_per_s: float
    cpu_s: float


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    parser.add_argument("--stage", type=int, default=0, help="number of the stage, from 0")
    parser.add_argument("--steps", type=int, default=60, help="of the job")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--bare", action="store_true", help=argparse.SUPPRESS
    )  # what a started process is told
    arguments = parser.parse_args()
    job = load_job(arguments.job)
    if arguments.bare:
        print(json.dumps(bare(job, arguments.stage, max(10, arguments.steps // 4))))
        return
    before = _bare_process(arguments)
    with Run(arguments.job, job, arguments.stage, arguments.steps, arguments.every) as run:
        rate = run.measure()
        records = read_records(run.storage)
    after = _bare_process(arguments)
    restarts = [kill_once(arguments, job, seed) for seed in range(arguments.kills)]
    print_table(rate, [before, after], records[1][0], restarts)
    found = account(*records)
    assert found is not None
    Console(width=120).print(
        f"goodput of the undisturbed run of {arguments.steps} steps: {found.goodput:.0%}"
    )


def bare(job: JobConfig, number: int, steps: int) -> dict[str, float]:
    """Samples/s and CPU seconds a sample of one process that has its batches in memory."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    job = job.model_copy(update={"train": job.train.model_copy(update={"workers": 1})})
    stage = job.train.stages[number]
    context = WorkerContext(0, 1, 0, 1, 0, torch.device("cpu"))
    step = make_step(job, stage, context)
    in_memory = list(islice(make_loader(job, stage, open_readers(job, stage), 4), 4))
    for batch in islice(cycle(in_memory), WARMUP):
        step(batch)
    began, cpu, samples = time.perf_counter(), _own_cpu(), 0
    for batch in islice(cycle(in_memory), steps):
        step(batch)
        samples += len(batch.keys)
    return {
        "samples_per_s": samples / (time.perf_counter() - began),
        "cpu_s": (_own_cpu() - cpu) / samples,
    }


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _bare_process(arguments: argparse.Namespace) -> Rate:
    command = [sys.executable, "-m", "benchmarks.job", str(arguments.job), "--bare"]
    command += ["--stage", str(arguments.stage), "--steps", str(arguments.steps)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Rate(**json.loads(output.splitlines()[-1]))


class Run:
    """``glscl run`` of one stage in a run of its own, which is deleted at the end."""

    def __init__(self, file: Path, job: JobConfig, stage: int, steps: int, every: int) -> None:
        name = f"benchmark-{os.getpid()}-{time.time_ns()}"
        block = job.train.stages[stage].model_dump(mode="json")
        block |= {"steps": steps, "checkpoint_every": every}
        self._root, self._path = open_storage(job.storage), f"runs/{name}"
        self._batch = block["global_batch"] or job.train.global_batch
        self.storage: Storage = self._root.at(self._path)
        self._folder = tempfile.TemporaryDirectory(prefix="glscl-benchmark-")
        changes = {
            "name": name,
            "train.workers": WORKERS,
            "train.stages": [block],
            "evaluate.tasks": [],
            "evaluate.regression": [],
            "checkpoints.keep_best": None,
            "tracking.uri": f"sqlite:///{self._folder.name}/mlflow.db",
        }
        self._command = [sys.executable, "-m", "pipeline", "run", str(file)]
        for key, value in changes.items():
            plain = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n")
            self._command += ["--set", f"{key}={plain.strip()}"]
        self._log = Path(self._folder.name) / "log"

    def __enter__(self) -> Run:
        with self._log.open("wb") as log:
            self.process = psutil.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._root.delete(self._path, recursive=True)
        self._folder.cleanup()

    def attempts(self) -> list[Attempt]:
        """All groups of workers so far."""
        return sorted(read_records(self.storage)[1], key=lambda attempt: attempt.began)

    def workers(self) -> list[psutil.Process]:
        """The processes of the training workers."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def measure(self) -> Rate:
        """Of the run as a whole, from the end of the first step to the last checkpoint."""
        marks: list[tuple[int, float]] = []  # steps done, CPU seconds of the workers and their loaders
        while self.alive():
            attempts = self.attempts()
            step = attempts[-1].step if attempts else 0
            if step and (not marks or step > marks[-1][0]):
                marks.append((step, sum(map(_cpu, self.workers()))))
            time.sleep(0.5)
        [attempt] = self.attempts()
        spent = attempt.seen - attempt.first_step  # everything: checkpoints, metrics, what is between steps
        (first, before), (last, after) = marks[0], [mark for mark in marks if mark[1] >= marks[0][1]][-1]
        if last == first:
            raise RuntimeError("too few steps for a rate: --steps more")
        return Rate(
            (attempt.step - 1) * self._batch / spent, (after - before) / ((last - first) * self._batch)
        )

    def alive(self) -> bool:
        """Whether the command still runs; raises with its output where it failed."""
        code = self.process.poll()
        if code:
            raise RuntimeError(self._log.read_text(errors="replace")[-3000:])
        return code is None


def _cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and of all it has started."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def kill_once(arguments: argparse.Namespace, job: JobConfig, seed: int) -> float:
    """Seconds from a kill of a worker to the end of the first step after it."""
    draw = random.Random(seed)
    with Run(arguments.job, job, arguments.stage, 10**5, arguments.every) as run:
        while run.alive() and not list_checkpoints(run.storage):
            time.sleep(0.1)
        time.sleep(draw.uniform(0.0, 5.0))
        victim = draw.choice(run.workers())
        killed = time.time()
        victim.kill()
        while run.alive():
            later = [each.first_step for each in run.attempts() if each.began > killed and each.first_step]
            if later:
                return later[0] - killed
            time.sleep(0.2)
    raise RuntimeError("the job ended before it was killed")


def print_table(rate: Rate, bares: list[Rate], attempt: Attempt, restarts: list[float]) -> None:
    """What was measured, what is aimed at."""
    bare_rate = statistics.mean(each.samples_per_s for each in bares)
    bare_cpu = statistics.mean(each.cpu_s for each in bares)
    wait = attempt.seconds.get("data", 0.0) / (attempt.seconds.get("data", 0.0) + attempt.seconds["compute"])
    table = Table(title=f"{WORKERS} workers on {len(os.sched_getaffinity(0))} cores", title_justify="left")
    for name in ("what", "measured", "aim"):
        table.add_column(name, justify="left" if name == "what" else "right")
    spread = " and ".join(f"{each.samples_per_s:.1f}" for each in bares)
    table.add_row("bare loop, samples/s, before and after", spread, "")
    table.add_row("job, samples/s", f"{rate.samples_per_s:.1f}", "")
    table.add_row("job / bare, samples/s", f"{rate.samples_per_s / bare_rate:.0%}", f"{AIM:.0%}")
    table.add_row("bare / job, CPU s a sample", f"{bare_cpu / rate.cpu_s:.0%}", f"{AIM:.0%}")
    table.add_row("waiting for data, of the steps' time", f"{wait:.1%}", f"< {AIM_WAIT:.0%}")
    if restarts:
        listed = ", ".join(f"{seconds:.1f}" for seconds in sorted(restarts))
        median = f"{statistics.median(restarts):.1f} s ({listed})"
        table.add_row("kill to next step, median of all", median, f"< {AIM_RESTART_S:g} s")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
