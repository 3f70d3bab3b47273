"""``glscl checkpoints``: listing a run's checkpoints, checking them, clearing away, converting to whole tensors.

With ``--json`` standard output is one JSON value, and progress goes to standard error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.progress import show_progress
from pipeline.shards import AsJson
from sharding.errors import BadData, UserError

if TYPE_CHECKING:
    from pipeline.config import JobConfig
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage

checkpoints = typer.Typer(
    name="checkpoints",
    help="List, verify, prune and convert the checkpoints of a run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

RunUrl = Annotated[
    str,
    typer.Argument(
        help="A run (`.../runs/NAME`): a path, `file://` or `s3://`.", metavar="RUN", show_default=False
    ),
]


@checkpoints.command("ls")
def list_command(run: RunUrl, as_json: AsJson = False) -> None:
    """List a run's checkpoints, and what keeps each from being cleared away.

    Example: `glscl checkpoints ls s3://bucket/birds/runs/birds`
    """
    from pipeline.training.checkpoints import remains

    standing = _standing(run)
    rows = [_row(standing, checkpoint) for checkpoint in standing.checkpoints]
    left = remains(standing.run, standing.checkpoints)
    if as_json:
        print(json.dumps({"checkpoints": rows, "remains": left}, indent=2))
        return
    console = _console()
    table = Table("step", "stage", "workers", "ZeRO", "size", "digest", "kept as", box=box.SIMPLE)
    for row in rows:
        kept = ", ".join(row["kept_as"]) or "[dim]nothing[/dim]"
        size = f"{row['bytes'] / 2**20:,.1f} MiB"
        columns = (
            row["step"],
            row["stage"],
            row["workers"],
            row["zero_stage"],
            size,
            row["digest"][:12],
            kept,
        )
        table.add_row(*map(str, columns))
    console.print(table)
    for path in left:
        console.print(f"left by a killed write: {standing.run.url_of(path)}", highlight=False, soft_wrap=True)


@checkpoints.command()
def verify(
    run: RunUrl,
    step: Annotated[int | None, typer.Option(min=1, help="Only this one.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a run's checkpoints again and compare size and sha256; exit code 1 if one is damaged.

    Example: `glscl checkpoints verify s3://bucket/birds/runs/birds`
    """
    standing = _standing(run)
    chosen = _chosen(standing, step)
    faults = []
    with show_progress(Console(stderr=True), "verifying", sum(len(one.files) for one in chosen)) as task:
        done = 0
        for checkpoint in chosen:
            for name in checkpoint.files:
                fault = _fault(standing.run, checkpoint, name)
                if fault is not None:
                    faults.append({"step": checkpoint.step, "file": name, "fault": fault})
                done += 1
                task.update(done, f"step {checkpoint.step}")
    if as_json:
        print(json.dumps({"checkpoints": len(chosen), "faults": faults}, indent=2))
    else:
        console = _console()
        for found in faults:
            console.print(f"step {found['step']}: {found['fault']}", highlight=False, soft_wrap=True)
        good = len(chosen) - len({found["step"] for found in faults})
        console.print(f"{good} of {len(chosen)} checkpoints are what was committed", highlight=False)
    if faults:
        raise typer.Exit(1)


