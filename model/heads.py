"""Small heads on top of the encoders: poolers, ITC projections, ITM and MLM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.configuration import GLSCLConfig

#: Range in which the learned ITC temperature acts.
TEMPERATURE_RANGE = (0.001, 1.0)


class Pooler(nn.Module):
    """tanh(Linear(class token)); of several class tokens (a video's) the mean is pooled."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, class_states: Tensor) -> Tensor:
        """[B, class tokens, D] -> [B, D]."""
        return torch.tanh(self.dense(class_states.mean(dim=1)))


class ContrastiveProjection(nn.Module):
    """Linear - LayerNorm - GELU - Linear onto the space in which texts and images are compared."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.out = nn.Linear(config.hidden_size, config.projection_size)

    def forward(self, class_states: Tensor) -> Tensor:
        """[B, class tokens, D] -> [B, E], not normalised; of several class tokens the mean is projected."""
        return self.out(F.gelu(self.norm(self.dense(class_states.mean(dim=1)))))


class Temperature(nn.Module):
    """The learned temperature of ITC.

    Kept in ``TEMPERATURE_RANGE`` by a straight-through clamp: the value used never leaves the range, and the
    gradient goes on as if nothing were clamped, so that the parameter can come back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        value = self.value if self.value.dtype == torch.float64 else self.value.float()
        return value + (value.clamp(*TEMPERATURE_RANGE) - value).detach()


class MatchingHead(nn.Module):
    """Two logits of a pair: column 0 "does not match", column 1 "matches"."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(2 * config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classifier(pooled)


class MaskedLanguageHead(nn.Module):
    """Linear - GELU - LayerNorm - Linear(vocabulary); feed it the masked positions only."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.fusion_layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        return self.decoder(self.norm(F.gelu(self.dense(states))))
