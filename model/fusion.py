"""The fusion encoder: two streams of co-attention (METER), post-norm, run for several passes at once.

A *pass* pairs one text input with one vision input. The passes of a training step share inputs (the complete
text takes part in three of them), so the encoder is handed the distinct inputs once and the passes as
indices: the first layer's self-attention and context projections are computed per distinct input, everything
after it per pass with all passes of one length in one batch, and the last layer only for the rows that are
read.

Shape legend: B samples, T text tokens, V vision tokens of an input, R rows read, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from model.attention import KeyValue, Trace, attend, attend_with_weights, take_rows
from model.configuration import GLSCLConfig


@dataclass(frozen=True)
class FusionPass:
    """One pairing to be fused.

    Args:
        text: which of the text inputs.
        vision: which of the vision inputs.
        partner: [B] the sample whose vision input each text meets; None: its own.
        text_rows: [B, R] text positions to return; None: the text stream's result is not needed.
        vision_rows: the same for the vision stream.
    """

    text: int
    vision: int
    partner: Tensor | None
    text_rows: Tensor | None
    vision_rows: Tensor | None


class SelfAttention(GradientCheckpointingLayer):
    """Self-attention with a post-norm residual; queries may be restricted to some rows."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.heads = config, config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key_value = KeyValue(width, self.heads)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm = nn.LayerNorm(width, eps=config.fusion_layer_norm_eps)

    def forward(self, states: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """``states`` [B, N, D], ``mask`` [B, 1, 1, N], ``rows`` [B, R] or None (all) -> [B, R or N, D]."""
        context = states
        if rows is not None:
            states = take_rows(states, rows)
        attended = _read(self.config, self.key_value, self.query(states), context, mask, self.training)
        return self.norm(states + self.dropout(self.output(attended)))

    def with_weights(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All rows [B, N, D] and the attention weights [B, H, N, N]."""
        key, value = self.key_value(states).chunk(2, dim=-1)
        dropout, _ = _how(self.config, self.training)
        attended, weights = attend_with_weights(self.query(states), key, value, self.heads, mask, dropout)
        return self.norm(states + self.dropout(self.output(attended))), weights


class CrossAttention(GradientCheckpointingLayer):
    """Cross-attention onto the other stream, then the feed-forward part, both with post-norm residuals."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.heads = config, config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key_value = KeyValue(width, self.heads)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.fusion_layer_norm_eps)
        self.intermediate = nn.Linear(width, config.intermediate_size)
        self.feed_forward = nn.Linear(config.intermediate_size, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.fusion_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, states: Tensor, context: Tensor, mask: Tensor | None = None, pick: Tensor | None = None
    ) -> Tensor:
        """Let ``states`` [N, R, D] read ``context`` [N or M, V, D].

        With ``pick`` [N] row i of ``states`` reads row ``pick[i]`` of the context, projected only once.
        ``mask`` [N, 1, 1, V] is true for context tokens that may be read.
        """
        query = self.query(states)
        attended = _read(self.config, self.key_value, query, context, mask, self.training, pick)
        return self._after_attention(states, attended)

    def with_weights(
        self, states: Tensor, context: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``states`` [B, N, D] having read ``context`` [B, M, D], and the weights [B, H, N, M]."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        dropout, _ = _how(self.config, self.training)
        attended, weights = attend_with_weights(self.query(states), key, value, self.heads, mask, dropout)
        return self._after_attention(states, attended), weights

    def weights(self, states: Tensor, context: Tensor) -> Tensor:
        """The weights [B, H, N, M] alone with which ``states`` [B, N, D] read ``context`` [B, M, D]."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return attend_with_weights(self.query(states), key, value, self.heads)[1]

    def _after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        states = self.norm(states + self.dropout(self.output(attended)))
        hidden = self.feed_forward(F.gelu(self.intermediate(states)))
        return self.feed_forward_norm(states + self.dropout(hidden))


def _read(
    config: GLSCLConfig,
    key_value: KeyValue,
    query: Tensor,
    context: Tensor,
    mask: Tensor | None,
    training: bool,
    pick: Tensor | None = None,
) -> Tensor:
    """What ``query`` [N, R, D] reads in ``context`` [N or M, V, D], in the way that takes the fewest products."""
    dropout, kind = _how(config, training)
    shared = pick is not None and len(context) < len(query)  # projected once, read several times
    if kind != "eager" and not shared and key_value.is_for_few(query.shape[1], context.shape[1]):
        picked = context if pick is None else context.index_select(0, pick)
        return key_value(picked, query, mask, dropout)
    projected = key_value(context)
    if pick is not None:
        projected = projected.index_select(0, pick)
    key, value = projected.chunk(2, dim=-1)
    return attend(query, key, value, config.num_attention_heads, mask, dropout, kind)


def _how(config: GLSCLConfig, training: bool) -> tuple[float, str | None]:
    """Dropout of the attention weights and the implementation, as they are set now."""
    return config.attention_dropout if training else 0.0, config._attn_implementation


class FusionStream(nn.Module):
    """The layers of one stream."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.self_attention = nn.ModuleList(SelfAttention(config) for _ in range(config.fusion_layers))
        self.cross_attention = nn.ModuleList(CrossAttention(config) for _ in range(config.fusion_layers))


class FusionEncoder(nn.Module):
    """Both streams; layer i of each reads the outputs of layer i - 1 of the other."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.layers = config.fusion_layers
        self.text_stream = FusionStream(config)
        self.vision_stream = FusionStream(config)

    def forward(
        self,
        texts: Sequence[Tensor],
        text_mask: Tensor,
        visions: Sequence[Tensor],
        passes: Sequence[FusionPass],
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Fuse every pass.

        Args:
            texts: distinct text inputs, each [B, T, D], all with the same tokens valid.
            text_mask: [B, T] boolean, true where there is a token.
            visions: distinct vision inputs, each [B, V, D] with its own V.
            passes: the pairings wanted, in any order.

        Returns:
            per pass (text rows [B, R, D] or None, vision rows [B, R, D] or None).
        """
        results: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(passes)
        lengths = sorted({visions[p.vision].shape[1] for p in passes}, reverse=True)
        first_text = None
        if self.layers > 1:
            first_text = self.text_stream.self_attention[0](
                torch.cat(list(texts)), text_mask.repeat(len(texts), 1)[:, None, None]
            )
        for length in lengths:
            members = [i for i, p in enumerate(passes) if visions[p.vision].shape[1] == length]
            with record_function(f"fusion of {len(members)} passes with {length} vision tokens"):
                chosen = [passes[i] for i in members]
                text, vision = self._first_layer(texts, first_text, text_mask, visions, chosen)
                mask = text_mask.repeat(len(chosen), 1)[:, None, None]
                for layer in range(1, self.layers - 1):
                    text, vision = (
                        self._layer(self.text_stream, layer, text, vision, mask, None, None),
                        self._layer(self.vision_stream, layer, vision, text, None, mask, None),
                    )
                batch = text_mask.shape[0]
                for place, index in enumerate(members):
                    part = slice(place * batch, (place + 1) * batch)
                    results[index] = self._last_layer(passes[index], text[part], vision[part], mask[part])
        return results

    def trace(
        self, text: Tensor, mask: Tensor, vision: Tensor, of_text: Trace, of_vision: Trace
    ) -> tuple[Tensor, Tensor]:
        """Fuse ``text`` [B, T, D] with ``vision`` [B, V, D] in plain order, noting every layer of both streams.

        Attention weights are taken without activation checkpointing, whatever is switched on.
        """
        mask = mask[:, None, None]
        for layer in range(self.layers):
            of_text.hidden_states.append(text)
            of_vision.hidden_states.append(vision)
            text, vision = (
                self._traced_layer(self.text_stream, layer, text, vision, mask, None, of_text),
                self._traced_layer(self.vision_stream, layer, vision, text, None, mask, of_vision),
            )
        of_text.hidden_states.append(text)
        of_vision.hidden_states.append(vision)
        return text, vision

    def last_text_attention(self, text: Tensor, mask: Tensor, vision: Tensor) -> Tensor:
        """Weights [B, H, T, V] with which the last layer's text stream reads ``vision`` [B, V, D].

        The weights of all other layers are never held; nothing of the last layer but these is computed.

        Args:
            text: [B, T, D].
            mask: [B, T] boolean, true where there is a token.
        """
        mask = mask[:, None, None]
        for layer in range(self.layers - 1):
            text, vision = (
                self._layer(self.text_stream, layer, text, vision, mask, None, None),
                self._layer(self.vision_stream, layer, vision, text, None, mask, None),
            )
        last = cast(CrossAttention, self.text_stream.cross_attention[-1])
        return last.weights(self.text_stream.self_attention[-1](text, mask), vision)

    @staticmethod
    def _traced_layer(
        stream: FusionStream,
        layer: int,
        states: Tensor,
        context: Tensor,
        mask: Tensor | None,
        context_mask: Tensor | None,
        trace: Trace,
    ) -> Tensor:
        self_attention = cast(SelfAttention, stream.self_attention[layer])
        cross_attention = cast(CrossAttention, stream.cross_attention[layer])
        if not trace.want_attentions:
            return cross_attention(self_attention(states, mask), context, context_mask)
        states, weights = self_attention.with_weights(states, mask)
        trace.attentions.append(weights)
        states, weights = cross_attention.with_weights(states, context, context_mask)
        trace.cross_attentions.append(weights)
        return states

    def _first_layer(
        self,
        texts: Sequence[Tensor],
        first_text: Tensor | None,
        text_mask: Tensor,
        visions: Sequence[Tensor],
        passes: Sequence[FusionPass],
    ) -> tuple[Tensor, Tensor]:
        """Layer 0 of all passes of one length as one batch; with a single layer in all, just their inputs."""
        batch = text_mask.shape[0]
        own = torch.arange(batch, device=text_mask.device)
        used = sorted({p.vision for p in passes})
        pick_text = torch.cat([p.text * batch + own for p in passes])
        pick_vision = torch.cat(
            [used.index(p.vision) * batch + (own if p.partner is None else p.partner) for p in passes]
        )
        all_text, all_vision = torch.cat(list(texts)), torch.cat([visions[i] for i in used])
        if first_text is None:
            return all_text.index_select(0, pick_text), all_vision.index_select(0, pick_vision)
        mask = text_mask.repeat(len(passes), 1)[:, None, None]
        first_vision = self.vision_stream.self_attention[0](all_vision)
        text_cross, vision_cross = self.text_stream.cross_attention[0], self.vision_stream.cross_attention[0]
        return (
            text_cross(first_text.index_select(0, pick_text), all_vision, None, pick_vision),
            vision_cross(first_vision.index_select(0, pick_vision), all_text, mask, pick_text),
        )

    def _last_layer(
        self, fusion_pass: FusionPass, text: Tensor, vision: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        last = self.layers - 1
        text_out = vision_out = None
        if fusion_pass.text_rows is not None:
            text_out = self._layer(self.text_stream, last, text, vision, mask, None, fusion_pass.text_rows)
        if fusion_pass.vision_rows is not None:
            vision_out = self._layer(
                self.vision_stream, last, vision, text, None, mask, fusion_pass.vision_rows
            )
        return text_out, vision_out

    @staticmethod
    def _layer(
        stream: FusionStream,
        layer: int,
        states: Tensor,
        context: Tensor,
        mask: Tensor | None,
        context_mask: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        states = stream.self_attention[layer](states, mask, rows)
        return stream.cross_attention[layer](states, context, context_mask)
