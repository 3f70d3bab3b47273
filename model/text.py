"""The text encoder: transformers' RoBERTa without its pooler."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from model.attention import Trace, attend_with_weights
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
                attn_implementation=config._attn_implementation,
            ),
            add_pooling_layer=False,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, trace: Trace | None = None) -> Tensor:
        """States [B, T, D] of ``input_ids`` [B, T]; ``attention_mask`` [B, T] is true where there is a token.

        ``trace`` collects every layer's states and, if it wants them, attention weights.

        Raises:
            ValueError: more tokens than there are positions.
        """
        config = self.roberta.config
        room = config.max_position_embeddings - config.pad_token_id - 1  # positions begin after the padding's
        if input_ids.shape[1] > room:
            raise ValueError(
                f"text of {input_ids.shape[1]} tokens, but the model has room for {room} "
                f"(max_position_embeddings {config.max_position_embeddings})"
            )
        if trace is not None and trace.want_attentions:
            return self._with_attentions(input_ids, attention_mask, trace)
        output = self.roberta(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=trace is not None
        )
        if trace is not None:
            trace.hidden_states.extend(output.hidden_states)
        return output.last_hidden_state

    def _with_attentions(self, input_ids: Tensor, attention_mask: Tensor, trace: Trace) -> Tensor:
        """RoBERTa's own layers, with attention in between that shows its weights.

        Its own way to them is to switch the whole model to eager attention, for every thread that uses it.
        """
        roberta, mask = self.roberta, attention_mask[:, None, None]
        states = roberta.embeddings(input_ids=input_ids)
        for layer in roberta.encoder.layer:
            trace.hidden_states.append(states)
            attention = layer.attention.self
            attended, weights = attend_with_weights(
                attention.query(states),
                attention.key(states),
                attention.value(states),
                attention.num_attention_heads,
                mask,
                attention.dropout.p if self.training else 0.0,
            )
            trace.attentions.append(weights)
            states = layer.feed_forward_chunk(layer.attention.output(attended, states))
        trace.hidden_states.append(states)
        return states
