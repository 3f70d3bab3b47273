"""The ``glscl`` command. Each verb parses its arguments and hands over; what it does lives in the module it calls."""

from __future__ import annotations

if __name__ == "__main__":  # python -m pipeline.cli: before anything is imported from the current folder
    from glscl_pipeline import main as command

    command()

import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from pipeline.checkpoints import checkpoints
from pipeline.environment import columns, settle_home, settle_output
from pipeline.redaction import Redacting, redact, redact_tracebacks, without_credentials
from pipeline.shards import shards

if TYPE_CHECKING:
    from pipeline.config import JobConfig

app = typer.Typer(
    name="glscl",
    help="Pre-train GLSCL: raw corpus -> shards -> DeepSpeed training -> evaluated checkpoints, tracked in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(shards)
app.add_typer(checkpoints)

JobFile = Annotated[Path, typer.Argument(help="The job's YAML file.", metavar="JOB.yaml", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Override a field, e.g. `train.stages.0.steps=100`. May be repeated.",
        show_default=False,
    ),
]
Address = Annotated[
    str,
    typer.Option(
        help="Address of the cluster's job server (Ray's dashboard). Default: `RAY_API_SERVER_ADDRESS`, else "
        "`http://127.0.0.1:8265`.",
        show_default=False,  # the variable's may hold a password
    ),
]
JobId = Annotated[str, typer.Argument(help="The id that `glscl submit` printed.", metavar="ID")]

DEFAULT_ADDRESS = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo lives.")] = Path("glscl-demo"),
    storage: Annotated[
        str | None,
        typer.Option(
            help="Object storage, e.g. `s3://bucket/prefix`. Default: a folder inside the demo's.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """The main job on a small real corpus (3D emoji), on this machine, in under ten minutes.

    Example: `glscl demo --storage s3://my-bucket/demo`
    """
    from pipeline.demo.run import run_demo

    run_demo(folder, storage, overrides, console())


@app.command()
def prepare(job: JobFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Turn the raw corpora of a job into training shards.

    Example: `glscl prepare job.yaml --set storage.url=s3://bucket/prefix`
    """
    from pipeline.job import prepare_job

    prepare_job(_load(job, overrides), console())


@app.command()
def run(job: JobFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Prepare, train and evaluate in one go; goes on by itself where an interrupted run stopped.

    Example: `glscl run job.yaml --set train.workers=8`
    """
    from pipeline.job import run_job

    run_job(_load(job, overrides), console())


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="The job's YAML file, or its run (`.../runs/NAME`): a path, `file://` or `s3://`.",
            metavar="RUN_OR_JOB",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="Only these tasks, e.g. `images,clips`. Default: all.", show_default=False),
    ] = None,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing",
            help="Every checkpoint without a result of a task as it is now, not those alone that the job says: after "
            "a task was changed or added.",
        ),
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Evaluate the checkpoints of a run that are not evaluated yet, and those whose evaluation failed.

    A run's address is enough: it knows its job as it was when it last began.

    Example: `glscl evaluate s3://bucket/runs/demo --tasks images --missing`
    """
    from pipeline.job import evaluate_job
    from pipeline.runs import load_run_job

    is_file = target.endswith((".yaml", ".yml")) or Path(target).is_file()
    config = _load(Path(target), overrides) if is_file else load_run_job(target, overrides)
    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    evaluate_job(config, console(), tasks=names, missing=missing)


@app.command()
def compare(
    first: Annotated[
        str,
        typer.Argument(
            help="A run (its newest evaluated checkpoint), or `RUN/checkpoints/step-00000480`: a path, `file://` or "
            "`s3://`.",
            metavar="A",
            show_default=False,
        ),
    ],
    second: Annotated[
        str, typer.Argument(help="The same, of the same run or another.", metavar="B", show_default=False)
    ],
    task: Annotated[
        list[str],
        typer.Option(help="Only this task. May be repeated. Default: all in common.", show_default=False),
    ] = [],  # noqa: B006 - typer copies it
    best: Annotated[
        str | None,
        typer.Option(
            help="Of runs: the best checkpoint by `TASK/METRIC`. Default: the newest evaluated one.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """Say whether checkpoint B is better than A, item by item, with a 95 % interval for every metric.

    Example: `glscl compare runs/one runs/two --task images --best images/t2i_R10`
    """
    from pipeline.evaluation.compare import compare as compare_checkpoints

    compare_checkpoints(first, second, console(), tasks=task, best=best, as_json=as_json)


@app.command()
def validate(job: JobFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Check a job's file as a whole, without starting anything.

    Example: `glscl validate job.yaml`
    """
    from pipeline.tokenizer import check_tokenizer

    config = _load(job, overrides)
    check_tokenizer(config, fetch=False)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps)" for stage in config.train.stages)
    console().print(
        f"{job} is valid: job '{config.name}', {len(config.datasets)} datasets, stages {stages}, "
        f"{config.train.workers} workers, ZeRO stage {config.train.zero_stage}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def plan(
    job: JobFile,
    device: Annotated[
        str | None,
        typer.Option(
            help="What a worker has, e.g. `a100-80gb`, or `cpu`; docs/planning.md lists them.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a device, e.g. `40GiB`. Default: the device's.", show_default=False)
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the device's peak that the steps reach.")
    ] = 0.4,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Say what a job needs: memory by ZeRO stage, steps, tokens, bytes read, time. Starts nothing, needs no GPU.

    Exit code 2 where a worker does not fit into its device, with what would.

    Example: `glscl plan job.yaml --device a100-80gb --set train.workers=8`
    """
    from pipeline.planning.command import plan as print_plan
    from pipeline.tokenizer import check_tokenizer

    config = _load(job, overrides)
    check_tokenizer(config, fetch=False)
    print_plan(config, console(), device=device, memory=memory, mfu=mfu)


@app.command()
def profile(
    job: JobFile,
    steps: Annotated[int, typer.Option(min=1, help="Steps in the trace, after two that warm up.")] = 20,
    out: Annotated[Path, typer.Option(help="The trace, for https://ui.perfetto.dev.")] = Path("trace.json"),
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train a few steps of a job under torch's profiler, from its newest checkpoint, and leave the run as it is.

    Example: `glscl profile job.yaml --steps 20 --out trace.json`
    """
    from pipeline.profiling.command import profile as profile_steps

    profile_steps(_load(job, overrides), console(), steps=steps, out=out)


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run (`.../runs/NAME`), or one of its checkpoints (`.../runs/NAME/checkpoints/step-00000480`): "
            "a path, `file://` or `s3://`.",
            metavar="CHECKPOINT",
            show_default=False,
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", metavar="DIR", show_default=False)],
    best: Annotated[
        str | None,
        typer.Option(
            help="Of a run: the best checkpoint by `TASK/METRIC`. Default: the newest whole one.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The model that the checkpoint was fine-tuned to for this task (VQA, NLVR2, retrieval), "
            "instead of the pre-trained one.",
            show_default=False,
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", help="The card's licence, e.g. `apache-2.0`. Default: none.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a checkpoint as a folder that `from_pretrained` opens, with a model card.

    Example: `glscl export s3://bucket/runs/demo demo-model --best images/t2i_R10`
    """
    from pipeline.export.folder import export as export_checkpoint

    export_checkpoint(checkpoint, folder, console(), best=best, task=task, license_=license_)


@app.command()
def align(
    image: Annotated[
        str,
        typer.Argument(help="An image, or a clip: a path or `s3://`.", metavar="IMAGE", show_default=False),
    ],
    caption: Annotated[str, typer.Argument(metavar="CAPTION", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="A folder that `glscl export` wrote, or a checkpoint or run as `glscl export` takes it.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("alignment.png"),
    resolution: Annotated[
        int | None,
        typer.Option(help="Side of what the model sees, pixels. Default: the model's.", show_default=False),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames taken from a clip.")] = 4,
) -> None:
    """Draw which regions of an image each word of a caption attends to.

    Example: `glscl align photo.jpg "a dog on a sofa" --model demo-model --out dog.png`
    """
    from pipeline.alignment.command import align as draw

    draw(image, caption, model, out, console(), resolution=resolution, frames=frames)


@app.command()
def scenes(
    out: Annotated[
        str,
        typer.Argument(help="An empty folder, `file://` or `s3://` url.", metavar="OUT", show_default=False),
    ],
    objects: Annotated[
        str | None,
        typer.Option(
            help="Table of cut-outs (`objects.jsonl`): a path or url. Default: the bundled emoji.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="`train`, `val` or `test`, also with a count (`train=5000`). May be repeated. Default: all.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Images (videos, statements) of a split in each task.")
    ] = 500,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="`retrieval`, `video`, `vqa`, `nlvr2`, `classification` or `alignment`. May be repeated. "
            "Default: all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything but the split.")] = 0,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="Another rule of the scenes, e.g. `vocabulary=64`, `width=128`; docs/scenes.md lists them. "
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    dissent: Annotated[
        float, typer.Option(min=0, max=0.3, help="Share of VQA annotators who say something else.")
    ] = 0.05,
    endpoint_url: Annotated[
        str | None, typer.Option(help="S3 endpoint; default: AWS_ENDPOINT_URL, then AWS.", show_default=False)
    ] = None,
) -> None:
    """Write evaluation sets with perfect ground truth for every task, in the tasks' official formats.

    Example: `glscl scenes s3://bucket/scenes --split train=2000 --split test=500 --rule vocabulary=64`
    """
    from pipeline.scenes.command import scenes as write

    write(out, console(), objects, split, count, task, seed, rule, dissent, endpoint_url)


@app.command("verify-epoch")
def verify_epoch(
    run: Annotated[
        str,
        typer.Argument(
            help="A run (`.../runs/NAME`), also one in progress, or one of its checkpoints: a path, `file://` or `s3://`.",
            metavar="RUN",
            show_default=False,
        ),
    ],
    epoch: Annotated[
        int | None,
        typer.Option(min=0, help="Only this epoch of each dataset, from 0.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """Prove what a run was trained on, over all its crashes and restarts: each sample once an epoch.

    Computes from the run's configuration and manifests what each global batch had to hold, and compares it with
    the consumption ledger that the workers kept. Exit code 1 where they differ or the ledger has gaps.

    Example: `glscl verify-epoch s3://bucket/runs/demo`
    """
    from pipeline.training.verify_epoch import verify_epoch as verify

    if not verify(run, console(), epoch=epoch, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def submit(
    job: JobFile,
    address: Address = DEFAULT_ADDRESS,
    job_id: Annotated[str | None, typer.Option("--id", help="The job's id; default: made by Ray.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Send a job to a running Ray cluster, with the code and its environment.

    Paths in the job must be absolute, and mean the same on the cluster's machines.

    Example: `glscl submit job.yaml --address http://head:8265`
    """
    from cluster import jobs
    from pipeline import submission
    from pipeline.yaml_reader import read_content

    content = read_content(job)
    config = submission.load_for_cluster(job, overrides, content)
    submitted = jobs.submit(
        job,
        address,
        content=content,
        job_id=job_id,
        arguments=["run", jobs.STAGED_YAML, *(part for one in overrides for part in ("--set", one))],
        environment=config.cluster.environment,
        variables=submission.variables(config, os.environ),
        modules=submission.modules_of_filters(config),
    )
    out = console()
    out.print(f"submitted as {submitted}", highlight=False)
    shown = without_credentials(address)
    out.print(f"  glscl status {submitted} --address {shown}", highlight=False, soft_wrap=True, markup=False)
    out.print(f"  glscl logs -f {submitted} --address {shown}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def status(job_id: JobId, address: Address = DEFAULT_ADDRESS) -> None:
    """Say how a submitted job is doing.

    Example: `glscl status raysubmit_x --address http://head:8265`
    """
    from cluster import jobs

    report = jobs.status(address, job_id)
    line = f"{report.job_id}  {report.status}"
    if report.started is not None:
        seconds = max(0.0, (report.ended or time.time()) - report.started)  # the cluster's clock may differ
        line += f"  {'took' if report.finished else 'for'} {timedelta(seconds=round(seconds))}"
    console().print(f"{line}  {report.message}".rstrip(), highlight=False, markup=False)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Print the output of a submitted job.

    Example: `glscl logs -f raysubmit_x --address http://head:8265`
    """
    from cluster import jobs

    try:
        for line in jobs.logs(address, job_id, follow=follow):
            print(line, flush=True)
    except KeyboardInterrupt:
        sys.stderr.write(f"the job goes on; it ends with glscl stop {job_id}\n")
        raise typer.Exit(130) from None


@app.command()
def stop(job_id: JobId, address: Address = DEFAULT_ADDRESS) -> None:
    """Stop a submitted job; its run can be continued by submitting it again.

    Example: `glscl stop raysubmit_x --address http://head:8265`
    """
    from cluster import jobs

    console().print(f"{job_id}  {jobs.stop(address, job_id).status}", highlight=False, markup=False)


def console() -> Console:
    """Where people read: standard output; 100 columns where it is no terminal, so that tables do not fold."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else columns())


def _load(path: Path, overrides: list[str]) -> JobConfig:
    from pipeline.config import load_job

    return load_job(path, overrides)


def main() -> None:
    """Entry point: user mistakes end with one clear line and exit code 2, what stopped the job with 1."""
    from cluster.errors import ClusterError, WorkerGroupError
    from cluster.loopback import ask_loopback_directly
    from pipeline.errors import Regressed, RunTakenOver, Unhealthy, system_fault
    from sharding.errors import BadData, BadDataLimit, StorageFault, UserError
    from sharding.prepare import TaskFailed

    settle_output()
    redact_tracebacks()
    handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    handler.addFilter(Redacting())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    for room in ("pipeline", "sharding", "cluster", "model"):
        logging.getLogger(room).setLevel(logging.INFO)
    ask_loopback_directly()
    try:
        settle_home()
        app()
    except (UserError, ClusterError) as error:
        _fail(str(error), 2)
    except (
        *(
            BadData,
            BadDataLimit,
            Regressed,
            RunTakenOver,
            StorageFault,
            TaskFailed,
            Unhealthy,
            WorkerGroupError,
        ),
    ) as error:
        _fail(str(error), 1)
    except OSError as error:
        if error.errno is None:
            raise  # not the system's: a bug
        _fail(system_fault(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped", 130)


def _fail(message: str, code: int) -> None:
    for line in redact(message).splitlines():
        sys.stderr.write(f"error: {line}\n")
    sys.exit(code)
