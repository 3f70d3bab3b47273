"""What ``glscl profile`` runs on each worker: the training's own loop for some steps, of which nothing is kept."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from cluster.workers import WorkerContext
from pipeline.profiling.ranges import mark
from pipeline.training.loop import Rehearsal, RehearsalOver, TrainingPlan, train
from sharding.storage import Storage

#: Steps before the trace: allocators and loaders find their size.
WARM_UP = 2


@dataclass(frozen=True)
class ProfileRequest:
    """``plan``: of the training; ``steps`` are traced, and the trace goes to ``path`` of ``storage``."""

    plan: TrainingPlan
    steps: int
    storage: Storage
    path: str


def profile_worker(context: WorkerContext, request: ProfileRequest) -> None:
    """Train ``WARM_UP + steps`` steps, or as many as are left; worker 0 writes the trace. Collective."""
    profiled = _Profiled(request.steps, context)
    with suppress(RehearsalOver):
        train(context, replace(request.plan, rehearsal=profiled))
    profiled.write(request.storage, request.path)


class _Profiled(Rehearsal):
    """Counts steps; on worker 0 they are traced."""

    def __init__(self, steps: int, context: WorkerContext) -> None:
        self._left = WARM_UP + steps
        self._profiler: torch.profiler.profile | None = None
        if context.rank == 0:
            activities = [ProfilerActivity.CPU]
            if context.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
        self._steps, self._running = steps, False

    def begin(self, engine: Any) -> None:
        mark(engine)

    def step(self) -> None:
        self._left -= 1
        if self._profiler is not None and self._left == self._steps:
            self._profiler.start()
            self._running = True
        if not self._left:
            raise RehearsalOver

    def write(self, storage: Storage, path: str) -> None:
        """The trace in Chrome's format, which Perfetto opens."""
        if self._profiler is None or not self._running:
            return
        self._profiler.stop()
        with tempfile.TemporaryDirectory(prefix="glscl-profile-") as folder:
            file = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(file))
            storage.upload(file, path)
