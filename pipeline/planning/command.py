"""``glscl plan``: parameters, memory, schedule, data and time of a job, and whether it fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from rich.console import Console
from rich.table import Table

from model import GLSCLConfig
from pipeline.config import JobConfig
from pipeline.goodput.devices import DEVICES, GIB, PRODUCTS, Device, Number, matmul_rate
from pipeline.planning.advice import Planner, changed, offload
from pipeline.planning.memory import Memory
from pipeline.planning.schedule import Data, cache_needed, datasets, steps_by_dataset
from pipeline.planning.simulation import StepFlops, meta_model
from pipeline.training.config import TrainBlock
from pipeline.training.loading import PREFETCHED_BATCHES
from sharding.errors import UserError
from sharding.storage import open_storage

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"([0-9.]+)\s*([kmgt]i?|)b?", re.IGNORECASE)
_PARTS = {
    "text encoder": "glscl.text_encoder.",
    "vision encoder": "glscl.vision_encoder.",
    "fusion": "glscl.",
    "heads": "",
}


@dataclass(frozen=True)
class Target:
    """The device that a job is planned for. ``memory``: bytes; ``peak``: FLOP/s; None: not told."""

    kind: str
    memory: int | None
    peak: float | None
    told: str


def plan(job: JobConfig, console: Console, *, device: str | None, memory: str | None, mfu: float) -> None:
    """Print the plan.

    Args:
        device: a name of ``devices.DEVICES``, or ``cpu``; None: nothing is compared with a device.
        memory: of a device, e.g. ``80GiB``; None: the device's own.
        mfu: share of the device's peak that the steps reach.

    Raises:
        UserError: the workers need more than the device has; says what would fit. Also: unknown device or size.
    """
    train = job.train
    target = _target(device, memory, train.precision)
    storage = open_storage(job.storage)  # not checked: it need not be there yet
    planner = Planner(job, target.kind)
    found, manifests = datasets(job, storage)
    needed = planner.memory(train)

    console.print(_parameters(planner.config))
    console.print(_memory_table(planner, train, target))
    console.print(_stages(job, planner, target, mfu))
    console.print(_data(list(found.values())))
    remote = {name: manifest for name, manifest in manifests.items() if found[name].remote}
    for line in _remarks(planner, train, needed, cache_needed(job, remote, 1) if remote else 0):
        console.print(line, highlight=False)
    if target.memory is not None:
        _refuse(planner, needed, target)


def size(text: str) -> int:
    """Bytes of ``80GiB``, ``40 GB`` or ``1073741824``.

    Raises:
        UserError: it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2].lower()])
    except (AssertionError, ValueError):
        raise UserError(f"--memory: got '{text}'; must be a size such as 80GiB") from None


def _target(device: str | None, memory: str | None, precision: str) -> Target:
    limit = None if memory is None else size(memory)
    number: Number = PRODUCTS[precision]
    if device is None:
        return Target("cuda", limit, None, "a GPU")
    if device == "cpu":
        return Target(
            "cpu", limit, matmul_rate(torch.device("cpu"), number), "this machine's cores, measured"
        )
    known: Device | None = next((each for each in DEVICES if each.name == device), None)
    if known is None:
        names = ", ".join(each.name for each in DEVICES)
        raise UserError(f"--device: got '{device}'; must be cpu or one of {names}")
    if number not in known.peak:
        raise UserError(f"--device: {device} has no {number}, which train.precision: {precision} needs")
    return Target("cuda", limit or known.memory, known.peak[number], device)


