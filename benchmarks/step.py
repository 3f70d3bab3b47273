"""Speed, memory and FLOPs of one training step (forward and backward), against the plain way of computing it.

    python -m benchmarks.step --threads 2                        # tiny and base, 224 and 288 pixels
    python -m benchmarks.step --presets base --sizes 288 --rounds 3

For each model and size three ways take turns in one process, on the same parameters, inputs and masks:
``literal`` (``benchmarks/literal.py``: a pass for each objective, eager attention, text padded to 50), ``fp32`` and
``bf16`` (the model, the latter in autocast). The ratios and the share of the matmul rate are what to quote: both
sides of each were measured in this run, minutes apart at most. Dropout is off, so that the losses can be compared.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.literal import LiteralStep
from model import OBJECTIVES, GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor, draw_masks

# torch counts its fused attention on CUDA only; on CPU it is the same products.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
WEIGHTS = dict(zip(OBJECTIVES, (0.5, 1.0, 1.0, 1.0, 0.2), strict=True))
WAYS = ("literal", "fp32", "bf16")
PARTS = ("vision", "text", "fusion", "objectives", "backward")
CAPTIONS = (
    "a man riding a wave on top of a surfboard",
    "two dogs play with a yellow frisbee in the park while their owner watches from a bench",
    "a kitchen with a stove, a microwave and a refrigerator",
    "several people wait at the corner of a busy street for the light to change",
    "a plate of food with broccoli and rice",
    "the old train pulls into a small station between snowy mountains late in the afternoon",
    "a close up of a cat lying on a laptop keyboard",
    "a woman in a red coat holds an umbrella",
)


@dataclass
class Measured:
    """What one way of computing the step took."""

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    peak_gib: float = 0.0
    flops: float = 0.0

    @property
    def best(self) -> float:
        """Seconds of the quickest step: what the machine can do when nobody disturbs it."""
        return min(self.seconds)


def main() -> None:
    """Measure and print one table for each model and size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "base"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 288], help="pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=WAYS, help="literal must be one of them"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--devices", nargs="+", default=["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    )
    parser.add_argument(
        "--profile", action="store_true", help="also where the time of each way goes, by operator"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for device in arguments.devices:
        for preset in arguments.presets:
            for size in arguments.sizes:
                results, rates = measure(
                    preset,
                    size,
                    arguments.batch,
                    arguments.rounds,
                    torch.device(device),
                    arguments.ways,
                    profiled=arguments.profile,
                )
                print_table(
                    f"{preset}, {size} px, batch {arguments.batch}, {device}", arguments, results, rates
                )


def measure(
    preset: str,
    size: int,
    batch: int,
    rounds: int,
    device: torch.device,
    ways: Sequence[str] = WAYS,
    *,
    profiled: bool = False,
) -> tuple[dict[str, Measured], dict[torch.dtype, float]]:
    """Times of all ways, in turns, and the matmul rates (FLOP/s) around them."""
    config = GLSCLConfig.preset(preset, image_size=size, hidden_dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(0)
    model = GLSCLForPreTraining(config).to(device).train()
    padded, trimmed = make_inputs(config, batch, device)
    literal = LiteralStep(model)
    steps: dict[str, Callable[[], tuple[Tensor, dict[str, Tensor]]]] = {
        "literal": lambda: _literal_loss(literal, padded),
        "fp32": lambda: _loss(model, trimmed, device, torch.float32),
        "bf16": lambda: _loss(model, trimmed, device, torch.bfloat16),
    }
    results = {way: Measured() for way in ways}
    rates: dict[torch.dtype, float] = {}
    for way in ways:
        _weigh(model, steps[way], results[way], device)
    for _ in range(rounds):
        for dtype in (torch.float32, torch.bfloat16):
            rates[dtype] = max(rates.get(dtype, 0.0), matmul_rate(dtype, device))
        for way in ways:
            _time(model, steps[way], results[way], device)
    if profiled:
        for way in ways:
            _profile(model, steps[way], way)
    return results, rates


def make_inputs(
    config: GLSCLConfig, batch: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same samples with text padded to the limit and trimmed to the longest caption."""
    processor = GLSCLProcessor.from_config(config)
    text = processor.tokenize([CAPTIONS[number % len(CAPTIONS)] for number in range(batch)])
    length = text["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    valid = torch.ones(batch, dtype=torch.bool)
    pads = {"input_ids": config.pad_token_id, "attention_mask": 0, "word_ids": -1}
    missing = config.max_text_length - length
    full = {name: nn.functional.pad(text[name], (0, missing), value=pad) for name, pad in pads.items()}
    masks = draw_masks(
        config,
        full["input_ids"],
        full["attention_mask"],
        full["word_ids"],
        valid,
        list(range(batch)),
        batch,
        config.num_patches,
    ).to(device)
    shared = {
        "pixel_values": pixels.to(device),
        "valid": valid.to(device),
        "objectives": WEIGHTS,
        "group_size": batch,
    }
    names = ("input_ids", "attention_mask")
    padded = {**shared, **{name: full[name].to(device) for name in names}, "masks": masks}
    trimmed = {**shared, **{name: text[name].to(device) for name in names}, "masks": masks.trimmed(length)}
    return padded, trimmed


def _literal_loss(literal: LiteralStep, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    losses = literal(**inputs)
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum(), losses


def _loss(
    model: GLSCLForPreTraining, inputs: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    half = dtype != torch.float32
    with torch.autocast(device.type, dtype=dtype) if half else nullcontext():
        output = model(**inputs)
    return output.loss, output.losses


def _weigh(
    model: GLSCLForPreTraining,
    step: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    measured: Measured,
    device: torch.device,
) -> None:
    """Memory and FLOPs of a step, not timed: fresh memory costs time that a second step no longer pays."""
    model.zero_grad()
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    peak = reset_peak(device)
    with counter:
        loss, losses = step()
        loss.backward()
    measured.peak_gib = peak()
    measured.flops = float(counter.get_total_flops())
    measured.losses = {name: float(value.detach()) for name, value in losses.items()}


def _time(
    model: GLSCLForPreTraining,
    step: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    measured: Measured,
    device: torch.device,
) -> None:
    """One timed step."""
    model.zero_grad()
    with _part_clocks(model, device) as seconds:
        started = _now(device)
        loss, _ = step()
        forward = _now(device)
        loss.backward()
        ended = _now(device)
    measured.seconds.append(ended - started)
    seconds["objectives"] = forward - started - sum(seconds.values())
    seconds["backward"] = ended - forward
    for name, value in seconds.items():
        measured.parts.setdefault(name, []).append(value)


def _profile(
    model: GLSCLForPreTraining, step: Callable[[], tuple[Tensor, dict[str, Tensor]]], way: str
) -> None:
    """Print the operators that take at least a hundredth of a step."""
    model.zero_grad()
    with torch.profiler.profile() as profiler:
        step()[0].backward()
    operators = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in operators)
    print(f"{way}: share of the time on the CPU, calls, operator")
    for row in operators:
        if (share := row.self_cpu_time_total / total) >= 0.01:
            print(f"{share:7.1%} {row.count:6d}  {row.key}")


@contextmanager
def _part_clocks(model: GLSCLForPreTraining, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in the forward of the encoders and the fusion (the literal way calls none of them)."""
    backbone = model.glscl
    seconds: dict[str, float] = {}
    hooks = []
    modules = {"vision": backbone.vision_encoder, "text": backbone.text_encoder, "fusion": backbone.fusion}
    for name, module in modules.items():
        began: list[float] = []

        def before(_module: nn.Module, _inputs: Any, began: list[float] = began) -> None:
            began.append(_now(device))

        def after(
            _module: nn.Module, _inputs: Any, _output: Any, name: str = name, began: list[float] = began
        ) -> None:
            seconds[name] = seconds.get(name, 0.0) + _now(device) - began.pop()

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> Callable[[], float]:
    """Start over with the peak of memory; returns what tells the GiB above the level of now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - level) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # what the step before has freed, back to the system (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM := VmRSS
    before = resident("VmRSS")
    return lambda: (resident("VmHWM") - before) / 2**20


def resident(name: str) -> int:
    """Memory of this process in KiB: ``VmRSS`` now, ``VmHWM`` the most since :func:`reset_peak`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of this machine in plain square products, the quickest of several."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        started = _now(device)
        left @ right
        best = min(best, _now(device) - started)
    return 2 * size**3 / best


def print_table(
    title: str, arguments: argparse.Namespace, results: dict[str, Measured], rates: dict[torch.dtype, float]
) -> None:
    """One row for each way."""
    table = Table(title=f"{title}, {arguments.threads} threads", title_justify="left")
    columns = (
        "way",
        "samples/s",
        "x literal",
        *PARTS,
        "peak GiB",
        "GFLOP",
        "of matmul rate",
        "loss differs by",
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    plain = results["literal"]
    for way, measured in results.items():
        rate = rates[torch.bfloat16 if way == "bf16" else torch.float32]
        parts = [
            f"{1000 * statistics.median(measured.parts[name]):.0f}" if name in measured.parts else "–"
            for name in PARTS
        ]
        if way == "literal":
            parts = ["–", "–", "–", f"({parts[3]})", parts[4]]
        off = max(abs(measured.losses[n] - value) / abs(value) for n, value in plain.losses.items())
        table.add_row(
            way,
            f"{arguments.batch / measured.best:.3g}",
            f"{plain.best / measured.best:.2f}",
            *parts,
            f"{measured.peak_gib:.1f}",
            f"{measured.flops / 1e9:.0f}",
            f"{measured.flops / measured.best / rate:.0%}",
            "" if way == "literal" else f"{off:.0e}",
        )
    console = Console(width=170)
    console.print(table)
    console.print(
        f"milliseconds (forward of each part; the literal forward in brackets), matmul rate "
        f"{rates[torch.float32] / 1e9:.0f} GFLOP/s fp32, {rates[torch.bfloat16] / 1e9:.0f} bf16\n",
        highlight=False,
    )


if __name__ == "__main__":
    main()