@checkpoints.command()
def prune(
    run: RunUrl,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, help="Default: the job's `checkpoints.keep_last`.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the checkpoints that no rule keeps, and what killed writes have left.

    Kept are those that the job's `checkpoints` block keeps: the newest, every so many steps, the ends of stages, the
    best; and those that wait for an evaluation.

    Example: `glscl checkpoints prune s3://bucket/birds/runs/birds --dry-run`
    """
    from pipeline.training.checkpoints import delete_checkpoint, remains

    standing = _standing(run, keep_last)
    gone = [one for one in standing.checkpoints if not standing.reasons(one)]
    left = remains(standing.run, standing.checkpoints)
    size = sum(one.size for one in gone)
    if not dry_run:
        for one in gone:
            delete_checkpoint(standing.run, one)
        for path in left:
            standing.run.delete(path, recursive=True)
    if as_json:
        value = {"deleted": [one.step for one in gone], "bytes": size, "remains": left, "dry_run": dry_run}
        print(json.dumps(value, indent=2))
        return
    verb = "would delete" if dry_run else "deleted"
    steps = ", ".join(str(one.step) for one in gone) or "none"
    _console().print(
        f"{verb} checkpoints of steps: {steps} ({size / 2**20:,.1f} MiB), and what {len(left)} killed writes left",
        highlight=False,
    )


@checkpoints.command()
def convert(
    run: RunUrl,
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.", show_default=False)],
    step: Annotated[int | None, typer.Option(min=1, help="Default: the newest.", show_default=False)] = None,
) -> None:
    """Put a checkpoint's pieces together: whole fp32 weights and AdamW moments by parameter, as safetensors.

    For other programs: this one goes on from a checkpoint with any number of workers at any ZeRO stage as it is, and
    `glscl export` makes a Hugging Face model of it.

    Example: `glscl checkpoints convert s3://bucket/birds/runs/birds whole --step 1000`
    """
    from pipeline.training.checkpoints.whole import write_whole

    standing = _standing(run)
    checkpoint = standing.checkpoints[-1] if step is None else _chosen(standing, step)[0]
    if out.exists():
        raise UserError(f"{out} is there already: name a folder that is not")
    try:
        written = write_whole(standing.run, checkpoint, out)
    except BadData as error:
        shutil.rmtree(out, ignore_errors=True)
        raise UserError(f"{standing.run.url_of(checkpoint.path)} is damaged: {error.detail}") from None
    console = _console()
    for path in written:
        console.print(f"{path}  {path.stat().st_size / 2**20:,.1f} MiB", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Standing:
    """A run's checkpoints, and what keeps each."""

    run: Storage
    job: JobConfig
    checkpoints: list[Checkpoint]
    waiting: set[int]
    best: int | None
    keep_last: int

    def reasons(self, checkpoint: Checkpoint) -> list[str]:
        """Why retention does not take it."""
        rules, step = self.job.checkpoints, checkpoint.step
        reasons = {
            "newest": checkpoint in self.checkpoints[-self.keep_last :],
            "end of a stage": bool(checkpoint.record.get("stage_end")),
            f"every {rules.keep_every}": rules.keep_every is not None and step % rules.keep_every == 0,
            f"best {rules.keep_best}": step == self.best,
            "waits for an evaluation": step in self.waiting,
        }
        return [reason for reason, holds in reasons.items() if holds]


def _standing(address: str, keep_last: int | None = None) -> _Standing:
    from pipeline.evaluation.ledger import Ledger, best_outcome
    from pipeline.evaluation.schedule import Schedule
    from pipeline.runs import load_run_job
    from pipeline.training.checkpoints import list_checkpoints
    from sharding.storage import open_storage

    job = load_run_job(address)
    run = open_storage(address)
    found = list_checkpoints(run)
    if not found:
        raise UserError(f"{run.url} holds no checkpoint yet")
    ledger, schedule = Ledger(run), Schedule(job.evaluate)
    over = found[-1].step == job.train.total_steps
    settled = {(key.digest, key.task) for key, state in ledger.states().items() if not state.open}
    waiting = {
        checkpoint.step
        for task in schedule.tasks
        for checkpoint in schedule.due(task, found, over=over)
        if (checkpoint.digest[:16], task.name) not in settled  # as evaluations are named
    }
    best = best_outcome(ledger.outcomes(), job.checkpoints.keep_best) if job.checkpoints.keep_best else None
    return _Standing(
        run=run,
        job=job,
        checkpoints=found,
        waiting=waiting,
        best=None if best is None else best.step,
        keep_last=keep_last or job.checkpoints.keep_last,
    )


def _row(standing: _Standing, checkpoint: Checkpoint) -> dict[str, Any]:
    record = checkpoint.record
    return {
        "step": checkpoint.step,
        "stage": record.get("stage_name", str(checkpoint.stage)),
        "workers": record["world_size"],
        "zero_stage": record["zero_stage"],
        "bytes": checkpoint.size,
        "digest": checkpoint.digest,
        "url": standing.run.url_of(checkpoint.path),
        "kept_as": standing.reasons(checkpoint),
    }


def _chosen(standing: _Standing, step: int | None) -> list[Checkpoint]:
    chosen = [one for one in standing.checkpoints if step in (None, one.step)]
    if not chosen:
        steps = ", ".join(str(one.step) for one in standing.checkpoints)
        raise UserError(f"--step {step}: {standing.run.url} has checkpoints of steps {steps}")
    return chosen


def _fault(run: Storage, checkpoint: Checkpoint, name: str) -> str | None:
    """What is wrong with a file; None: it is what was committed."""
    expected, path = checkpoint.files[name], f"{checkpoint.path}/{name}"
    try:
        with run.open(path) as file:
            digest = hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
            size = file.tell()
    except FileNotFoundError:
        return f"{run.url_of(path)} is missing"
    if (size, digest) != (expected["size"], expected["sha256"]):
        return f"{run.url_of(path)} is not what was committed"
    return None


def _console() -> Console:
    from pipeline.cli import console

    return console()
