"""What a device can do: peak rates by type of number, and memory.

Rates are those of dense matrix products (no sparsity) from NVIDIA's data sheets; ``fp32`` is without TF32, which
torch leaves off for matrix products unless it is asked for. A device that is not listed, and every CPU, is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

Number = Literal["fp32", "bf16", "fp16"]
GIB = 2**30
_DATASHEETS = "https://www.nvidia.com/en-us/data-center/"

#: What ``train.precision`` computes its products in.
PRODUCTS: dict[str, Number] = {"fp32": "fp32", "bf16-autocast": "bf16", "bf16": "bf16", "fp16": "fp16"}

_MEASURED_S = 0.2
_SIDE = 1024


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        name: as ``glscl plan --device`` takes it.
        cuda: part of what ``torch.cuda.get_device_name`` says; the longest that fits counts.
        memory: bytes.
        peak: FLOP/s.
        source: of the figures.
    """

    name: str
    cuda: str
    memory: int
    peak: dict[Number, float]
    source: str


def _device(
    name: str, cuda: str, gib: int, fp32: float, fp16: float, source: str, *, bf16: bool = True
) -> Device:
    """``fp32`` and ``fp16`` in TFLOP/s; bf16 is as fast as fp16 where there is any."""
    peak: dict[Number, float] = {"fp32": fp32 * 1e12, "fp16": fp16 * 1e12}
    if bf16:
        peak["bf16"] = fp16 * 1e12
    return Device(name, cuda, gib * GIB, peak, source)


DEVICES = (
    _device("v100-16gb", "V100-SXM2-16GB", 16, 15.7, 125, f"{_DATASHEETS}v100", bf16=False),
    _device("v100-32gb", "V100-SXM2-32GB", 32, 15.7, 125, f"{_DATASHEETS}v100", bf16=False),
    _device("t4-16gb", "Tesla T4", 16, 8.1, 65, f"{_DATASHEETS}tesla-t4", bf16=False),
    _device("a10-24gb", "NVIDIA A10", 24, 31.2, 125, f"{_DATASHEETS}products/a10-gpu"),
    _device("l4-24gb", "NVIDIA L4", 24, 30.3, 121, f"{_DATASHEETS}l4"),
    _device("l40s-48gb", "NVIDIA L40S", 48, 91.6, 362, f"{_DATASHEETS}l40s"),
    _device("a100-40gb", "A100-SXM4-40GB", 40, 19.5, 312, f"{_DATASHEETS}a100"),
    _device("a100-80gb", "A100-SXM4-80GB", 80, 19.5, 312, f"{_DATASHEETS}a100"),
    _device("h100-80gb", "H100 80GB HBM3", 80, 67, 989, f"{_DATASHEETS}h100"),
    _device("h100-pcie-80gb", "H100 PCIe", 80, 51, 756, f"{_DATASHEETS}h100"),
    _device("h200-141gb", "NVIDIA H200", 141, 67, 989, f"{_DATASHEETS}h200"),
)


def find_device(cuda_name: str) -> Device | None:
    """The entry of ``DEVICES`` for a name of CUDA's; None: not listed."""
    words = f" {cuda_name} "
    fitting = [device for device in DEVICES if f"{device.cuda} " in words]
    return max(fitting, key=lambda device: len(device.cuda), default=None)


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s that a device can do in a precision of ``train.precision``, and what that figure is."""
    number = PRODUCTS[precision]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = find_device(name)
        if known is not None and number in known.peak:
            return known.peak[number], f"{name}, {number}, data sheet"
    return matmul_rate(device, number), f"measured matmul rate, {number}"


def matmul_rate(device: torch.device, number: Number) -> float:
    """FLOP/s in square products of this process's threads, the quickest of a fraction of a second."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[number]
    left, right = (torch.ones(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + _MEASURED_S
    while best == float("inf") or time.perf_counter() < until:
        began = _now(device)
        left @ right
        best = min(best, _now(device) - began)
    return 2 * _SIDE**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
