"""Collectives of the contrastive objectives: a gather that carries the gradient back, and plain sums.

Every worker computes its own rows of the global similarity matrix. The gradient of a feature is the sum of
what all workers' rows say about it, so the backward of the gather sums over workers before it cuts out the
own part. Without an initialised process group, or with one worker, everything is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_simulated = 0


@contextmanager
def simulated_workers(workers: int) -> Iterator[None]:
    """As if this process were worker 0 of so many that all have the same: what each holds can then be measured."""
    global _simulated
    before, _simulated = _simulated, workers
    try:
        yield
    finally:
        _simulated = before


def world_size() -> int:
    """Workers taking part in a step."""
    if _simulated:
        return _simulated
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's place among them."""
    return dist.get_rank() if world_size() > 1 and not _simulated else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        return gather(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        if not _simulated:
            dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


class _ReferenceGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        return gather(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return grads[0].chunk(world_size())[rank()]


def gather(local: Tensor) -> Tensor:
    """[n, ...] on every worker (the same shape on each) -> [workers * n, ...] in rank order, no gradient."""
    workers = world_size()
    if workers == 1:
        return local.detach()
    local = local.detach().contiguous()
    if _simulated:
        return torch.cat([local] * workers)
    everything = local.new_empty(workers * local.shape[0], *local.shape[1:])
    dist.all_gather(list(everything.chunk(workers)), local)
    return everything


def gather_with_gradient(local: Tensor, reference: bool = False) -> Tensor:
    """As :func:`gather`, with the gradient summed over the workers on its way back.

    ``reference``: the released code's gather, whose gradient is only what this worker's own loss says.
    """
    if world_size() == 1:
        return local
    return _ReferenceGather.apply(local) if reference else _Gather.apply(local)


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum of ``values`` over all workers, detached."""
    values = values.detach().clone()
    if world_size() > 1 and not _simulated:
        dist.all_reduce(values)
    return values
