"""Ranks and recall from similarities: pure functions on blocks of a score matrix.

Q queries against C candidates. ``positive`` [Q, C] marks the candidates that are right for a query: one
picture for a caption, several captions for a picture; the best placed one counts. A candidate that scores
as high as the best positive, to within ``tie``, is counted as ahead of it, and so is one whose score is not
a number: a model that gives everything the same embedding, or NaN, is last rather than first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.result import Measured

#: Cosine similarities nearer than this are equal: fp32 sums in another order differ by about 1e-7.
ITC_TIE = 1e-6
#: The same for log-odds of the matching head, which are of the order of 1 to 10.
ITM_TIE = 1e-5

RECALLS = (1, 5, 10)

_SCORES = 8_000_000  # scores in one block of rows: 32 MB


class Found(NamedTuple):
    """What Q queries found: ``ranks`` [Q] (int64, from 1) of the best positive, and the K first candidates [Q, K]
    (int64) with their ``scores`` (fp32), the best first.
    """

    ranks: Tensor
    shortlist: Tensor
    scores: Tensor

    def first(self, k: int) -> Found:
        """With the k first candidates only."""
        return Found(self.ranks, self.shortlist[:, :k], self.scores[:, :k])


def search(rows: Callable[[slice], Tensor], query_owner: Tensor, owner: Tensor, k: int, tie: float) -> Found:
    """Ranks and shortlists of all queries, a block of rows at a time.

    Args:
        rows: gives the scores [n, C] (fp32) of some of the queries.
        query_owner: [Q], owner: [C]: a candidate is right for a query of the same owner.
        k: length of the shortlists; fewer candidates give shorter ones.
    """
    block = max(1, _SCORES // len(owner))  # of the data alone, so that its products are always the same
    parts = []
    for start in range(0, len(query_owner), block):
        part = slice(start, start + block)
        scores = rows(part)
        positive = query_owner[part, None] == owner[None, :]
        listed = shortlist(scores, positive, k, tie)
        parts.append((ranks_of(scores, positive, tie), listed, scores.gather(1, listed)))
    return Found(*(torch.cat(column) for column in zip(*parts, strict=True)))


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


def reranked(found: Found, scores: Tensor, query_owner: Tensor, owner: Tensor, tie: float) -> Found:
    """The shortlists in the order of new ``scores`` [Q, K] (fp32), and the ranks after that.

    Where no positive is on the shortlist the rank stays: it is greater than K.
    """
    positive = owner[found.shortlist] == query_owner[:, None]
    ranks = torch.where(positive.any(dim=1), ranks_of(scores, positive, tie), found.ranks)
    order = shortlist(scores, positive, scores.shape[1], tie)
    return Found(ranks, found.shortlist.gather(1, order), scores.gather(1, order))


def recall(ranks: Tensor, prefix: str) -> dict[str, Measured]:
    """``{prefix}_R1``, ``_R5``, ``_R10`` as shares of 1, and ``{prefix}_median_rank``, of ranks [Q]."""
    values = ranks.cpu().numpy().astype(np.float64)
    metrics = {f"{prefix}_R{k}": Measured((values <= k).astype(np.float64)) for k in RECALLS}
    return metrics | {f"{prefix}_median_rank": Measured(values, "median")}


def chance(positives: Tensor, candidates: int, k: int) -> float:
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
