"""Multi-head attention as the encoders share it: one call of scaled-dot-product attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention of ``query`` [B, Q, D] onto ``key`` and ``value`` [B, N, D] -> [B, Q, D].

    ``mask`` is boolean, true where a key may be seen, and broadcasts to [B, heads, Q, N].
    """
    query, key, value = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output.transpose(1, 2).flatten(2)


def take_rows(states: Tensor, rows: Tensor) -> Tensor:
    """``states`` [B, N, D] at ``rows`` [B, R] -> [B, R, D].

    Whole rows are selected from the flattened batch: the backward then adds rows, where that of ``gather``
    would add single numbers.
    """
    batch, tokens, width = states.shape
    offset = torch.arange(batch, device=rows.device)[:, None] * tokens
    picked = states.reshape(batch * tokens, width).index_select(0, (rows + offset).flatten())
    return picked.view(batch, rows.shape[1], width)