def _parameters(config: GLSCLConfig) -> Table:
    counts = dict.fromkeys(_PARTS, 0)
    for name, parameter in meta_model(config).named_parameters():
        part = next(part for part, prefix in _PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    table = _table("parameters", "part", "parameters")
    for part, number in counts.items():
        table.add_row(part, f"{number:,}")
    table.add_section()
    table.add_row("all", f"{sum(counts.values()):,}")
    return table


def _memory_table(planner: Planner, train: TrainBlock, target: Target) -> Table:
    work = planner.fullest(train)
    shape = work.shape
    table = _table(
        f"memory of a worker in GiB, {train.workers} workers, {train.precision}, stage '{work.stage.name}': "
        f"{shape.samples} samples at once, {shape.frames} x {shape.resolution} px",
        "ZeRO",
        *("weights", "optimizer", "gradients", "activations", "rest", "all", "with checkpointing", "host"),
    )
    for name, zero in _ways(train):
        row = [name]
        plain = _with(planner, train, zero, checkpointing=False)
        saving = _with(planner, train, zero, checkpointing=True)
        if plain is None or saving is None:
            continue
        shown = saving if train.activation_checkpointing else plain
        parts = dict(shown.worker)
        named = [parts.pop(part, 0) for part in ("weights", "optimizer", "gradients", "activations")]
        row += [_gib(number) for number in (*named, sum(parts.values()))]
        row += [_fit(memory, target) for memory in (plain, saving)]
        table.add_row(*row, _gib(sum(shown.host.values())))
    return table


def _ways(train: TrainBlock) -> list[tuple[str, dict[str, object] | None]]:
    """As the job has it (None), then every stage, and what may be in the host's memory."""
    ways: list[tuple[str, dict[str, object] | None]] = [(f"{train.zero_stage}, as it is", None)]
    kept = {"offload_optimizer": None, "offload_param": None}
    ways += [(str(stage), {"stage": stage, **kept}) for stage in range(4)]
    ways += [(f"{stage}, optimizer on the host", {**kept, **offload(stage)}) for stage in (1, 2, 3)]
    return [*ways, ("3, weights too", offload(3, weights=True))]


def _with(
    planner: Planner, train: TrainBlock, zero: dict[str, object] | None, *, checkpointing: bool
) -> Memory | None:
    change: dict[str, object] = {"activation_checkpointing": checkpointing}
    block = changed(train, change | ({} if zero is None else {"zero": zero}))
    return None if block is None else planner.memory(block)


def _stages(job: JobConfig, planner: Planner, target: Target, mfu: float) -> Table:
    """Steps, samples, tokens, FLOPs and time of each stage."""
    train = job.train
    counted = StepFlops(planner.config, train.workers)
    table = _table(
        "schedule"
        if target.peak is None
        else f"schedule; time on {train.workers} x {target.told} at {mfu:.0%} MFU",
        "stage",
        *("steps", "samples", "text tokens", "patches", "FLOPs", "time"),
    )
    seconds, works = 0.0, planner.work(train)
    for stage in train.stages:
        batch = stage.global_batch or train.global_batch
        patches, flops = 0, 0.0
        for name, steps in steps_by_dataset(job, stage).items():
            modality = job.datasets[name].modality
            shape = next(w.shape for w in works if w.stage is stage and w.modality == modality)
            patches += steps * batch * shape.frames * (shape.resolution // planner.config.patch_size) ** 2
            objectives = {str(key): weight for key, weight in stage.objectives.items()}
            flops += steps * train.accumulation * train.workers * counted.of(shape, objectives)
        again = (1 + int(train.activation_checkpointing) / 3) * (4 / 3 if train.parts(stage) > 1 else 1)
        spent = flops * again / (mfu * target.peak * train.workers) if target.peak else 0.0
        seconds += spent
        samples = stage.steps * batch
        texts = samples * planner.config.max_text_length
        row = (f"{stage.steps:,}", f"{samples:,}", f"{texts:.3g}", f"{patches:.3g}", f"{flops:.3g}")
        table.add_row(stage.name, *row, _duration(spent) if target.peak else "")
    table.add_section()
    table.add_row("all", f"{train.total_steps:,}", *([""] * 4), _duration(seconds) if target.peak else "")
    return table


def _data(found: Sequence[Data]) -> Table:
    table = _table(
        "data", "dataset", *("samples", "shown", "epochs", "GB of an epoch", "GB read in all", "known from")
    )
    for data in found:
        epoch = "" if data.samples is None else f"{data.samples * data.sample_bytes / 1e9:,.3g}"
        table.add_row(
            data.name,
            "?" if data.samples is None else f"{data.samples:,}",
            f"{data.shown:,}",
            "?" if data.epochs is None else f"{data.epochs:,.2f}",
            epoch,
            f"{data.egress / 1e9:,.3g}",
            "its shards" if data.where else "a rule of thumb: not prepared",
        )
    table.columns[-1].justify = "left"
    return table


def _remarks(planner: Planner, train: TrainBlock, needed: Memory, cache: int) -> list[str]:
    work = planner.fullest(train)
    pixels = work.shape.samples * work.shape.parts * work.shape.frames * 3 * work.shape.resolution**2
    buffers = train.loader_processes * (PREFETCHED_BATCHES + 2) * pixels
    remarks = [
        f"host memory: {_gib(buffers)} GiB a worker for batches on their way, "
        f"{_gib(sum(needed.host.values()))} GiB a worker of what is offloaded; each of its "
        f"{train.loader_processes} loader processes and the worker itself hold their libraries besides",
    ]
    if cache:
        remarks.append(
            f"cache: train.cache_mb of at least {-(-cache // 2**20):,} a node with one worker; now {train.cache_mb:,}"
            + ("" if train.cache_mb else " (samples are read by range)")
        )
    return remarks


def _refuse(planner: Planner, needed: Memory, target: Target) -> None:
    assert target.memory is not None
    if needed.total <= target.memory:
        return
    lines = [
        f"a worker needs {_gib(needed.total)} GiB at its fullest ({needed.moment}); "
        f"{target.told} has {_gib(target.memory)} GiB"
    ]
    fitting = planner.suggestions(target.memory)
    lines += [f"fits: {told} ({_gib(memory.total)} GiB)" for told, memory in fitting]
    if not fitting:
        lines.append(
            "nothing that is known here makes it fit: a smaller model, resolution or global batch does"
        )
    raise UserError("\n".join(lines))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _fit(memory: Memory, target: Target) -> str:
    text = _gib(memory.total)
    return f"[red]{text}[/red]" if target.memory is not None and memory.total > target.memory else text


def _gib(number: float) -> str:
    return f"{number / GIB:,.2f}" if number else "0"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
