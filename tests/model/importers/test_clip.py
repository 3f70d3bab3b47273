"""CLIP's vision transformer from its three sources."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLModel, WeightImportError, import_weights
from tests.model.importers import sources
from tests.model.importers.reference import ReleasedModel
from tests.model.small import small_batch, small_config, small_model

_PREFIX = "glscl.vision_encoder."


def _normalised(pixels: Tensor, config: GLSCLConfig) -> Tensor:
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (config.image_mean, config.image_std)
    )
    return (pixels[:, 0].double() / 255 - mean) / std


def _states(model: GLSCLForPreTraining, pixels: Tensor) -> Tensor:
    return model.glscl.vision_encoder(pixels)[0]


def _expected() -> set[str]:
    """What CLIP fills: the vision encoder but for what GLSCL added to it."""
    names = {name for name, _ in small_model(small_config()).named_parameters() if name.startswith(_PREFIX)}
    return names - {f"{_PREFIX}mask_token", f"{_PREFIX}temporal_embedding"}


def test_openai_names_give_the_states_that_openais_formulas_give() -> None:
    config = small_config()
    model, pixels = small_model(config), small_batch(config, samples=3).pixel_values
    state = sources.noise(sources.openai_clip(config, blocks=2, grid=4))
    report = import_weights(model, state)
    assert (report.kind, set(report.loaded)) == ("openai_clip", _expected())
    visual = {f"vision_transformer.{name}": value for name, value in state.items()}
    text = {f"text_transformer.{n}": t for n, t in sources.roberta(config).roberta.state_dict().items()}
    theirs = ReleasedModel(config, visual | text, video=False)
    for ours, image in zip(_states(model, pixels), pixels, strict=True):
        torch.testing.assert_close(ours, theirs.vision(image), rtol=1e-10, atol=1e-10)


def test_timms_own_model_gives_the_same_states() -> None:
    config = small_config(intermediate_size=64)
    theirs = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224",
        pretrained=False,
        **{"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 5},
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(sources.noise({n: tuple(t.shape) for n, t in theirs.state_dict().items()}))
    model, pixels = small_model(config), small_batch(config, samples=3).pixel_values
    report = import_weights(model, theirs.state_dict())
    assert (report.kind, set(report.loaded)) == ("timm_clip", _expected())
    assert set(report.ignored) == {"head.weight", "head.bias"}
    want = theirs.forward_features(_normalised(pixels, config))
    torch.testing.assert_close(_states(model, pixels), want, rtol=1e-10, atol=1e-10)


def _vision_config(layers: int = 2, side: int = 16) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=side,
        patch_size=4,
    )


def _hf(layers: int = 2, side: int = 16) -> CLIPVisionModel:
    theirs = CLIPVisionModel(_vision_config(layers, side)).double().eval()
    theirs.load_state_dict(sources.noise({n: tuple(t.shape) for n, t in theirs.state_dict().items()}))
    return theirs


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_transformers_own_model_gives_the_same_states(prefix: str) -> None:
    config = small_config()
    theirs, model = _hf(), small_model(config)
    pixels = small_batch(config, samples=3).pixel_values
    report = import_weights(model, {prefix + name: value for name, value in theirs.state_dict().items()})
    assert (report.kind, set(report.loaded)) == ("hf_clip", _expected())
    last = theirs(_normalised(pixels, config)).last_hidden_state
    # transformers normalises the class token alone, after its pooling.
    norm = dict(theirs.state_dict())
    want = F.layer_norm(last, (16,), norm["post_layernorm.weight"], norm["post_layernorm.bias"], 1e-5)
    torch.testing.assert_close(_states(model, pixels), want, rtol=1e-10, atol=1e-10)


def test_of_a_whole_clip_model_of_transformers_the_vision_half_is_taken() -> None:
    vision = _vision_config().to_dict()
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 49408}, vision_config=vision))
    state = theirs.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    report = import_weights(small_model(small_config()), state)
    assert set(report.loaded) == _expected()
    ignored = {name for name in state if name.startswith(("text_", "logit_scale", "visual_projection"))}
    assert set(report.ignored) == ignored | {"vision_model.embeddings.position_ids"}


def test_blocks_beyond_the_configured_number_are_dropped_and_reported() -> None:
    config = small_config()
    state = sources.noise(sources.openai_clip(config, blocks=3, grid=4))
    shorter = {name: value for name, value in state.items() if "visual.transformer.resblocks.2." not in name}
    model, other = small_model(config), small_model(config)
    report = import_weights(model, state)
    dropped = [name for name, reason in report.ignored.items() if "beyond the first 2 of 3 blocks" in reason]
    assert sorted(dropped) == sorted(set(state) - set(shorter))
    assert "beyond the first 2 of 3 blocks (vision_layers is 2)" in str(report)
    import_weights(other, shorter)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["openai", "hf"])
def test_fewer_blocks_than_configured_are_an_error(kind: str) -> None:
    config = small_config(vision_layers=4)
    state = sources.noise(sources.openai_clip(config, 3, 4)) if kind == "openai" else _hf(3).state_dict()
    with pytest.raises(WeightImportError, match="3 blocks in the file, but vision_layers is 4") as caught:
        import_weights(small_model(config), state)
    assert not caught.value.missing


def test_a_gap_between_the_blocks_is_named() -> None:
    config = small_config()
    state = sources.noise(sources.openai_clip(config, blocks=3, grid=4))
    state = {name: value for name, value in state.items() if "visual.transformer.resblocks.0." not in name}
    with pytest.raises(WeightImportError) as caught:
        import_weights(small_model(config), state)
    assert len(caught.value.missing) == 12
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in caught.value.missing


@pytest.mark.parametrize("side", [24, 8])
def test_positions_are_interpolated_as_the_encoder_does_at_run_time(side: int) -> None:
    """Loaded at the file's resolution and run at another = loaded at that other resolution."""
    state = sources.noise(sources.openai_clip(small_config(), blocks=2, grid=4), torch.float32)
    at_file, at_other = (small_model(c) for c in (small_config(), small_config(image_size=side)))
    assert not import_weights(at_file, state).adapted
    report = import_weights(at_other, state)
    how = f"4 x 4 -> {side // 4} x {side // 4} patches (bicubic)"
    assert report.adapted == {f"{_PREFIX}position_embedding": how}
    pixels = torch.randint(0, 256, (2, 1, 3, side, side), dtype=torch.uint8)
    torch.testing.assert_close(_states(at_file, pixels), _states(at_other, pixels), rtol=1e-5, atol=1e-5)


