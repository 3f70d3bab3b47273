"""Each parameter begins with a value of its own draw: of the run's seed and its module's name."""

from __future__ import annotations

import torch

from model import GLSCLForPreTraining
from pipeline.training.partitioned import draw_weights, making_a_model
from tests.model.small import small_config


def drawn(seed: int, **overrides: int) -> GLSCLForPreTraining:
    with making_a_model(None):
        model = GLSCLForPreTraining(small_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what is left out shows
    draw_weights(model, seed)
    return model


def test_every_parameter_is_drawn_as_the_model_itself_draws_it() -> None:
    torch.manual_seed(0)
    usual, model = GLSCLForPreTraining(small_config()), drawn(1)
    for (name, expected), parameter in zip(usual.named_parameters(), model.parameters(), strict=True):
        assert torch.isfinite(parameter).all(), name
        if expected.std(correction=0) == 0:  # ones, zeros, the temperature
            assert torch.equal(parameter, expected), name
        else:
            assert 0.5 < float(parameter.detach().std() / expected.detach().std()) < 2, name
    padding = model.glscl.text_encoder.roberta.embeddings.word_embeddings
    assert not padding.weight[padding.padding_idx].any()


def test_a_seed_gives_the_same_weights_and_a_module_more_changes_no_other() -> None:
    first, second, other = drawn(1).state_dict(), drawn(1).state_dict(), drawn(2).state_dict()
    deeper = drawn(1, text_layers=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert len(deeper) > len(first)
    assert all(torch.equal(first[name], deeper[name]) for name in first)
