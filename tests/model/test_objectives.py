"""Every loss and its gradient against the literal transcription in float64, from fixed masks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.literal import LiteralStep
from model import OBJECTIVES
from tests.model.literal import Literal
from tests.model.small import small_batch, small_config, small_model

CASES = {
    "images": {"frames": 1},
    "images_with_invalid_samples": {"frames": 1, "invalid": (1, 4, 5)},
    "images_in_two_groups": {"frames": 1, "invalid": (0,), "group_size": 3},
    "videos": {"frames": 3},
    "videos_of_eight_frames": {"frames": 8, "samples": 3, "group_size": 3},
    "videos_with_local_completion": {"frames": 2, "invalid": (2,)},
}

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize(
    ("case", "fusion_layers", "dtype"),
    [
        *((case, 3, torch.float64) for case in CASES),
        *((case, 3, torch.float32) for case in CASES),
        *((case, depth, torch.float64) for case in list(CASES)[1::3] for depth in (1, 2)),
    ],
)
def test_each_objective_and_its_gradient_equal_the_literal_computation(
    case: str, fusion_layers: int, dtype: torch.dtype
) -> None:
    config = small_config(
        fusion_layers=fusion_layers,
        mltc_on_video=case == "videos_with_local_completion",
        max_frames=max(4, CASES[case]["frames"]),  # type: ignore[call-overload]
    )
    model, batch = small_model(config, dtype), small_batch(config, **CASES[case])  # type: ignore[arg-type]
    group_size = CASES[case].get("group_size", 6)
    parameters = dict(model.named_parameters())
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    expected = Literal(config, exact).losses(batch, group_size)  # type: ignore[arg-type]
    output = model(**batch.inputs(), objectives=dict.fromkeys(OBJECTIVES, 1.0), group_size=group_size)
    near = {"rtol": _TOLERANCE[dtype], "check_dtype": False}
    for name in OBJECTIVES:
        alone = model(**batch.inputs(), objectives={name: 1.0}, group_size=group_size)
        for value in (output.losses[name], alone.loss.detach()):
            torch.testing.assert_close(value, expected[name].detach(), atol=1e-12, **near)
        if not expected[name].requires_grad:
            assert not alone.loss.requires_grad or float(alone.loss) == 0
            continue
        wanted = torch.autograd.grad(
            expected[name], list(exact.values()), allow_unused=True, retain_graph=True
        )
        got = torch.autograd.grad(alone.loss, list(parameters.values()), allow_unused=True)
        largest = max(float(w.abs().max()) for w in wanted if w is not None)
        assert largest > 0
        for parameter_name, g, w in zip(parameters, got, wanted, strict=True):
            zero = torch.zeros_like(exact[parameter_name])
            # Sums that cancel keep the rounding of their parts: relative to the largest gradient.
            torch.testing.assert_close(
                zero if g is None else g,
                zero if w is None else w,
                atol=_TOLERANCE[dtype] * largest,
                msg=lambda text, name=name, at=parameter_name: f"{name}, {at}: {text}",
                **near,
            )


def test_the_literal_step_of_the_benchmark_has_the_models_losses() -> None:
    config = small_config()
    model, batch = small_model(config, torch.float32), small_batch(config)
    weights = dict.fromkeys(OBJECTIVES, 1.0)
    losses = model(**batch.inputs(), objectives=weights, group_size=6).losses
    literal = LiteralStep(model)(**batch.inputs(), objectives=weights, group_size=6)
    assert losses.keys() == literal.keys()
    for name, value in literal.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_weighted_sum() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    weights = {"itc": 0.5, "itm": 1.0, "mlm": 1.0, "mgsc": 1.0, "mltc": 0.2}
    output = model(**batch.inputs(), objectives=weights, group_size=6)
    total = sum(weight * output.losses[name] for name, weight in weights.items())
    torch.testing.assert_close(output.loss.detach(), total, rtol=1e-12, atol=0)
    assert not any(loss.requires_grad for loss in output.losses.values())


@pytest.mark.parametrize("frames", [1, 2])
def test_what_an_invalid_sample_holds_changes_neither_loss_nor_gradient(frames: int) -> None:
    config = small_config(mltc_on_video=True)
    model, batch = small_model(config), small_batch(config, frames=frames, invalid=(1, 4))
    weights = dict.fromkeys(OBJECTIVES, 1.0)
    before = model(**batch.inputs(), objectives=weights, group_size=3)
    gradients = torch.autograd.grad(before.loss, list(model.parameters()), allow_unused=True)
    batch.pixel_values[[1, 4]] = 255 - batch.pixel_values[[1, 4]]
    batch.input_ids[[1, 4]] = config.pad_token_id
    batch.attention_mask[[1, 4]] = 0
    after = model(**batch.inputs(), objectives=weights, group_size=3)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(after.loss, list(model.parameters()), allow_unused=True)
    for old, new in zip(gradients, again, strict=True):
        if old is not None:
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_a_valid_sample_is_zero_and_finite(name: str) -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config, invalid=tuple(range(6)))
    batch.attention_mask[:] = 0
    batch.input_ids[:] = config.pad_token_id
    output = model(**batch.inputs(), objectives={name: 1.0}, group_size=6)
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert float(output.losses[name]) == 0
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("frames", [1, 2])
def test_a_batch_of_one_is_defined(frames: int) -> None:
    config = small_config(mltc_on_video=True)
    model, batch = small_model(config), small_batch(config, samples=1, frames=frames)
    output = model(**batch.inputs(), objectives=dict.fromkeys(OBJECTIVES, 1.0), group_size=1)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert float(output.losses["itc"]) == 0  # nothing to confuse it with
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_text_without_words_masks_nothing_and_stays_finite() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config, samples=2)
    batch.input_ids = torch.tensor([[0, 2], [0, 2]])
    batch.attention_mask = torch.ones(2, 2, dtype=torch.long)
    masks = batch.masks
    short = {
        "mlm_input_ids": batch.input_ids,
        "mlm_labels": torch.full((2, 2), -100),
        "completion_input_ids": batch.input_ids,
        "completion_positions": torch.zeros(2, 2, dtype=torch.bool),
    }
    batch.masks = type(masks)(**{**masks.__dict__, **short})
    output = model(**batch.inputs(), objectives={"mlm": 1.0, "mltc": 1.0}, group_size=2)
    output.loss.backward()
    assert float(output.losses["mlm"]) == 0
    assert torch.isfinite(output.loss)


def test_only_what_is_asked_for_is_computed() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    ran: list[str] = []
    for name, module in model.named_modules():
        if name in ("glscl.fusion", "language_head", "matching_head"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(**batch.inputs(), objectives={"itc": 1.0}, group_size=6)
    assert ran == []
    model(**batch.inputs(), objectives={"itc": 1.0, "itm": 1.0}, group_size=6)
    assert ran == ["glscl.fusion", "matching_head"]


def test_each_distinct_input_is_encoded_once() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    tokens = {"text": 0, "vision": 0}
    roberta, block = model.glscl.text_encoder.roberta, model.glscl.vision_encoder.blocks[0]
    roberta.encoder.layer[0].register_forward_hook(
        lambda _, given, __: tokens.update(text=tokens["text"] + given[0].shape[0])
    )
    block.register_forward_hook(
        lambda _, given, __: tokens.update(vision=tokens["vision"] + given[0].shape[0] * given[0].shape[2])
    )
    model(**batch.inputs(), objectives=dict.fromkeys(OBJECTIVES, 1.0), group_size=6)
    kept = batch.masks.kept_patches.shape[1]
    assert tokens == {"text": 3 * 6, "vision": 6 * (2 * (1 + config.num_patches) + 1 + kept)}


def test_objectives_that_do_not_exist_are_refused() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    with pytest.raises(ValueError, match=r"itx.*choose from itc"):
        model(**batch.inputs(), objectives={"itx": 1.0}, group_size=6)
    with pytest.raises(ValueError, match="groups of 4"):
        model(**batch.inputs(), objectives={"itc": 1.0}, group_size=4)


def test_the_temperature_stays_in_range_and_keeps_its_gradient() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    with torch.no_grad():
        model.temperature.value.fill_(-0.5)
    output = model(**batch.inputs(), objectives={"itc": 1.0}, group_size=6)
    output.loss.backward()
    assert float(output.metrics["temperature"]) == pytest.approx(0.001)
    assert float(model.temperature.value.grad) != 0
    assert torch.isfinite(output.loss)


def test_bf16_parameters_and_autocast_give_float32_losses_close_to_full_precision() -> None:
    config = small_config()
    batch = small_batch(config)
    weights = dict.fromkeys(OBJECTIVES, 1.0)
    exact = small_model(config, torch.float32)(**batch.inputs(), objectives=weights, group_size=6)
    half = small_model(config, torch.bfloat16)(**batch.inputs(), objectives=weights, group_size=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = small_model(config, torch.float32)(**batch.inputs(), objectives=weights, group_size=6)
    for output in (half, mixed):
        assert output.loss.dtype == torch.float32
        for name in OBJECTIVES:
            assert float(output.losses[name]) == pytest.approx(float(exact.losses[name]), rel=0.15)
    half.loss.backward()
