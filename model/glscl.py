"""GLSCL's backbone: both encoders, the way into the fusion space, and the fusion encoder.

Shape legend: B samples, T text tokens, F frames, P patches of a frame, D width, E projection width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from model.configuration import GLSCLConfig
from model.fusion import FusionEncoder, FusionPass
from model.heads import Pooler, Temperature
from model.text import TextEncoder
from model.vision import VisionEncoder


class TextFeatures(NamedTuple):
    """A text before fusion: ``states`` [B, T, D] in the fusion space, ``embedding`` [B, E] of unit length."""

    states: Tensor
    embedding: Tensor


class VisionFeatures(NamedTuple):
    """Frames before fusion: ``states`` [B, F + F*P, D] in the fusion space, unit ``embedding`` [B, E]."""

    states: Tensor
    embedding: Tensor


@dataclass
class GLSCLModelOutput(ModelOutput):
    """Fused states.

    Args:
        text_states: [B, T, D] of the last fusion layer's text stream.
        vision_states: [B, F + F*P, D] of its vision stream, class tokens first.
        pooled: [B, 2D] text pooled, then vision pooled.
    """

    text_states: Tensor | None = None
    vision_states: Tensor | None = None
    pooled: Tensor | None = None


class GLSCLPreTrainedModel(PreTrainedModel):
    """What all GLSCL models share: configuration, initialisation, activation checkpointing."""

    config_class = GLSCLConfig
    base_model_prefix = "glscl"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("VisionBlock", "RobertaLayer", "SelfAttention", "CrossAttention")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionEncoder):
            for parameter in (module.class_embedding, module.position_embedding, module.mask_token):
                init.normal_(parameter, mean=0.0, std=std)
            init.zeros_(module.temporal_embedding)
        elif isinstance(module, Temperature):
            init.constant_(module.value, self.config.temperature_init)


class GLSCLModel(GLSCLPreTrainedModel):
    """Text and vision encoder, fusion encoder and poolers, without objectives."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.text_encoder = TextEncoder(config)
        self.vision_encoder = VisionEncoder(config)
        self.text_transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.vision_transform = nn.Linear(config.hidden_size, config.hidden_size)
        # 0 text, 1 vision, 2 the second image of a pair (NLVR2)
        self.token_type_embedding = nn.Embedding(3, config.hidden_size)
        self.fusion = FusionEncoder(config)
        self.text_pooler = Pooler(config)
        self.vision_pooler = Pooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.roberta.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.roberta.embeddings.word_embeddings = value

    def token_type(self, kind: int, device: torch.device) -> Tensor:
        """Token-type embedding [1, D] of ``kind`` (through the module, so that ZeRO-3 sees the access)."""
        return self.token_type_embedding(torch.full((1,), kind, device=device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> GLSCLModelOutput:
        """Fuse texts ``input_ids`` [B, T] with ``pixel_values`` [B, F, 3, height, width], pair by pair."""
        mask = valid_tokens(attention_mask)
        text = self.text_transform(self.text_encoder(input_ids, mask))
        vision = self.vision_transform(self.vision_encoder(pixel_values)[0])
        text = text + self.token_type(0, text.device)
        vision = vision + self.token_type(1, text.device)
        fused_text, fused_vision = self.fuse(text, mask, vision)
        pooled = self.pool(fused_text[:, :1], fused_vision[:, : pixel_values.shape[1]])
        return GLSCLModelOutput(text_states=fused_text, vision_states=fused_vision, pooled=pooled)

    def fuse(
        self,
        text: Tensor,
        mask: Tensor,
        vision: Tensor,
        text_rows: Tensor | None = None,
        vision_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One fused pass over states with token types; all rows come back, or ``*_rows`` [B, R]."""
        batch = len(text)

        def every(states: Tensor) -> Tensor:
            return torch.arange(states.shape[1], device=states.device).expand(batch, -1)

        wanted = FusionPass(
            text=0,
            vision=0,
            partner=None,
            text_rows=every(text) if text_rows is None else text_rows,
            vision_rows=every(vision) if vision_rows is None else vision_rows,
        )
        ((fused_text, fused_vision),) = self.fusion([text], mask, [vision], [wanted])
        assert fused_text is not None
        assert fused_vision is not None
        return fused_text, fused_vision

    def pool(self, text_class: Tensor, vision_classes: Tensor) -> Tensor:
        """Fused class tokens [B, 1, D] and [B, F, D] -> ``cls_feats`` [B, 2D]."""
        return torch.cat([self.text_pooler(text_class), self.vision_pooler(vision_classes)], dim=-1)


def valid_tokens(attention_mask: Tensor) -> Tensor:
    """[B, T] bool; the first token always counts, or an all-padding text's attention would be undefined."""
    mask = attention_mask.bool().clone()
    mask[:, 0] = True
    return mask
