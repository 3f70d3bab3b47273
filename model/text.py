"""The text encoder: transformers' RoBERTa without its pooler."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from model.configuration import GLSCLConfig


class TextEncoder(nn.Module):
    """RoBERTa; its parameters keep transformers' names below ``roberta``."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.roberta = RobertaModel(
            RobertaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.hidden_dropout,
                attention_probs_dropout_prob=config.attention_dropout,
                max_position_embeddings=config.max_position_embeddings,
                type_vocab_size=1,
                initializer_range=config.initializer_range,
                layer_norm_eps=config.layer_norm_eps,
                pad_token_id=config.pad_token_id,
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
            ),
            add_pooling_layer=False,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States [B, T, D] of ``input_ids`` [B, T]; ``attention_mask`` [B, T] is 1 where there is a token."""
        return self.roberta(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
