"""What a job's workers need, and what to change where that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from model import GLSCLConfig
from pipeline.config import JobConfig
from pipeline.planning.memory import Memory, estimate, layout_of
from pipeline.planning.simulation import Shape, SimulatedStep, meta_model, simulate
from pipeline.training.config import StageBlock, TrainBlock, divisors
from pipeline.training.engine import model_config

#: How an optimizer or weights are moved to the host.
ON_HOST = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Work:
    """What a worker computes in one of a stage's steps, on data of one kind."""

    stage: StageBlock
    modality: str
    shape: Shape


class Planner:
    """The memory that workers of a job need, also were it configured otherwise.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, job: JobConfig, device: str) -> None:
        self._job, self._device = job, device
        self.config: GLSCLConfig = model_config(job.model)
        self._steps: dict[Any, SimulatedStep] = {}
        model = meta_model(self.config)
        groups = model.parameter_groups(1e-4, 0.01)
        self.groups = [sum(p.numel() for p in group["params"]) for group in groups]

    def work(self, train: TrainBlock) -> list[Work]:
        """What each stage computes, on images and on videos where it has both."""
        found = []
        for stage in train.stages:
            for modality in sorted({self._job.datasets[name].modality for name in stage.mixture}):
                batch = stage.global_batch or train.global_batch
                parts = train.parts(stage)
                shape = Shape(
                    samples=batch // (train.accumulation * train.workers * parts),
                    frames=stage.frames if modality == "video" else 1,
                    resolution=stage.resolution or self.config.image_size,
                    tokens=self.config.max_text_length,
                    group=batch // (train.lanes * train.accumulation),
                    parts=parts,
                )
                found.append(Work(stage, modality, shape))
        return found

    def fullest(self, train: TrainBlock) -> Work:
        """Of all that is computed, what takes most room."""

        def room(work: Work) -> tuple[int, int]:
            shape = work.shape
            return shape.samples * shape.frames * shape.resolution**2, len(work.stage.objectives)

        return max(self.work(train), key=room)

    def memory(self, train: TrainBlock) -> Memory:
        """Of one worker, at the fullest moment of the fullest stage."""
        accumulates = train.accumulation * train.parts(train.stages[0]) > 1
        layout = layout_of(train, self.groups)
        return estimate(layout, self.step(train), self._device, accumulates=accumulates)

    def step(self, train: TrainBlock) -> SimulatedStep:
        """The simulated step of the fullest stage: one part of it, beside all other parts and workers."""
        work = self.fullest(train)
        shape = replace(work.shape, parts=1)
        workers = train.workers * work.shape.parts
        objectives = {str(name): weight for name, weight in work.stage.objectives.items()}
        key = (shape, workers, frozenset(objectives), train.activation_checkpointing, train.precision)
        if key not in self._steps:
            model = meta_model(self.config, checkpointing=train.activation_checkpointing)
            if train.precision in ("bf16", "fp16"):
                model = model.to(torch.bfloat16)
            autocast = train.precision == "bf16-autocast"
            self._steps[key] = simulate(
                model, shape, objectives, workers=workers, device=self._device, autocast=autocast
            )
        return self._steps[key]

    def suggestions(self, limit: int) -> list[tuple[str, Memory]]:
        """Changes with which a worker fits into ``limit`` bytes: each that does it alone, or else several together."""
        train = self._job.train
        kinds = list(_kinds(train, self.fullest(train).shape))
        found = []
        for kind in kinds:
            for told, change in kind:
                memory = self._changed(train, change)
                if memory is not None and memory.total <= limit:
                    found.append((told, memory))
                    break
        if found:
            return found
        together: dict[str, Any] = {}
        names = []
        for told, change in (kind[-1] for kind in kinds):  # the furthest of each kind, workers last
            together = {**together, **change, "zero": {**together.get("zero", {}), **change.get("zero", {})}}
            names.append(told)
            memory = self._changed(train, together)
            if memory is not None and memory.total <= limit:
                return [(", ".join(names), memory)]
        return []

    def _changed(self, train: TrainBlock, change: dict[str, Any]) -> Memory | None:
        block = changed(train, change)
        return None if block is None else self.memory(block)


def changed(train: TrainBlock, change: dict[str, Any]) -> TrainBlock | None:
    """The block with other values; None where they are refused. ``zero``: keys of ``zero_optimization``."""
    zero = {**train.deepspeed.get("zero_optimization", {}), **change.get("zero", {})}
    deepspeed = {**train.deepspeed, "zero_optimization": zero}
    plain = {name: value for name, value in change.items() if name != "zero"}
    try:
        return TrainBlock.model_validate({**train.model_dump(), "deepspeed": deepspeed, **plain})
    except ValidationError:
        return None


def _kinds(train: TrainBlock, shape: Shape) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Kinds of changes, the cheapest first; of each kind its steps, the smallest first."""
    if not train.activation_checkpointing:
        yield [("train.activation_checkpointing: true", {"activation_checkpointing": True})]
    sizes = [size for size in divisors(shape.samples) if size % shape.group == 0 and size < shape.samples]
    if sizes:
        yield [(f"train.micro_batch: {size}", {"micro_batch": size}) for size in reversed(sizes)]
    key = "train.deepspeed.zero_optimization"
    if train.zero_stage < 3 and train.workers > 1:
        yield [
            (f"{key}.stage: {stage}", {"zero": {"stage": stage}}) for stage in range(train.zero_stage + 1, 4)
        ]
    if layout_of(train, [1]).optimizer is None:
        stage = max(1, train.zero_stage)
        yield [(f"{key}: {{stage: {stage}, offload_optimizer: {{device: cpu}}}}", {"zero": offload(stage)})]
    more = [number for number in divisors(train.lanes) if train.workers < number <= 16 * train.workers]
    if more:
        yield [(f"train.workers: {number}", {"workers": number}) for number in more]


def offload(stage: int, *, weights: bool = False) -> dict[str, Any]:
    """``zero_optimization`` of a stage with the optimizer (and the weights) in the host's memory."""
    places = {"offload_optimizer": ON_HOST} | ({"offload_param": ON_HOST} if weights else {})
    return {"stage": stage, **places}