def test_positions_without_a_square_grid_are_refused() -> None:
    state = sources.noise(sources.openai_clip(small_config(), blocks=2, grid=4))
    state["visual.positional_embedding"] = state["visual.positional_embedding"][:-1]
    with pytest.raises(WeightImportError, match="16 positions are no class token and square grid"):
        import_weights(small_model(small_config()), state)


def test_another_patch_size_is_refused_with_both_named() -> None:
    state = sources.noise(sources.openai_clip(small_config(patch_size=2), blocks=2, grid=4))
    with pytest.raises(WeightImportError, match="patches of 2 x 2 pixels, but patch_size is 4"):
        import_weights(small_model(small_config()), state)


def test_half_precision_weights_arrive_in_the_models_precision() -> None:
    state = sources.noise(sources.openai_clip(small_config(), blocks=2, grid=4), torch.float16)
    model = small_model(small_config(), torch.float32)
    import_weights(model, state)
    got = model.glscl.vision_encoder.blocks[1].fc.weight
    assert got.dtype == torch.float32
    assert torch.equal(got, state["visual.transformer.resblocks.1.mlp.c_fc.weight"].float())


def test_a_bare_backbone_takes_the_same_weights() -> None:
    config = small_config()
    state = sources.noise(sources.openai_clip(config, blocks=2, grid=4))
    backbone = GLSCLModel(config)
    loaded = import_weights(backbone, state).loaded
    assert {f"glscl.{name}" for name in loaded} == _expected()


def test_a_resnet_is_refused_with_every_name() -> None:
    state = {
        "visual.conv1.weight": torch.zeros(8, 3, 3, 3),
        "visual.layer1.0.conv1.weight": torch.zeros(8, 8, 1, 1),
    }
    with pytest.raises(WeightImportError) as caught:
        import_weights(small_model(small_config()), state)
    assert caught.value.unexpected == ("visual.layer1.0.conv1.weight",)
    assert "visual.class_embedding" in caught.value.missing


def test_the_true_base_shapes_fit_the_base_model() -> None:
    """ViT-B/16 as OpenAI published it: 12 blocks, 14 x 14 patches; only the values are left out."""
    with torch.device("meta"):
        config = GLSCLConfig.preset("base")
        model = GLSCLForPreTraining(config)
    state = sources.on_meta(sources.openai_clip(config, blocks=12, grid=14))
    # 4 embeddings without bias, 2 norms, 11 blocks of 6 modules: everything fitted, and only then was it noticed
    # that there is nothing to copy.
    with pytest.raises(WeightImportError, match=re.escape("have no values\n  139 parameters")):
        import_weights(model, state)
