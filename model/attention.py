"""Multi-head attention as the encoders share it, fused or with its weights to be seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

#: Values of ``attn_implementation``: torch's fused kernel (the default), or matrix products and a softmax.
IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass
class Trace:
    """What a forward passes through, kept for those who ask to see it.

    Args:
        want_attentions: keep attention weights too; they are then computed eagerly.
        hidden_states: [B, N, D], the first block's input and every block's output.
        attentions: [B, H, N, N] of every block's self-attention, rows are queries and sum to 1.
        cross_attentions: [B, H, N, M] onto the other stream (fusion encoder only).
    """

    want_attentions: bool
    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    cross_attentions: list[Tensor] = field(default_factory=list)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str | None = None,
) -> Tensor:
    """Multi-head attention of ``query`` [B, Q, D] onto ``key`` and ``value`` [B, N, D] -> [B, Q, D].

    ``mask`` is boolean, true where a key may be seen, and broadcasts to [B, heads, Q, N];
    ``implementation`` is one of ``IMPLEMENTATIONS`` (None: ``sdpa``).
    """
    if implementation == "eager":
        return attend_with_weights(query, key, value, heads, mask, dropout)[0]
    query, key, value = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output.transpose(1, 2).flatten(2)


def attend_with_weights(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As :func:`attend`, and the weights [B, heads, Q, N] it used, before dropout."""
    query, key, value = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    output = F.dropout(weights, dropout) @ value
    return output.transpose(1, 2).flatten(2), weights


def take_rows(states: Tensor, rows: Tensor) -> Tensor:
    """``states`` [B, N, D] at ``rows`` [B, R] -> [B, R, D].

    Whole rows are selected from the flattened batch: the backward then adds rows, where that of ``gather``
    would add single numbers.
    """
    batch, tokens, width = states.shape
    offset = torch.arange(batch, device=rows.device)[:, None] * tokens
    picked = states.reshape(batch * tokens, width).index_select(0, (rows + offset).flatten())
    return picked.view(batch, rows.shape[1], width)
