"""What the fine-tuning tasks share: the classifier and the mean over samples that count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.gather import sum_over_workers
from model.objectives import mean_over_all


def classifier(inputs: int, width: int, classes: int) -> nn.Sequential:
    """Linear - LayerNorm - GELU - Linear, numbered 0, 1 and 3 as in the released code."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, classes))


def all_or(valid: Tensor | None, samples: int, device: torch.device) -> Tensor:
    """``valid`` [samples] bool; None: all of them.

    Raises:
        ValueError: flags of another shape.
    """
    if valid is None:
        return torch.ones(samples, dtype=torch.bool, device=device)
    if valid.shape != (samples,):
        raise ValueError(f"{samples} samples, but validity flags of shape {tuple(valid.shape)}")
    return valid.bool()


def mean_of_valid(losses: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``losses`` [B] over the ``valid`` [B] samples of all workers; zero without any.

    Scaled so that the mean over the workers is the loss of one worker with the whole batch. Every worker must
    take part.
    """
    count = int(sum_over_workers(valid.sum()))
    return mean_over_all(torch.where(valid, losses, 0.0).sum(), count)
