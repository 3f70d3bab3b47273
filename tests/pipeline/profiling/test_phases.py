"""A profile's trace is one that Perfetto opens, with every phase in its place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity

from model import OBJECTIVES, GLSCLForPreTraining
from pipeline.profiling.phases import phase_table, phases_of
from pipeline.profiling.ranges import mark
from pipeline.training.clock import Clock
from tests.model.small import small_batch, small_config

STEPS = 2


def _trace(path: Path) -> dict[str, object]:
    """Of some steps as the training loop makes them, by the model itself."""
    model = GLSCLForPreTraining(small_config()).train()
    engine = SimpleNamespace(module=model, backward=lambda loss: loss.backward())
    mark(engine)
    clock = Clock()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(STEPS):
            with clock.phase("step"):
                with clock.phase("data"):
                    batch = small_batch(small_config(), seed=number)
                with clock.phase("forward and backward"):
                    output = model(**batch.inputs(), objectives=dict.fromkeys(OBJECTIVES, 1.0), group_size=6)
                    engine.backward(output.loss)
                with clock.phase("optimizer"):
                    model.zero_grad()
    profiler.export_chrome_trace(str(path))
    return dict(json.loads(path.read_text()))


def test_a_trace_has_every_phase_inside_the_one_around_it(tmp_path: Path) -> None:
    trace = _trace(tmp_path / "trace.json")
    phases = phases_of(trace)
    passes = small_config().num_patches
    few = int(passes * 0.2) + 1
    assert [(phase.depth, phase.name) for phase in phases] == [
        (0, "step"),
        (1, "data"),
        (1, "forward and backward"),
        (2, "forward"),
        (3, "image encoder"),
        (3, "text encoder"),
        (3, "fusion"),
        (4, f"fusion of 1 passes with {few} vision tokens"),
        (4, f"fusion of 4 passes with {passes + 1} vision tokens"),
        *((3, f"objective {name}") for name in sorted(OBJECTIVES)),
        (2, "backward"),
        (1, "optimizer"),
    ]
    counts = {phase.name: phase.count for phase in phases}
    assert counts.pop("objective mltc") == 2 * STEPS  # its halves
    assert set(counts.values()) == {STEPS}

    # Chrome's format: complete events of one process and thread, each inside the event around it.
    events = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]  # type: ignore[attr-defined]
    assert all({"ph", "name", "ts", "dur", "pid", "tid"} <= set(event) for event in events)
    by_name = {phase.name: [e for e in events if e["name"] == phase.name] for phase in phases}
    for outer, inner in (
        ("step", "data"),
        ("step", "forward"),
        ("forward", "fusion"),
        ("step", "objective itc"),
    ):
        for event in by_name[inner]:
            assert any(
                around["ts"] <= event["ts"] and event["ts"] + event["dur"] <= around["ts"] + around["dur"]
                for around in by_name[outer]
            ), (outer, inner)


def test_the_table_gives_milliseconds_of_a_step_and_its_shares() -> None:
    def event(name: str, ms: float, category: str = "user_annotation") -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "ts": 0, "dur": 1000 * ms}

    steps = [event("step", 80), event("step", 120), event("data", 10), event("data", 20), event("else", 7)]
    device = [event("step", 60, "gpu_user_annotation"), event("step", 70, "gpu_user_annotation")]
    console = Console(width=120, record=True)
    console.print(phase_table(phases_of({"traceEvents": [*steps, *device]}), "a job"))
    rows = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["step", "100.0", "100.0%", "65.0", "1"] in rows
    assert ["data", "15.0", "15.0%", "0.0", "1"] in rows
    assert not any("else" in row for row in rows)
