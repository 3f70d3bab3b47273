"""GLSCL's step as the paper lists it, one pass for each objective: what the shared passes are compared with.

The same parameters and the same losses as :class:`model.GLSCLForPreTraining` on images, computed the plain way:
every objective encodes its own inputs (6 vision, 6 text encoders and 5 fusions a step), text is padded to the
limit, attention is materialised, every token is projected onto the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GLSCLForPreTraining, PretrainingMasks


class LiteralStep:
    """Losses of a batch of images, pass by pass, over a model's parameters."""

    def __init__(self, model: GLSCLForPreTraining) -> None:
        self.model, self.config = model, model.config

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        masks: PretrainingMasks,
        valid: Tensor,
        objectives: Mapping[str, float],
        group_size: int,
    ) -> dict[str, Tensor]:
        """The five losses; arguments as of the model's forward (all samples valid, one group)."""
        assert bool(valid.all())
        assert group_size == len(valid)
        assert pixel_values.shape[1] == 1
        images, mask = pixel_values[:, 0], attention_mask.bool()
        model, temperature = self.model, self.config.completion_temperature

        text = model.text_projection(self.text(input_ids, mask)[:, :1])
        vision = model.vision_projection(self.vision(images)[:, :1])
        losses = {"itc": _both_ways(text, vision, model.temperature())}

        fused = self.fuse(self.text(input_ids, mask), mask, self.vision(images[masks.itm_partner]))
        pooled = model.glscl.pool(fused[0][:, :1], fused[1][:, :1])
        losses["itm"] = F.cross_entropy(model.matching_head(pooled), masks.itm_labels)

        words, _ = self.fuse(self.text(masks.mlm_input_ids, mask), mask, self.vision(images))
        logits = model.language_head(words)
        losses["mlm"] = F.cross_entropy(logits.flatten(0, 1), masks.mlm_labels.flatten(), ignore_index=-100)

        text_a, vision_a = self.fuse(
            self.text(input_ids, mask), mask, self.vision(images, kept=masks.kept_patches)
        )
        text_b, vision_b = self.fuse(self.text(masks.completion_input_ids, mask), mask, self.vision(images))
        _, vision_c = self.fuse(
            self.text(input_ids, mask), mask, self.vision(images, replaced=masks.replaced_patches)
        )
        losses["mgsc"] = _both_ways(vision_a[:, 0], vision_b[:, 0].detach(), temperature) + _both_ways(
            text_b[:, 0], text_a[:, 0].detach(), temperature
        )
        tokens = masks.completion_positions
        patches = (1 + masks.replaced_patches)[..., None].expand(-1, -1, vision_b.shape[-1])
        completed, target = vision_c.gather(1, patches), vision_b.detach().gather(1, patches)
        losses["mltc"] = _both_ways(text_b[tokens], text_a[tokens].detach(), temperature) + _both_ways(
            completed.flatten(0, 1), target.flatten(0, 1), temperature
        )
        return losses

    def text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [B, T] -> states [B, T, D] in the fusion space."""
        roberta: Any = self.model.glscl.text_encoder.roberta
        states = roberta.embeddings(input_ids=input_ids)
        for layer in roberta.encoder.layer:
            own, out = layer.attention.self, layer.attention.output
            attended = self._attend(own.query(states), own.key(states), own.value(states), mask)
            states = out.LayerNorm(states + out.dropout(out.dense(attended)))
            hidden = layer.output.dense(F.gelu(layer.intermediate.dense(states)))
            states = layer.output.LayerNorm(states + layer.output.dropout(hidden))
        return self.model.glscl.text_transform(states)

    def vision(self, images: Tensor, kept: Tensor | None = None, replaced: Tensor | None = None) -> Tensor:
        """uint8 images [B, 3, S, S] -> states [B, 1 + P, D] in the fusion space."""
        encoder: Any = self.model.glscl.vision_encoder
        side = self.config.patch_size
        mean, std = (
            torch.tensor(value, device=images.device)[:, None, None]
            for value in (self.config.image_mean, self.config.image_std)
        )
        width = self.config.hidden_size
        kernel = encoder.patch_embedding.weight.view(width, 3, side, side)
        patches = (
            F.conv2d((images.float() / 255 - mean) / std, kernel, stride=side).flatten(2).transpose(1, 2)
        )
        if replaced is not None:
            swapped = torch.zeros(patches.shape[:2], dtype=torch.bool, device=images.device)
            swapped.scatter_(1, replaced, True)
            patches = torch.where(swapped[..., None], encoder.mask_token.to(patches.dtype), patches)
        states = torch.cat([encoder.class_embedding.expand(len(images), 1, width), patches], dim=1)
        states = states + encoder.position_embedding
        if kept is not None:
            rows = torch.cat([torch.zeros_like(kept[:, :1]), 1 + kept], dim=1)
            states = states.gather(1, rows[..., None].expand(-1, -1, width))
        states = encoder.ln_pre(states)
        for block in encoder.blocks:
            query, key, value = block.qkv(block.ln_1(states)).chunk(3, dim=-1)
            states = states + block.out_proj(self._attend(query, key, value))
            hidden = F.linear(block.ln_2(states), block.fc.weight, block.fc.bias)
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            states = states + F.linear(hidden, block.proj.weight, block.proj.bias)
        return self.model.glscl.vision_transform(encoder.ln_post(states))

    def fuse(self, text: Tensor, mask: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams through all fusion layers."""
        backbone = self.model.glscl
        text = text + backbone.token_type(0, text.device)
        vision = vision + backbone.token_type(1, text.device)
        streams = backbone.fusion.text_stream, backbone.fusion.vision_stream
        for layer in range(self.config.fusion_layers):
            text, vision = (
                self._co_layer(streams[0], layer, text, mask, vision, None),
                self._co_layer(streams[1], layer, vision, None, text, mask),
            )
        return text, vision

    def _co_layer(
        self,
        stream: Any,
        layer: int,
        states: Tensor,
        mask: Tensor | None,
        other: Tensor,
        other_mask: Tensor | None,
    ) -> Tensor:
        own, cross = stream.self_attention[layer], stream.cross_attention[layer]
        key, value = own.key_value(states).chunk(2, dim=-1)
        attended = self._attend(own.query(states), key, value, mask)
        states = own.norm(states + own.dropout(own.output(attended)))
        key, value = cross.key_value(other).chunk(2, dim=-1)
        attended = self._attend(cross.query(states), key, value, other_mask)
        states = cross.norm(states + cross.dropout(cross.output(attended)))
        hidden = cross.feed_forward(F.gelu(cross.intermediate(states)))
        return cross.feed_forward_norm(states + cross.dropout(hidden))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = self.config.num_attention_heads
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(dim=-1), self.config.attention_dropout, self.model.training)
        return (weights @ value).transpose(1, 2).flatten(2)


def _both_ways(first: Tensor, second: Tensor, temperature: Tensor | float) -> Tensor:
    first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    logits = first @ second.T / temperature
    target = torch.arange(len(first), device=first.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
