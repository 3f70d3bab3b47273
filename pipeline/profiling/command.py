"""``glscl profile``: a trace of some steps, and a table of what their phases took."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from pathlib import Path

from rich.console import Console

from cluster.session import session
from cluster.workers import run_workers
from pipeline.config import JobConfig
from pipeline.errors import NonFiniteLoss
from pipeline.planning.schedule import datasets
from pipeline.profiling.phases import phase_table, phases_of
from pipeline.profiling.worker import WARM_UP, ProfileRequest, profile_worker
from pipeline.runs import run_path
from pipeline.scratch import check_scratch
from pipeline.tokenizer import check_tokenizer
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.loop import TrainingPlan
from pipeline.training.pretraining import PretrainingSubject
from sharding.errors import BadDataLimit, StorageFault, UserError
from sharding.storage import open_storage


def profile(job: JobConfig, console: Console, *, steps: int, out: Path) -> None:
    """Trace ``steps`` steps, from the run's newest checkpoint or (before the first, or after the last) the beginning.

    Nothing of the run is written: no checkpoint, no metric, no account of its time.

    Raises:
        UserError: a dataset is not prepared yet; ``out`` cannot be written.
    """
    check_scratch()
    check_tokenizer(job, fetch=True)
    storage = open_storage(job.storage)
    storage.check(write=True)
    found, _ = datasets(job, storage)
    for data in found.values():
        if data.where is None:
            raise UserError(f"datasets.{data.name} is not prepared yet: glscl prepare the job first")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: {out.absolute().parent} is no folder")
    run = storage.at(run_path(job))
    done = max((checkpoint.step for checkpoint in list_checkpoints(run)), default=0)
    folder = f"profiles/{uuid.uuid4().hex}"
    place = storage.at(folder)
    if done >= job.train.total_steps:
        run, done = place, 0
    scratch = Path(tempfile.mkdtemp(prefix="glscl-profile-"))
    plan = TrainingPlan(
        subject=PretrainingSubject(job, {name: str(data.where) for name, data in found.items()}),
        course=job.train,
        seed=job.seed,
        run=run,
        checkpoint_every=job.checkpoints.every,
        tracking=job.tracking.resolved(Path.cwd()),
        tracking_key="profile",
        tracking_run=None,
        scratch=scratch,
    )
    console.print(f"profiling {steps} steps after {WARM_UP} more, from step {done}", highlight=False)
    try:
        with session(job.cluster, workers=job.train.workers):
            run_workers(
                profile_worker,
                ProfileRequest(plan, steps, place, "trace.json"),
                workers=job.train.workers,
                config=job.cluster,
                name=f"profile-{job.name}",
                max_failures=0,
                scratch=scratch / "ray",
                no_retry=(ValueError, NonFiniteLoss, BadDataLimit, StorageFault),
            )
        if not place.exists("trace.json"):
            raise UserError(f"the job has no {WARM_UP + 1} steps left after step {done}: nothing to profile")
        out.write_bytes(place.read_bytes("trace.json"))
    finally:
        storage.delete(folder, recursive=True)
        shutil.rmtree(scratch, ignore_errors=True)
    phases = phases_of(json.loads(out.read_text(encoding="utf-8")))
    traced = next(phase.count for phase in phases if phase.name == "step")
    console.print(phase_table(phases, f"{job.name}, worker 0 of {job.train.workers}, {traced} steps"))
    console.print(f"{out}: open it at https://ui.perfetto.dev", highlight=False, soft_wrap=True)
