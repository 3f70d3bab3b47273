"""The table of a profile: what its ranges took, read from the trace as any viewer reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pipeline.profiling.ranges import DEPTHS, kind_of


@dataclass
class Phase:
    """All ranges of one name: ``seconds`` and ``count`` over all steps; ``device_s`` of a GPU's kernels."""

    name: str
    kind: str
    seconds: float = 0.0
    device_s: float = 0.0
    count: int = 0

    @property
    def depth(self) -> int:
        """How deep it lies below a step."""
        return DEPTHS[self.kind]


def phases_of(trace: dict[str, Any]) -> list[Phase]:
    """The phases of a trace (of Chrome's format), a step first and its parts below in their order."""
    found: dict[str, Phase] = {}
    for event in trace["traceEvents"]:
        category = event.get("cat")
        if event.get("ph") != "X" or category not in ("user_annotation", "gpu_user_annotation"):
            continue
        kind = kind_of(event["name"])
        if kind is None:
            continue
        phase = found.setdefault(event["name"], Phase(event["name"], kind))
        if category == "user_annotation":
            phase.seconds += event["dur"] / 1e6
            phase.count += 1
        else:
            phase.device_s += event["dur"] / 1e6
    kinds = list(DEPTHS)
    return sorted(found.values(), key=lambda phase: (kinds.index(phase.kind), phase.name))


def phase_table(phases: list[Phase], title: str) -> Table:
    """Milliseconds of a step, and shares of it."""
    [step] = [phase for phase in phases if phase.name == "step"]
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    on_device = any(phase.device_s for phase in phases)
    for name in ("ms a step", "share", *(["GPU ms a step"] if on_device else []), "times a step"):
        table.add_column(name, justify="right")
    for phase in phases:
        row = [f"{1000 * phase.seconds / step.count:,.1f}", f"{phase.seconds / step.seconds:.1%}"]
        if on_device:
            row.append(f"{1000 * phase.device_s / step.count:,.1f}")
        table.add_row("  " * phase.depth + phase.name, *row, f"{phase.count / step.count:g}")
    return table
