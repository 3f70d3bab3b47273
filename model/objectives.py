"""The five pre-training losses, from features to scaled terms.

Scale: with W workers each returns a term whose mean over the workers is the loss of one worker holding the
whole batch, and so are its gradients (what averaging data-parallel training needs). Counts are global,
invalid samples enter neither as rows nor as negatives, and an objective without anything to predict is zero.

Shape legend: n local rows, m = W * n global rows, S sets compared separately (frames), D width, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gather import gather, gather_with_gradient, rank, world_size


@dataclass(frozen=True)
class GlobalCounts:
    """What all workers together bring to a step, exchanged once before anything is computed.

    Args:
        valid: [m] bool, the samples of all workers in rank order.
        samples: valid samples among them.
        mlm_tokens: tokens to be predicted by MLM.
        completion_tokens: [W] tokens of each worker to be completed by MLTC.
    """

    valid: Tensor
    samples: int
    mlm_tokens: int
    completion_tokens: list[int]


def exchange_counts(valid: Tensor, mlm_tokens: Tensor, completion_tokens: Tensor) -> GlobalCounts:
    """Gather ``valid`` [n] bool and two scalar counts from every worker (one small collective)."""
    local = torch.cat([valid.long(), mlm_tokens.view(1), completion_tokens.view(1)])
    table = gather(local).view(world_size(), -1)
    everything = table[:, :-2].flatten().bool()
    totals = torch.cat([everything.sum().view(1), table[:, -2].sum().view(1), table[:, -1]]).tolist()
    return GlobalCounts(everything, totals[0], totals[1], totals[2:])


def in_full_precision(values: Tensor) -> Tensor:
    """At least float32: similarities and losses are computed so under any autocast or parameter type."""
    return values if values.dtype == torch.float64 else values.float()


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would do a product in its low precision. (There is none on meta, and torch refuses to name it.)"""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def mean_over_all(local_sum: Tensor, count: int) -> Tensor:
    """The scaled term of a mean over ``count`` things on all workers; zero when there are none."""
    return local_sum * (world_size() / max(count, 1))


def global_info_nce(
    first: Tensor,
    second: Tensor,
    temperature: Tensor | float,
    valid: Tensor,
    all_valid: Tensor,
    count: int,
    reference: bool = False,
) -> Tensor:
    """InfoNCE in both directions (summed) between paired rows, negatives from all workers.

    Args:
        first, second: [n, S, D]; row i of one belongs to row i of the other. Not yet normalised; one of them
            may be detached. The S sets are compared separately and averaged.
        temperature: divides the cosine similarities.
        valid: [n] bool rows that count; all_valid: [m] bool the same of all workers.
        count: valid rows on all workers.
        reference: pass the gradient through the gather as the released code does.

    Returns:
        scaled scalar term.
    """
    rows, sets = first.shape[:2]
    first, second = (F.normalize(in_full_precision(x), dim=-1) for x in (first, second))
    all_first, all_second = (
        gather_with_gradient(x, reference) if x.requires_grad else gather(x) for x in (first, second)
    )
    target = torch.arange(rows, device=first.device) + rank() * rows
    target = target.repeat(sets)
    some_invalid = count < len(all_valid)
    total = first.new_zeros(())
    with _without_autocast(first.device):
        forth = torch.einsum("nsd,msd->snm", first, all_second) / temperature
        if world_size() == 1:
            back = forth.transpose(1, 2)
        else:
            back = torch.einsum("nsd,msd->snm", second, all_first) / temperature
        for logits in (forth, back):
            if some_invalid:
                logits = logits.masked_fill(~all_valid, torch.finfo(logits.dtype).min)
            loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            if some_invalid:
                loss = torch.where(valid.repeat(sets), loss, 0.0)
            total = total + loss.sum()
    return mean_over_all(total / sets, count)


def group_info_nce(first: Tensor, second: Tensor, temperature: float, valid: Tensor, count: int) -> Tensor:
    """InfoNCE in both directions (summed) between paired rows, negatives from the own group.

    Args:
        first, second: [groups, N, D] not yet normalised.
        temperature: divides the cosine similarities.
        valid: [groups, N] bool rows that count.
        count: valid rows on all workers.
    """
    first, second = (F.normalize(in_full_precision(x), dim=-1) for x in (first, second))
    target = torch.arange(first.shape[1], device=first.device).repeat(first.shape[0])
    total = first.new_zeros(())
    with _without_autocast(first.device):
        forth = torch.bmm(first / temperature, second.transpose(1, 2))
        for logits in (forth, forth.transpose(1, 2)):
            logits = logits.masked_fill(~valid[:, None], torch.finfo(logits.dtype).min)
            loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            total = total + torch.where(valid.flatten(), loss, 0.0).sum()
    return mean_over_all(total, count)


def matching_loss(logits: Tensor, labels: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ITM: ``logits`` [n, 2], ``labels`` [n] -> (scaled term, local number of right answers)."""
    loss = F.cross_entropy(in_full_precision(logits), labels, reduction="none")
    right = (logits.argmax(dim=-1) == labels) & valid
    return mean_over_all(torch.where(valid, loss, 0.0).sum(), count), right.sum()


def masked_language_loss(logits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """MLM of masked positions: ``logits`` [k, V], ``labels`` [k] -> (scaled term, local right answers)."""
    loss = F.cross_entropy(in_full_precision(logits), labels, reduction="sum")
    return mean_over_all(loss, count), (logits.argmax(dim=-1) == labels).sum()


def token_completion_loss(
    completed: Tensor, target: Tensor, temperature: float, counts: GlobalCounts, reference: bool = False
) -> Tensor:
    """MLTC of text: ``completed`` and ``target`` [k, D] are this worker's masked tokens (k differs by
    worker).

    Padded to the largest k, so that they can be gathered.
    """
    most, total = max(counts.completion_tokens), sum(counts.completion_tokens)
    if most == 0:
        return in_full_precision(completed).sum()
    own = len(completed)
    completed, target = (F.pad(x, (0, 0, 0, most - own)) for x in (completed, target))
    place = torch.arange(most, device=completed.device)
    all_valid = torch.cat([place < k for k in counts.completion_tokens])
    rows = (completed[:, None], target[:, None])
    return global_info_nce(*rows, temperature, place < own, all_valid, total, reference)
