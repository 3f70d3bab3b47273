"""An optimizer step made or dropped, the same on every worker, under any ZeRO stage.

DeepSpeed has a way of dropping a step: the one it takes when fp16's gradients overflow. It clears what each stage has
accumulated and keeps its counters right, so a step is dropped here by making it take that way, with its loss scale
left alone. Plain torch optimizers (ZeRO 0) have no such way: without gradients they update nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from pipeline.training.config import Recipe
from pipeline.training.engine import optimizer_step

#: What came of a step: weights moved; fp16's scale was too large (DeepSpeed lowers it); a gradient was not finite.
Update = Literal["made", "scaled-down", "non-finite"]


def make_update(engine: Any, recipe: Recipe) -> Update:
    """The optimizer step at the end of a global batch, not made where a gradient is not finite. Collective.

    A gradient that overflows in fp16 says nothing but that the loss scale is too large, until it is at its minimum.
    """
    assert engine.is_gradient_accumulation_boundary()
    if not hasattr(engine.optimizer, "overflow"):
        if not _finite(engine):
            drop_update(engine, recipe)
            return "non-finite"
        optimizer_step(engine, recipe)
        return "made"
    can_fall = _scale_can_fall(engine.optimizer)
    optimizer_step(engine, recipe)
    if not engine.optimizer.overflow:
        return "made"
    return "scaled-down" if can_fall else "non-finite"


def drop_update(engine: Any, recipe: Recipe) -> None:
    """Ends a global batch without an update: its gradients are gone, the engine's counters go on. Collective."""
    assert engine.is_gradient_accumulation_boundary()
    optimizer = engine.optimizer
    if not hasattr(optimizer, "overflow"):
        engine.zero_grad()
        optimizer_step(engine, recipe)
        return
    with _overflowing(optimizer, recipe.zero_stage):
        optimizer_step(engine, recipe)
    assert optimizer.overflow, "a step that was to be dropped was made"


def settle_loss_scale(engine: Any) -> None:
    """fp16 at its smallest loss scale must be a fault of the step, not an exception of DeepSpeed's."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        scaler.raise_error_at_min_scale = False


def _finite(engine: Any) -> bool:
    """Whether the gradient is finite, of a plain optimizer, whose gradients are reduced and the same everywhere."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))


def _scale_can_fall(optimizer: Any) -> bool:
    scaler = optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)


@contextmanager
def _overflowing(optimizer: Any, zero_stage: int) -> Iterator[None]:
    """Makes DeepSpeed's optimizer find an overflow, whatever its gradients are, and keep its loss scale."""

    def found(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    with ExitStack() as stack:
        instead: list[tuple[str, Any]] = [("_update_scale", lambda *_: None)]
        if zero_stage == 3:
            # Called before the norm (whose outcome is set aside) and, the other one, after it.
            instead.append(("_overflow_check_and_loss_scale_update", found))
        else:
            instead += [("check_grad_overflow", True), ("check_overflow", found)]
        for name, value in instead:
            stack.enter_context(_attribute(optimizer, name, value))
        yield


@contextmanager
def _attribute(holder: Any, name: str, value: Any) -> Iterator[None]:
    """``holder.name`` for the time of a block."""
    own = vars(holder)
    had, before = name in own, own.get(name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if had:
            setattr(holder, name, before)
        else:
            delattr(holder, name)
