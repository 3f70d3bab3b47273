"""Ranks and recall from similarities: pure functions on blocks of a score matrix.

Q queries against C candidates. ``positive`` [Q, C] marks the candidates that are right for a query: one
picture for a caption, several captions for a picture; the best placed one counts. A candidate that scores
as high as the best positive, to within ``tie``, is counted as ahead of it, and so is one whose score is not
a number: a model that gives everything the same embedding, or NaN, is last rather than first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.result import Measured

#: Cosine similarities nearer than this are equal: fp32 sums in another order differ by about 1e-7.
ITC_TIE = 1e-6
#: The same for log-odds of the matching head, which are of the order of 1 to 10.
ITM_TIE = 1e-5

RECALLS = (1, 5, 10)


def ranks_of(scores: Tensor, positive: Tensor, tie: float) -> Tensor:
    """The rank [Q] (int64, from 1) of each query's best positive among the ``scores`` [Q, C] (fp32)."""
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    surely_behind = scores < best - tie  # false for NaN on either side
    return 1 + (~positive & ~surely_behind).sum(dim=1)


def shortlist(scores: Tensor, positive: Tensor, k: int, tie: float) -> Tensor:
    """The k best candidates [Q, min(k, C)] (int64) of each query by ``scores`` [Q, C]; positives lose
    ties.
    """
    handicapped = torch.where(positive, scores - tie, scores)
    worst_case = torch.where(positive, -torch.inf, torch.inf).to(scores.dtype)
    handicapped = torch.where(handicapped.isnan(), worst_case, handicapped)
    return handicapped.topk(min(k, scores.shape[1]), dim=1).indices


def reranked(ranks: Tensor, scores: Tensor, positive: Tensor, tie: float) -> Tensor:
    """Ranks [Q] after the shortlist was put into the order of new ``scores`` [Q, K].

    Args:
        ranks: [Q] by the first scores: kept where no positive is on the shortlist (they are greater than K).
        scores: [Q, K] of the shortlisted candidates.
        positive: [Q, K] which of them are right.
    """
    return torch.where(positive.any(dim=1), ranks_of(scores, positive, tie), ranks)


def recall(ranks: Tensor, prefix: str) -> dict[str, Measured]:
    """``{prefix}_R1``, ``_R5``, ``_R10`` as shares of 1, and ``{prefix}_median_rank``, of ranks [Q]."""
    values = ranks.cpu().numpy().astype(np.float64)
    metrics = {f"{prefix}_R{k}": Measured((values <= k).astype(np.float64)) for k in RECALLS}
    return metrics | {f"{prefix}_median_rank": Measured(values, "median")}


def chance(positives: Tensor, candidates: int, k: int = 10) -> float:
    """The recall at k of random ranks: 1 - P(none of n positives among the first k), averaged over the
    queries.

    Args:
        positives: [Q] number n of positives of each query.
        candidates: number of candidates, positives included.
    """
    missed = torch.ones(len(positives), dtype=torch.float64)
    for place in range(min(k, candidates)):
        missed *= ((candidates - positives.double() - place) / (candidates - place)).clamp(min=0)
    return float(1 - missed.mean())
