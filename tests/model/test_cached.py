"""A batch computed in parts gives the gradient of the undivided one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import GLSCLForPreTraining, GLSCLPreTrainingOutput, backward_in_parts
from tests.model.small import Batch, small_batch, small_config, small_model

_ALL = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}
_GROUP = 2
_CASES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "images": (_ALL, {}),
    "images_with_invalid_samples": (_ALL, {"invalid": (1, 6)}),
    "a_part_without_a_valid_sample": (_ALL, {"invalid": (4, 5)}),
    "nothing_valid": (_ALL, {"invalid": tuple(range(8))}),
    "videos": (_ALL, {"frames": 2, "invalid": (3,)}),
    "contrast_alone": ({"itc": 1.0}, {}),
    "completion_alone": ({"mgsc": 1.0, "mltc": 0.2}, {}),
    "nothing_to_compare": ({"itm": 1.0, "mlm": 1.0}, {}),
}


def _whole(model: GLSCLForPreTraining, batch: Batch, objectives: dict[str, float]) -> GLSCLPreTrainingOutput:
    output = model(**batch.inputs(), objectives=objectives, group_size=_GROUP)
    output.loss.backward()
    return output


def _in_parts(
    model: GLSCLForPreTraining, batch: Batch, objectives: dict[str, float], size: int
) -> GLSCLPreTrainingOutput:
    parts = []
    for start in range(0, len(batch.valid), size):
        part = batch.part(start, start + size)
        longest = int(part.attention_mask.sum(1).max())
        part.input_ids, part.attention_mask = part.input_ids[:, :longest], part.attention_mask[:, :longest]
        part.masks = part.masks.trimmed(longest)
        parts.append(part.inputs())
    return backward_in_parts(
        model,
        lambda loss: loss.backward(),
        parts,
        config=model.config,
        objectives=objectives,
        group_size=_GROUP,
        reseed=lambda number: torch.manual_seed(number),
    )


def _gradients(model: GLSCLForPreTraining) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("case", _CASES)
def test_parts_give_the_losses_and_the_gradient_of_the_undivided_batch(case: str, hard: bool) -> None:
    objectives, batch_options = _CASES[case]
    if hard and "itm" in objectives and "itc" not in objectives:
        pytest.skip("hard negatives need itc")
    config = small_config(mltc_on_video=True, hard_negatives=hard)
    model = small_model(config)
    batch = small_batch(config, 8, group_size=_GROUP, **batch_options)
    want = _whole(model, batch, objectives)
    gradients = _gradients(model)
    assert case == "nothing_valid" or any(g.abs().max() > 1e-3 for g in gradients.values())
    for size in (8, 4, 2):
        got = _in_parts(model, batch, objectives, size)
        torch.testing.assert_close(got.loss, want.loss.detach(), rtol=1e-10, atol=1e-12, check_dtype=False)
        assert got.losses.keys() == want.losses.keys()
        assert got.metrics.keys() == want.metrics.keys()
        for name, value in {**want.losses, **want.metrics}.items():
            torch.testing.assert_close({**got.losses, **got.metrics}[name], value, rtol=1e-10, atol=1e-12)
        for name, value in _gradients(model).items():
            torch.testing.assert_close(
                value, gradients[name], rtol=1e-9, atol=1e-10, msg=lambda text, at=name: f"{at}: {text}"
            )


def test_dropout_is_the_same_in_both_passes_over_a_part() -> None:
    config = small_config(hidden_dropout=0.3, attention_dropout=0.3)
    model = small_model(config).train()
    batch = small_batch(config, 4, group_size=_GROUP)
    torch.manual_seed(0)  # as the first part is seeded
    want = _whole(model, batch, _ALL)
    gradients = _gradients(model)
    got = _in_parts(model, batch, _ALL, 4)
    torch.testing.assert_close(got.loss, want.loss.detach(), rtol=1e-10, atol=1e-12)
    for name, value in _gradients(model).items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-9, atol=1e-10)
    torch.manual_seed(1)
    assert not torch.allclose(_whole(model, batch, _ALL).loss, want.loss)  # dropout does act


def test_a_part_keeps_no_graph_of_another() -> None:
    """What one part needs in memory does not grow with the number of parts."""
    config = small_config()
    model = small_model(config)
    alive: list[int] = []

    def size_of_graph(loss: Tensor) -> None:
        seen, rest = set(), [loss.grad_fn]
        while rest:
            node = rest.pop()
            if node is not None and node not in seen:
                seen.add(node)
                rest += [parent for parent, _ in node.next_functions]
        alive.append(len(seen))
        loss.backward()

    part = small_batch(config, 2, group_size=_GROUP).inputs()
    for parts in (2, 4):
        backward_in_parts(
            model,
            size_of_graph,
            [part] * parts,
            config=config,
            objectives=_ALL,
            group_size=_GROUP,
            reseed=lambda number: None,
        )
    assert len(alive) == 2 + 4
    assert max(alive) == min(alive)
