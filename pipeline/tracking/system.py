"""How much memory the worker and its machine use, as metrics."""

from __future__ import annotations

import sys


def memory_metrics() -> dict[str, float]:
    """Memory now, in GiB: this process, the whole machine, and the accelerator when this process uses one."""
    import psutil

    gib = 2.0**30
    machine = psutil.virtual_memory()
    metrics = {
        "system/worker_memory_gib": psutil.Process().memory_info().rss / gib,
        "system/machine_memory_gib": (machine.total - machine.available) / gib,
    }
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        metrics["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / gib
    return metrics
