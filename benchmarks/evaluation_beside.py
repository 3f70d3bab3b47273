"""Training's samples/s with evaluations running on other cores, and without, turn about in one run.

    python -m benchmarks.evaluation_beside glscl-demo/job.yaml --evaluations 1 --steps 20 --rounds 5

The job must have run (its datasets and its newest checkpoint are used; nothing is written). Training steps and loader
are those of the job, pinned to some cores; evaluations run in the job's own actors, each pinned to one of the others,
one after the other for as long as a turn lasts. The aim: at least 95 % of the samples/s without. How much the turns
without differ among themselves is printed beside it: what is smaller than that, the run cannot tell.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.throughput import WARMUP, make_loader, make_step, measure, open_readers
from cluster.config import EVALUATION_RESOURCE
from cluster.session import session
from cluster.workers import WorkerContext
from pipeline.config import JobConfig, load_job
from pipeline.evaluation.actor import Assignment, EvaluationActor
from pipeline.evaluation.ledger import checkpoint_record
from pipeline.evaluation.runner import Runner
from pipeline.runs import read_record, run_path
from pipeline.training.checkpoints import list_checkpoints
from sharding.errors import UserError
from sharding.storage import open_storage

AIM = 0.95


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    parser.add_argument("--stage", type=int, default=0, help="number of the stage, from 0")
    parser.add_argument("--evaluations", type=int, default=1, help="at once, each on a core of its own")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns without and with, each")
    arguments = parser.parse_args()
    job = load_job(arguments.job)
    job = job.model_copy(update={"train": job.train.model_copy(update={"workers": 1})})
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= arguments.evaluations:
        raise UserError(f"--evaluations {arguments.evaluations}: this process has {len(cores)} cores")
    training, others = cores[: -arguments.evaluations], cores[-arguments.evaluations :]
    console = Console()
    tell_machine(training, others, console)
    assignments = rehearsals(job)
    cluster = job.cluster.model_copy(
        update={"address": None, "evaluations": arguments.evaluations, "object_store_mb": 128}
    )
    with session(cluster, workers=0):  # before the pinning, which its processes would inherit
        evaluators = start(others)
        os.sched_setaffinity(0, training)
        torch.set_num_threads(len(training))
        rounds = measure_rounds(job, arguments, evaluators, assignments)
    print_table(job, rounds, console)


@dataclass(frozen=True)
class Round:
    """Samples/s of a turn without evaluations and of one with, and how many ended during the latter."""

    without: float
    with_them: float
    evaluations: int


class Pinned:
    """The runner of evaluations, on one core."""

    def __init__(self, core: int) -> None:
        self._core = core

    def __call__(self) -> Runner:
        os.sched_setaffinity(0, {self._core})
        return Runner()


class Rehearsal(EvaluationActor):
    """The actor of evaluations, without the last step: nothing is written to the ledger."""

    def rehearse(self, assignment: Assignment) -> None:
        """Evaluate, intervals included, and forget."""
        assignment.outcome(self._evaluate(assignment))


def rehearsals(job: JobConfig) -> list[Assignment]:
    """Every task of the job on the newest checkpoint of its run."""
    storage = open_storage(job.storage)
    run = storage.at(run_path(job))
    record, checkpoints = read_record(run), list_checkpoints(run)
    if record is None or not checkpoints or not job.evaluate.tasks:
        raise UserError(
            f"{run.url} holds no run with a checkpoint and evaluate tasks: `glscl run` the job first"
        )
    datasets = {name: storage.resolve(path) for name, path in record["datasets"].items()}
    return [
        Assignment(
            run=run,
            checkpoint=checkpoints[-1],
            checkpoint_record=checkpoint_record(checkpoints[-1]),
            task=task,
            version="rehearsal",
            storage=storage,
            dataset=None if task.dataset_name is None else datasets[task.dataset_name],
            data_digest="",
            tokenizer=job.model.tokenizer,
            seed=job.seed,
            attempt=1,
            started=time.time(),
        )
        for task in job.evaluate.tasks
    ]


def start(cores: Sequence[int]) -> list[Any]:
    """An actor on each core, ready."""
    import ray

    actors = [
        ray.remote(Rehearsal).options(num_cpus=0, resources={EVALUATION_RESOURCE: 1}).remote(Pinned(core))
        for core in cores
    ]
    ray.get([actor.ready.remote() for actor in actors])
    return actors


@contextmanager
def running(evaluators: Sequence[Any], assignments: Sequence[Assignment]) -> Iterator[list[int]]:
    """Evaluations one after the other for the time of the block; gives a list that grows by one for each."""
    import ray

    over, done = threading.Event(), [0]

    def keep_busy() -> None:
        tasks = itertools.cycle(assignments)
        busy = {actor.rehearse.remote(next(tasks)): actor for actor in evaluators}
        while busy:
            ready, _ = ray.wait(list(busy), timeout=0.2)
            for reply in ready:
                ray.get(reply)
                actor = busy.pop(reply)
                if not over.is_set():
                    done[0] += 1
                    busy[actor.rehearse.remote(next(tasks))] = actor

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def measure_rounds(
    job: JobConfig,
    arguments: argparse.Namespace,
    evaluators: Sequence[Any],
    assignments: Sequence[Assignment],
) -> list[Round]:
    """Turns without and with; which goes first changes, lest a drift of the machine look like an effect."""
    stage = job.train.stages[arguments.stage]
    readers = open_readers(job, stage)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    context = WorkerContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, device=device
    )
    step = make_step(job, stage, context)
    for evaluator in evaluators:  # first touch of weights and data
        with running([evaluator], assignments):
            pass

    def turn() -> float:
        return measure(make_loader(job, stage, readers, arguments.steps + WARMUP), step)

    def turn_with() -> tuple[float, int]:
        with running(evaluators, assignments) as done:
            rate = turn()
            return rate, done[0]

    turn()
    rounds = []
    for number in range(arguments.rounds):
        if number % 2:
            rate, ended = turn_with()
            rounds.append(Round(turn(), rate, ended))
        else:
            without = turn()
            rounds.append(Round(without, *turn_with()))
    dist.destroy_process_group()
    return rounds


def tell_machine(training: Sequence[int], others: Sequence[int], console: Console) -> None:
    """Which cores do what, and what makes them less than independent."""
    console.print(f"training on cores {list(training)}, evaluations on {list(others)}", highlight=False)
    for core in others:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings = path.read_text().strip() if path.exists() else "unknown"
        if siblings != str(core):
            console.print(f"core {core} shares its physical core: siblings {siblings}", highlight=False)
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(
            f"other work runs on this machine (load {load:.1f}): the figures are of it too", highlight=False
        )


def print_table(job: JobConfig, rounds: Sequence[Round], console: Console) -> None:
    """Each round, the median of their ratios, and what the run can tell."""
    table = Table(title=f"{job.name}: samples/s of the training")
    for name in ("round", "without", "with", "with / without", "evaluations"):
        table.add_column(name, justify="right")
    ratios = [one.with_them / one.without for one in rounds]
    for number, (one, ratio) in enumerate(zip(rounds, ratios, strict=True), 1):
        table.add_row(
            str(number), f"{one.without:.1f}", f"{one.with_them:.1f}", f"{ratio:.1%}", str(one.evaluations)
        )
    console.print(table)
    rates = [one.without for one in rounds]
    noise = (max(rates) - min(rates)) / statistics.median(rates)
    median = statistics.median(ratios)
    console.print(
        f"median {median:.1%}; turns without differ by {noise:.1%} among themselves", highlight=False
    )
    if noise > 1 - AIM:
        console.print("that is too much to tell whether 5 % are lost: use a quiet machine", highlight=False)
    else:
        console.print(f"at least {AIM:.0%}: {'yes' if median >= AIM else 'no'}", highlight=False)


if __name__ == "__main__":
    main()
