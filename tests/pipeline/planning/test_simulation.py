"""A step on the meta device is the real step without its numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import OBJECTIVES, GLSCLForPreTraining
from pipeline.planning.simulation import FUSED_ATTENTION_FLOPS, Shape, StepFlops, meta_model, simulate
from tests.model.small import small_batch, small_config

WEIGHTS = dict.fromkeys(OBJECTIVES, 1.0)
#: Wide enough that products weigh more than everything else.
CONFIG = small_config(hidden_size=64, intermediate_size=256, image_size=32, fusion_layers=3)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("objectives", [WEIGHTS, {"itc": 1.0}], ids=["all", "itc"])
def test_flops_are_those_that_the_real_step_counts(frames: int, objectives: dict[str, float]) -> None:
    model = GLSCLForPreTraining(CONFIG).train()
    batch = small_batch(CONFIG, samples=6, frames=frames)
    counter = FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION_FLOPS)
    with counter:
        model(**batch.inputs(), objectives=objectives, group_size=6).loss.backward()
    real = counter.get_total_flops()
    shape = Shape(6, frames, CONFIG.image_size, batch.input_ids.shape[1], 6)
    # Texts of one length have a few more masked tokens than those of the batch; the backward is taken for twice
    # the forward.
    assert StepFlops(CONFIG, 1).of(shape, objectives) == pytest.approx(real, rel=0.06)


def test_flops_between_two_lengths_of_text_are_interpolated() -> None:
    counted = StepFlops(CONFIG, 1)
    few, some, most = (
        counted.of(Shape(4, 1, CONFIG.image_size, tokens, 4), WEIGHTS) for tokens in (8, 10, 12)
    )
    assert few < some < most
    assert some == pytest.approx((few + most) / 2)
    assert counted.of(Shape(4, 1, CONFIG.image_size, 12, 4, parts=3), WEIGHTS) == pytest.approx(3 * most)


def test_memory_is_less_with_activation_checkpointing_and_in_parts_and_more_beside_other_workers() -> None:
    config = small_config(
        hidden_size=64, intermediate_size=256, image_size=32, fusion_layers=6, vision_layers=6
    )
    shape = Shape(8, 1, 32, 10, 2)
    plain = simulate(meta_model(config), shape, WEIGHTS)
    checkpointed = simulate(meta_model(config, checkpointing=True), shape, WEIGHTS)
    in_parts = simulate(meta_model(config), Shape(2, 1, 32, 10, 2, parts=4), WEIGHTS)
    beside = simulate(meta_model(config), shape, WEIGHTS, workers=64)
    assert checkpointed.peak(0) < 0.6 * plain.peak(0)
    assert in_parts.peak(0) < 0.5 * plain.peak(0)
    assert beside.peak(0) > plain.peak(0)


def test_gradients_are_told_from_activations() -> None:
    model = meta_model(CONFIG)
    found = simulate(model, Shape(2, 1, CONFIG.image_size, 8, 2), WEIGHTS)
    trained = sum(
        parameter.numel() * 4 for name, parameter in model.named_parameters() if "temporal" not in name
    )
    assert found.moments[-1][1] == pytest.approx(trained, rel=0.02)
    assert found.moments[0][1] == 0


def test_attention_with_dropout_keeps_its_weights_on_a_cpu_alone() -> None:
    config = small_config(attention_dropout=0.1, image_size=64, hidden_size=32)
    shape = Shape(4, 1, 64, 10, 4)
    on = {
        device: simulate(meta_model(config), shape, WEIGHTS, device=device).peak(0)
        for device in ("cpu", "cuda")
    }
    assert on["cpu"] > 1.1 * on["cuda"]
    with torch.device("cpu"):
        assert torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4)).shape == (
            1,
            1,
            2,
            4,
        )
