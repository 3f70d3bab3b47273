"""Few queries read the states themselves, with the result of reading their keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention import KeyValue, attend

_B, _Q, _N, _D, _H = 3, 2, 9, 8, 2


@pytest.fixture
def parts() -> tuple[KeyValue, Tensor, Tensor, Tensor]:
    """Projection, query, states and a mask that leaves each sample some states."""
    torch.manual_seed(0)
    projection = KeyValue(_D, _H).double()
    query = torch.randn(_B, _Q, _D, dtype=torch.float64, requires_grad=True)
    states = torch.randn(_B, _N, _D, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(_N) < torch.tensor([[9], [4], [1]]))[:, None, None]
    return projection, query, states, mask


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_of_reading_agree_in_value_and_gradient(
    parts: tuple[KeyValue, Tensor, Tensor, Tensor], masked: bool
) -> None:
    projection, query, states, mask = parts
    seen = mask if masked else None
    leaves = (query, states, projection.weight, projection.bias)
    key, value = projection(states).chunk(2, dim=-1)
    want = attend(query, key, value, _H, seen)
    got = projection(states, query, seen)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_dropout_takes_the_values_bias_with_the_weights(
    parts: tuple[KeyValue, Tensor, Tensor, Tensor],
) -> None:
    projection, query, states, _ = parts
    with torch.no_grad():
        projection.weight[:_D] = 0  # every state has the same weight 1/N
        projection.weight[_D:] = 0
        projection.bias[_D:] = torch.arange(1.0, _D + 1)
        read = projection(states, query, dropout=0.5) / projection.bias[_D:]
    # What is left of N weights of 1/N, each doubled when kept: a multiple of 2/N, one for each head.
    kept = read.view(_B, _Q, _H, _D // _H) * _N / 2
    torch.testing.assert_close(kept, kept.round())
    assert torch.equal(kept.round().amax(-1), kept.round().amin(-1))
    assert len(kept.round().unique()) > 2


def test_the_shorter_way_is_taken_for_few_queries_only() -> None:
    base = KeyValue(768, 12)
    assert base.is_for_few(queries=1, tokens=325)
    assert base.is_for_few(queries=21, tokens=325)
    assert not base.is_for_few(queries=60, tokens=325)
    assert not base.is_for_few(queries=325, tokens=325)
    assert not base.is_for_few(queries=21, tokens=21)
