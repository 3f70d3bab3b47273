"""Multi-head attention as the encoders share it, fused or with its weights to be seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class KeyValue(nn.Linear):
    """Projection of states [B, N, D] to keys and values [B, N, 2D], or straight to what queries read there.

    A few queries need no keys and values of many tokens. Head by head, with keys ``K x`` and values ``V x``::

        q . (K x + k)  =  (K^T q) . x  +  the same for every x, which a softmax does not see
        sum p (V x + v)  =  V (sum p x)  +  v sum p

    so that queries attend to the states themselves, in D dimensions a head: 2 Q D (D + H N) products instead of
    2 N D (D + Q) of them. The result is the same up to rounding.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 2 * width)
        self.heads = heads

    def forward(
        self,
        states: Tensor,
        query: Tensor | None = None,
        mask: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Keys, then values [B, N, 2D]; or, with ``query`` [B, Q, D], as :func:`attend` onto them [B, Q, D]."""
        if query is None:
            return super().forward(states)
        batch, queries, width = query.shape
        heads, size = self.heads, width // self.heads
        to_key, to_value = self.weight.view(2, heads, size, width).unbind()
        by_head = query.view(batch * queries, heads, size).transpose(0, 1)
        searched = torch.bmm(by_head, to_key).view(heads, batch, queries, width)
        searched = searched.transpose(0, 1).reshape(batch, 1, heads * queries, width)
        read = (
            states if dropout == 0 else F.pad(states, (0, 1), value=1.0)
        )  # a last column that sums the weights
        found = F.scaled_dot_product_attention(
            searched, states[:, None], read[:, None], attn_mask=mask, dropout_p=dropout, scale=size**-0.5
        )
        found = found.view(batch, heads, queries, -1).transpose(0, 1).reshape(heads, batch * queries, -1)
        values = torch.bmm(found[..., :width], to_value.transpose(1, 2))
        value_bias = self.bias[width:].view(heads, 1, size)
        values = values + (value_bias if dropout == 0 else value_bias * found[..., width:])
        return values.transpose(0, 1).reshape(batch, queries, width)

    def is_for_few(self, queries: int, tokens: int) -> bool:
        """Whether so many queries attend to so many states with clearly fewer products than to their keys."""
        width = self.in_features
        return queries * (width + self.heads * tokens) < 0.8 * tokens * (width + queries)
