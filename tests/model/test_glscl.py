"""The model as a library: features, matching, saving, configuration, parameter groups, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model import OBJECTIVES, GLSCLConfig, GLSCLForPreTraining, ModelConfigurationError
from tests.model.small import small_batch, small_config, small_model

_ALL = dict.fromkeys(OBJECTIVES, 1.0)


@pytest.mark.parametrize("frames", [1, 3])
def test_features_have_the_shapes_that_evaluation_builds_on(frames: int) -> None:
    config = small_config()
    model = small_model(config)
    batch = small_batch(config, samples=4, frames=frames)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    vision = model.encode_vision(batch.pixel_values)
    assert text.states.shape == (4, 12, 16)
    assert vision.states.shape == (4, frames + frames * 16, 16)
    for embedding in (text.embedding, vision.embedding):
        assert embedding.shape == (4, 8)
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    assert model.match(text.states, batch.attention_mask, vision.states, frames).shape == (4, 2)


@pytest.mark.parametrize("frames", [1, 2])
def test_match_gives_the_logits_that_itm_trains(frames: int) -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config, frames=frames)
    output = model(**batch.inputs(), objectives={"itm": 1.0}, group_size=6)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    vision = model.encode_vision(batch.pixel_values)
    logits = model.match(text.states, batch.attention_mask, vision.states[batch.masks.itm_partner], frames)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, batch.masks.itm_labels), output.loss)
    whole = model.glscl(batch.input_ids, batch.attention_mask, batch.pixel_values)
    own = model.match(text.states, batch.attention_mask, vision.states, frames)
    torch.testing.assert_close(model.matching_head(whole.pooled), own)


def test_padding_does_not_change_a_texts_features() -> None:
    config = small_config()
    model, batch = small_model(config), small_batch(config, samples=4)
    length = int(batch.attention_mask[1].sum())
    padded = model.encode_text(batch.input_ids, batch.attention_mask).states[1, :length]
    alone = model.encode_text(batch.input_ids[1:2, :length], batch.attention_mask[1:2, :length]).states[0]
    torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)


def test_a_saved_model_loads_bit_equal_with_an_equal_configuration(tmp_path: Path) -> None:
    config = small_config(image_mean=(0.5, 0.4, 0.3))
    model = small_model(config, torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = GLSCLForPreTraining.from_pretrained(tmp_path)
    want, got = model.state_dict(), loaded.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(want[name], got[name]) for name in want)
    ignored = ("_name_or_path", "architectures", "transformers_version", "dtype")
    first, second = (
        {k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, loaded.config)
    )
    assert first == second
    batch = small_batch(config)
    torch.testing.assert_close(
        loaded(**batch.inputs(), objectives=_ALL, group_size=6).loss,
        model.eval()(**batch.inputs(), objectives=_ALL, group_size=6).loss,
        rtol=0,
        atol=0,
    )
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_first_weights_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = GLSCLForPreTraining(GLSCLConfig.preset("tiny", initializer_range=0.02))
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any()
    encoder = model.glscl.vision_encoder
    for parameter in (encoder.position_embedding, encoder.class_embedding, encoder.mask_token):
        assert float(parameter.std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.temperature.value) == pytest.approx(0.07)


def test_every_parameter_is_in_exactly_one_group_with_its_rate_and_decay() -> None:
    model = small_model(small_config())
    groups = model.parameter_groups(base_lr=2e-5, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    assert len(seen) == len(set(seen))
    by_name = {names[id(p)]: group for group in groups for p in group["params"]}
    fast = (
        "glscl.fusion.",
        "glscl.text_pooler",
        "glscl.vision_transform",
        "language_head.",
        "matching_head.",
    )
    for name, group in by_name.items():
        if name.startswith(fast):
            assert group["lr"] == pytest.approx(1e-4), name
        if name.endswith(".bias") or "norm" in name.lower() or ".ln_" in name or name == "temperature.value":
            assert group["weight_decay"] == 0, name
        else:
            assert group["weight_decay"] == 0.01, name
    for name in ("temperature.value", "glscl.token_type_embedding.weight", "text_projection.dense.weight"):
        assert by_name[name]["lr"] == pytest.approx(2e-5)


@pytest.mark.parametrize("frames", [1, 2])
def test_activation_checkpointing_changes_nothing(frames: int) -> None:
    config = small_config()
    batch = small_batch(config, frames=frames)
    plain, checkpointed = small_model(config), small_model(config)
    checkpointed.gradient_checkpointing_enable()
    blocks = [type(m).__name__ for m in checkpointed.modules() if getattr(m, "gradient_checkpointing", False)]
    expected = {"VisionBlock": 2, "RobertaLayer": 2, "SelfAttention": 6, "CrossAttention": 6}
    assert {name: blocks.count(name) for name in expected} == expected
    losses = [m.train()(**batch.inputs(), objectives=_ALL, group_size=6).loss for m in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_dropout_acts_in_training_only() -> None:
    config = small_config(hidden_dropout=0.3, attention_dropout=0.3)
    model, batch = small_model(config), small_batch(config)
    run = {"objectives": _ALL, "group_size": 6, **batch.inputs()}
    assert not torch.equal(model.train()(**run).loss, model(**run).loss)
    assert torch.equal(model.eval()(**run).loss, model(**run).loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 190}, r"hidden_size 190 is not a multiple of model\.num_attention_heads 3"),
        ({"image_size": 60}, r"image_size 60 is not a multiple of model\.patch_size 8"),
        ({"hidden_sise": 192}, "hidden_sise is not a field.*did you mean 'hidden_size'"),
        ({"vision_layers": 0}, "vision_layers is 0"),
        ({"mlm_ratio": 1.5}, "mlm_ratio is 1.5"),
        ({"max_text_length": 500}, "max_position_embeddings 64 is too small"),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ModelConfigurationError, match=message):
        GLSCLConfig.preset("tiny", **fields)
    with pytest.raises(ModelConfigurationError, match="preset 'small' is unknown"):
        GLSCLConfig.preset("small")


def test_presets_have_the_promised_sizes() -> None:
    tiny, base = GLSCLConfig.preset("tiny", max_frames=4), GLSCLConfig.preset("base")
    assert (tiny.image_size, tiny.patch_size, tiny.hidden_size, tiny.num_patches, tiny.max_frames) == (
        64,
        8,
        192,
        64,
        4,
    )
    assert (base.hidden_size, base.vision_layers, base.text_layers, base.fusion_layers) == (768, 11, 12, 6)
    assert (base.num_patches, base.vocab_size, base.projection_size) == (324, 50265, 512)
    full = GLSCLConfig.preset("tiny", vocab_size=50265)
    assert full.mask_token_id == 50264


def test_the_package_is_light_until_used_and_brings_nothing_of_cluster_storage_or_tracking() -> None:
    code = """
import sys, model

model.GLSCLConfig.preset("tiny")
early = {"torchvision", "timm", "transformers.modeling_utils", "model.glscl"} & set(sys.modules)
assert not early, early
import model.auto
from transformers import AutoModel, AutoProcessor

assert type(AutoModel.from_config(model.GLSCLConfig.preset("tiny"))).__name__ == "GLSCLModel"
assert all(getattr(model, name) for name in model.__all__)
bad = {"ray", "deepspeed", "mlflow", "pyarrow", "s3fs", "av", "pipeline", "sharding", "cluster"}
assert not bad & set(sys.modules), bad & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
