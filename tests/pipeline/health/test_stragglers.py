"""The slowest worker is shown at each step, and named when it mostly is the same."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import nn

from cluster.workers import WorkerContext
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.stragglers import Stragglers

CONFIG = HealthBlock(straggler_ratio=1.5, straggler_window=10)
CONTEXT = WorkerContext(0, 4, 0, 4, 0, torch.device("cpu"))


class _Slow(nn.Module):
    def forward(self, seconds: float) -> None:
        time.sleep(seconds)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder, self.fusion = _Slow(), _Slow()


def _stragglers(told: list[str], model: nn.Module | None = None) -> Stragglers:
    return Stragglers(CONFIG, SimpleNamespace(module=model or _Model()), CONTEXT, told.append)


def test_a_worker_s_own_seconds_are_its_wait_for_data_and_its_encoders_and_nothing_else() -> None:
    model = _Model()
    stragglers = _stragglers([], model)
    stragglers.begin()
    stragglers.waited(100.0)
    stragglers.waited(50.0)
    model.vision_encoder(0.05)
    model.vision_encoder(0.05)
    model.fusion(0.5)
    own, step = stragglers.own()
    assert (
        150.1 <= own < 150.1 + step - 0.5
    )  # the step took all that was slept, and what the machine took besides
    stragglers.begin()
    assert stragglers.own()[0] == 0.0


def test_the_slowest_and_how_much_slower_than_the_median_it_is_are_shown() -> None:
    stragglers = _stragglers([])
    stragglers.update([[1.0, 4.0], [1.1, 4.0], [0.9, 4.0], [2.2, 4.0]])
    assert stragglers.metrics() == {"health/slowest_worker": 3.0, "health/slowest_ratio": 2.2}


def test_the_one_that_is_slow_in_most_of_a_window_is_named_once() -> None:
    told: list[str] = []
    stragglers = _stragglers(told)
    for step in range(10):
        stragglers.update([[1.0, 4.0], [1.0, 4.0], [2.0 if step < 6 else 1.0, 4.0], [1.0, 4.0]])
    assert len(told) == 1
    assert told[0].startswith(
        "worker 2 was the slowest in 6 of the last 10 steps, more than 1.5 times the median"
    )


def test_whoever_is_slow_now_and_then_or_by_nothing_that_matters_is_not_named() -> None:
    told: list[str] = []
    stragglers = _stragglers(told)
    for step in range(10):  # each in turn
        stragglers.update([[2.0 if rank == step % 4 else 1.0, 4.0] for rank in range(4)])
    for _ in range(10):  # three times as slow, but in a thousandth of the step
        stragglers.update([[0.003, 3.0], [0.001, 3.0], [0.001, 3.0], [0.001, 3.0]])
    assert told == []
