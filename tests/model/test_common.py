"""What every model class promises, as transformers' own test suite asks it of its models."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from model import (
    GLSCLConfig,
    GLSCLForImageTextRetrieval,
    GLSCLForNLVR2,
    GLSCLForPreTraining,
    GLSCLForVisualQuestionAnswering,
    GLSCLModel,
)
from model.glscl import GLSCLPreTrainedModel
from tests.model.small import CLASSES, arguments_of, small_batch, small_config, small_model_of

every_class = pytest.mark.parametrize("kind", CLASSES)
# Pre-training runs its own five passes and shows nothing of them; ask its backbone.
shows = pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not GLSCLForPreTraining])

_HIDDEN = (
    "text_hidden_states",
    "vision_hidden_states",
    "fused_text_hidden_states",
    "fused_vision_hidden_states",
)
_ATTENTIONS = (
    "text_attentions",
    "vision_attentions",
    "fused_text_attentions",
    "fused_vision_attentions",
    "text_cross_attentions",
    "vision_cross_attentions",
)


def _config(**overrides: Any) -> GLSCLConfig:
    return small_config(num_labels=5, **overrides)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, nested ones too, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    return [tensor for value in output for tensor in _tensors(value)]


def _scalar(output: ModelOutput) -> Tensor:
    """Something of every output to take gradients of."""
    loss = output.get("loss")
    return loss if loss is not None else sum((t.square().mean() for t in _tensors(output)), torch.zeros(()))


def _seen(output: Any) -> list[Any]:
    """The backbone's outputs inside an output."""
    names = ("model_output", "first_output", "second_output")
    inside = [output.get(name) for name in names if output.get(name) is not None]
    return inside or [output]


@contextlib.contextmanager
def _deprecation_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@every_class
def test_a_saved_model_loads_with_equal_outputs_and_configuration(
    kind: type[GLSCLPreTrainedModel], tmp_path: Path
) -> None:
    config = _config()
    model = small_model_of(kind, config, torch.float32).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not loaded.training
    arguments = arguments_of(kind, config)
    for one, other in zip(_tensors(model(**arguments)), _tensors(loaded(**arguments)), strict=True):
        assert torch.equal(one, other)
    assert loaded.config.num_labels == 5
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@every_class
def test_evaluation_is_deterministic_and_training_has_dropout(kind: type[GLSCLPreTrainedModel]) -> None:
    config = _config(hidden_dropout=0.3, attention_dropout=0.3)
    model, arguments = small_model_of(kind, config), arguments_of(kind, config)
    first, second = (_tensors(model.eval()(**arguments)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    first, second = (_tensors(model.train()(**arguments)) for _ in range(2))
    assert not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_class
def test_a_tuple_holds_what_the_named_output_holds(kind: type[GLSCLPreTrainedModel]) -> None:
    config = _config()
    model, arguments = small_model_of(kind, config).eval(), arguments_of(kind, config)
    named, plain = model(**arguments), model(**arguments, return_dict=False)
    assert isinstance(named, ModelOutput)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named)
    for one, other in zip(_tensors(named), _tensors(plain), strict=True):
        assert torch.equal(one, other)
    model.config.return_dict = False
    if kind is not GLSCLForPreTraining:
        plain = model(**arguments, output_attentions=True)
        named = model(**arguments, output_attentions=True, return_dict=True)
    for one, other in zip(_tensors(named), _tensors(plain), strict=True):
        assert torch.equal(one, other)


@every_class
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_eager_attention_equals_sdpa(
    kind: type[GLSCLPreTrainedModel], frames: int, dtype: torch.dtype, near: float
) -> None:
    config = _config(mltc_on_video=True)
    sdpa = small_model_of(kind, config, dtype).eval()
    eager = small_model_of(kind, _config(mltc_on_video=True, attn_implementation="eager"), dtype).eval()
    arguments = arguments_of(kind, config, frames=frames)
    assert sdpa.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    outputs = _tensors(sdpa(**arguments)), _tensors(eager(**arguments))
    assert len(outputs[0]) == len(outputs[1]) > 0
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@every_class
def test_eager_attention_never_calls_the_fused_kernel(
    kind: type[GLSCLPreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("scaled_dot_product_attention was called")

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused)
    config = _config(attn_implementation="eager")
    small_model_of(kind, config)(**arguments_of(kind, config, frames=2))
    config = _config()
    with pytest.raises(AssertionError, match="was called"):
        small_model_of(kind, config)(**arguments_of(kind, config))


@every_class
def test_the_attention_implementation_reaches_all_encoders_and_others_are_refused(
    kind: type[GLSCLPreTrainedModel], tmp_path: Path
) -> None:
    config = _config()
    model = small_model_of(kind, config, torch.float32)
    roberta = model.base_model.text_encoder.roberta
    assert roberta.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == roberta.config._attn_implementation == "eager"
    assert model.base_model.fusion.text_stream.self_attention[0].config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.base_model.text_encoder.roberta.config._attn_implementation == "eager"
    message = "attn_implementation 'flash_attention_2': GLSCL has sdpa and eager"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match=message):
        kind(_config(attn_implementation="flash_attention_2"))
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@shows
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions_have_their_number_and_shape(
    kind: type[GLSCLPreTrainedModel], frames: int, implementation: str
) -> None:
    config = _config(attn_implementation=implementation)
    model, arguments = small_model_of(kind, config).eval(), arguments_of(kind, config, frames=frames)
    plain = model(**arguments)
    output = model(**arguments, output_hidden_states=True, output_attentions=True)
    for name in plain:
        torch.testing.assert_close(output[name], plain[name], rtol=1e-10, atol=1e-10)
    frames = 1 if kind is GLSCLForNLVR2 else frames
    pairs = 12 if kind is GLSCLForImageTextRetrieval else 4
    text, vision, width, heads = 12, frames + frames * 16, 16, 2
    for seen in _seen(output):
        for name, layers, tokens in zip(_HIDDEN, (2, 2, 3, 3), (text, vision, text, vision), strict=True):
            assert [tuple(x.shape) for x in seen[name]] == [(pairs, tokens, width)] * (layers + 1), name
        shapes = ((text, text), (vision, vision)) * 2 + ((text, vision), (vision, text))
        for name, layers, shape in zip(_ATTENTIONS, (2, 2, 3, 3, 3, 3), shapes, strict=True):
            assert [tuple(x.shape) for x in seen[name]] == [(pairs, heads, *shape)] * layers, name
            for weights in seen[name]:
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
                assert (weights >= 0).all()
        assert torch.equal(seen.fused_text_hidden_states[-1], seen.text_states)
        assert torch.equal(seen.fused_vision_hidden_states[-1], seen.vision_states)


@shows
def test_only_what_is_asked_for_is_returned_and_the_configuration_can_ask(
    kind: type[GLSCLPreTrainedModel],
) -> None:
    config = _config()
    model, arguments = small_model_of(kind, config).eval(), arguments_of(kind, config)

    def shown(**asked: bool) -> set[str]:
        return {name for seen in _seen(model(**arguments, **asked)) for name in seen} & {
            *_HIDDEN,
            *_ATTENTIONS,
        }

    assert shown() == set()
    assert shown(output_hidden_states=True) == set(_HIDDEN)
    assert shown(output_attentions=True) == set(_ATTENTIONS)
    model.config.output_hidden_states = True
    assert shown() == set(_HIDDEN)
    assert shown(output_hidden_states=False) == set()


def test_attention_weights_are_those_that_the_states_were_made_with() -> None:
    """Recomputed from the hidden states and parameters, for every encoder and both streams."""
    config = _config()
    model, batch = small_model_of(GLSCLModel, config).eval(), small_batch(config, 3, frames=2)
    seen = model(
        batch.input_ids,
        batch.attention_mask,
        batch.pixel_values,
        output_hidden_states=True,
        output_attentions=True,
    )

    def weights(query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
        parts = [x.view(*x.shape[:2], 2, 8).transpose(1, 2) for x in (query, key)]
        scores = parts[0] @ parts[1].transpose(-1, -2) / 8**0.5
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1)

    words = batch.attention_mask.bool()[:, None, None]
    everything = torch.ones((), dtype=torch.bool)
    for i, layer in enumerate(model.text_encoder.roberta.encoder.layer):
        states, attention = seen.text_hidden_states[i], layer.attention.self
        want = weights(attention.query(states), attention.key(states), words)
        torch.testing.assert_close(seen.text_attentions[i], want)
    frame_of = torch.tensor([0, 1] + [0] * 16 + [1] * 16)
    allowed = (frame_of[:, None] == frame_of[None]) | (torch.arange(34) < 2)[:, None]
    for i, block in enumerate(model.vision_encoder.blocks):
        query, key, _ = block.qkv(block.ln_1(seen.vision_hidden_states[i])).chunk(3, -1)
        torch.testing.assert_close(seen.vision_attentions[i], weights(query, key, allowed))
    for i, (name, other, mask, other_mask) in itertools.product(
        range(3), [("text", "vision", words, everything), ("vision", "text", everything, words)]
    ):
        stream = getattr(model.fusion, f"{name}_stream")
        states, context = (seen[f"fused_{which}_hidden_states"][i] for which in (name, other))
        attention, cross = stream.self_attention[i], stream.cross_attention[i]
        want = weights(attention.query(states), attention.key_value(states).chunk(2, -1)[0], mask)
        torch.testing.assert_close(seen[f"fused_{name}_attentions"][i], want)
        states = attention(states, None if mask is everything else mask)
        want = weights(cross.query(states), cross.key_value(context).chunk(2, -1)[0], other_mask)
        torch.testing.assert_close(seen[f"{name}_cross_attentions"][i], want)


def test_asking_to_see_attention_leaves_the_implementation_alone() -> None:
    config = _config()
    model, arguments = small_model_of(GLSCLModel, config).eval(), arguments_of(GLSCLModel, config)
    before = model(**arguments)
    model(**arguments, output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    assert model.text_encoder.roberta.config._attn_implementation == "sdpa"
    assert torch.equal(model(**arguments).pooled, before.pooled)


@shows
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_can_be_kept_at_hidden_states_and_attentions(
    kind: type[GLSCLPreTrainedModel], frames: int, implementation: str
) -> None:
    config = _config(attn_implementation=implementation)
    model, arguments = small_model_of(kind, config).train(), arguments_of(kind, config, frames=frames)
    output = model(**arguments, output_hidden_states=True, output_attentions=True)
    kept = [(name, x) for seen in _seen(output) for name in (*_HIDDEN, *_ATTENTIONS) for x in seen[name]]
    for _, tensor in kept:
        tensor.retain_grad()
    _scalar(output).backward()
    for name, tensor in kept:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name


@every_class
@pytest.mark.parametrize("frames", [1, 2])
def test_activation_checkpointing_gives_the_same_gradients_for_less_memory(
    kind: type[GLSCLPreTrainedModel], frames: int
) -> None:
    config = _config()
    arguments = arguments_of(kind, config, frames=frames)
    if kind is not GLSCLForPreTraining and frames == 2:
        arguments["output_hidden_states"] = True
    plain, checkpointed = (small_model_of(kind, config).train() for _ in range(2))
    with _deprecation_ignored():
        checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing
    losses, sizes = [], []
    for model in (plain, checkpointed):
        own = {parameter.data_ptr() for parameter in model.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: Tensor, own: set[int] = own, held: dict[int, int] = held) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = _scalar(model(**arguments))
        sizes.append(sum(held.values()))
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11)
    assert sizes[1] < 0.5 * sizes[0], sizes


@every_class
def test_every_parameter_is_initialised_by_the_seed_alone(kind: type[GLSCLPreTrainedModel]) -> None:
    config = _config()
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(kind(config))
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name
    # Nothing may be left as it was found in memory.
    for module in models[0].modules():
        module._is_hf_initialized = False
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.fill_(torch.nan)
    models[0].initialize_weights()
    for name, parameter in models[0].named_parameters():
        assert parameter.isfinite().all(), name


@pytest.mark.parametrize("kind", [GLSCLForVisualQuestionAnswering, GLSCLForNLVR2, GLSCLForImageTextRetrieval])
def test_task_heads_start_normal_with_zero_bias(kind: type[GLSCLPreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = kind(small_config(hidden_size=96))
    heads = [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith("glscl")
    ]
    assert heads
    for head in heads:
        assert float(head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
        assert not head.bias.any()


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision_is_finite_forward_and_backward(
    kind: type[GLSCLPreTrainedModel], dtype: torch.dtype, implementation: str
) -> None:
    config = _config(attn_implementation=implementation)
    torch.manual_seed(0)
    model, arguments = kind(config).to(dtype).train(), arguments_of(kind, config, frames=2)
    output = model(**arguments)
    assert all(tensor.isfinite().all() for tensor in _tensors(output))
    _scalar(output).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    wide = kind(config)
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    for low, high in zip(_tensors(output), _tensors(wide(**arguments)), strict=True):
        torch.testing.assert_close(low.float(), high, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "per_sample"),
    [
        (GLSCLModel, ("vision_states", "pooled")),
        (GLSCLForImageTextRetrieval, ("rank_logits", "text_embeds", "vision_embeds")),
        (GLSCLForVisualQuestionAnswering, ("logits",)),
        (GLSCLForNLVR2, ("logits",)),
    ],
)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_batch_gives_what_its_samples_give_one_by_one(
    kind: type[GLSCLPreTrainedModel], per_sample: tuple[str, ...], frames: int
) -> None:
    config = _config()
    model, arguments = small_model_of(kind, config).eval(), arguments_of(kind, config, frames=frames)
    together = model(**arguments)
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in arguments.items()}
        longest = int(alone["attention_mask"].sum(-1).max())
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][..., :longest]
        one = model(**alone)
        for name in per_sample:
            torch.testing.assert_close(one[name][0], together[name][row], rtol=1e-10, atol=1e-10)
        if kind is GLSCLModel:
            torch.testing.assert_close(
                one.text_states[0], together.text_states[row, :longest], rtol=1e-10, atol=1e-10
            )


@every_class
def test_another_resolution_is_that_of_a_model_with_interpolated_positions(
    kind: type[GLSCLPreTrainedModel],
) -> None:
    config, larger = _config(), _config(image_size=24)
    model, other = small_model_of(kind, config).eval(), small_model_of(kind, larger).eval()
    state = model.state_dict()
    name = next(name for name in state if name.endswith("vision_encoder.position_embedding"))
    table = state[name]
    square = table[1:].T.reshape(1, -1, 4, 4)
    resized = nn.functional.interpolate(square, size=(6, 6), mode="bicubic", align_corners=False)
    state[name] = torch.cat([table[:1], resized[0].flatten(1).T])
    other.load_state_dict(state)
    arguments = arguments_of(kind, larger)
    for one, want in zip(_tensors(model(**arguments)), _tensors(other(**arguments)), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-10, atol=1e-10)


@every_class
def test_the_vocabulary_can_grow_and_the_mlm_decoder_follows(
    kind: type[GLSCLPreTrainedModel], tmp_path: Path
) -> None:
    config = _config()
    model, arguments = small_model_of(kind, config, torch.float32).eval(), arguments_of(kind, config)
    before = model(**arguments)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    embeddings = model.resize_token_embeddings(70)
    assert embeddings is model.get_input_embeddings()
    assert embeddings.weight.shape == (70, 16)
    assert embeddings.padding_idx == config.pad_token_id
    assert model.config.vocab_size == model.base_model.text_encoder.roberta.config.vocab_size == 70
    assert torch.equal(embeddings.weight[:60], old[_word_embeddings(model)])
    decoder = model.get_output_embeddings()
    if kind is GLSCLForPreTraining:
        assert decoder is model.language_head.decoder
        assert decoder.weight.shape == (70, 16)
        assert decoder.bias.shape == (70,)
        assert torch.equal(decoder.weight[:60], old["language_head.decoder.weight"])
        assert torch.equal(decoder.bias[:60], old["language_head.decoder.bias"])
        after = model(**arguments)
        assert after.losses["itc"] == before.losses["itc"]
        assert after.losses["mlm"] > before.losses["mlm"]  # more words to choose from
    else:
        assert decoder is None
        for one, other in zip(_tensors(model(**arguments)), _tensors(before), strict=True):
            assert torch.equal(one, other)
    arguments["input_ids"] = arguments["input_ids"].clamp(max=58)
    arguments["input_ids"][..., 1] = 69
    assert all(tensor.isfinite().all() for tensor in _tensors(model(**arguments)))
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    for one, other in zip(_tensors(model(**arguments)), _tensors(loaded(**arguments)), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="vocabulary of 59 tokens would lose <mask>, which is 59"):
        model.resize_token_embeddings(59)


def _word_embeddings(model: GLSCLPreTrainedModel) -> str:
    prefix = "" if isinstance(model, GLSCLModel) else "glscl."
    return f"{prefix}text_encoder.roberta.embeddings.word_embeddings.weight"


@every_class
def test_wrong_sizes_are_refused_with_their_numbers(kind: type[GLSCLPreTrainedModel]) -> None:
    config = _config()
    model, arguments = small_model_of(kind, config), arguments_of(kind, config)
    pixels = arguments["pixel_values"]
    with pytest.raises(ValueError, match="18 x 16 pixels: both sides must be multiples of 4"):
        model(**{**arguments, "pixel_values": torch.zeros(*pixels.shape[:3], 16, 18, dtype=torch.uint8)})
    if kind is not GLSCLForNLVR2:
        with pytest.raises(ValueError, match=r"5 frames, but the model has room for 4 \(max_frames\)"):
            model(**{**arguments, "pixel_values": torch.zeros(4, 5, 3, 16, 16, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"pixel_values of shape \(4, 3, 16, 16\)"):
        model(**{**arguments, "pixel_values": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)})
    if kind is GLSCLForPreTraining:
        return  # its texts come with their masks, which are drawn for the limit
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(**{**arguments, "pixel_values": None})
    long = {name: arguments[name].repeat_interleave(2, dim=-1) for name in ("input_ids", "attention_mask")}
    for asked in ({}, {"output_attentions": True}):
        with pytest.raises(
            ValueError,
            match=r"text of 24 tokens, but the model has room for 14 \(max_position_embeddings 16\)",
        ):
            model(**{**arguments, **long}, **asked)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(**{**arguments, "attention_mask": arguments["attention_mask"][..., :-1]})
    short = {name: arguments[name][..., :0] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="one at least"):
        model(**{**arguments, **short})
    with pytest.raises(ValueError, match=r"for 3 sentences|3 texts for 4 images|for 4 samples"):
        model(**{**arguments, "input_ids": arguments["input_ids"][:3], "attention_mask": None})


def test_the_longest_text_that_has_positions_is_taken() -> None:
    config = _config()
    model = small_model_of(GLSCLModel, config)
    output = model(torch.full((1, 14), 7), pixel_values=torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8))
    assert output.text_states.shape == (1, 14, 16)


@every_class
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_sample_and_text_of_padding_only_are_defined(
    kind: type[GLSCLPreTrainedModel], implementation: str
) -> None:
    config = _config(attn_implementation=implementation)
    model, arguments = small_model_of(kind, config).train(), arguments_of(kind, config, samples=1)
    if kind is not GLSCLForPreTraining:
        arguments["input_ids"] = torch.full_like(arguments["input_ids"], config.pad_token_id)
    arguments["attention_mask"] = torch.zeros_like(arguments["attention_mask"])
    output = model(**arguments)
    assert all(tensor.isfinite().all() for tensor in _tensors(output))
    _scalar(output).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not GLSCLModel])
def test_samples_that_do_not_count_change_nothing_and_none_left_is_zero(
    kind: type[GLSCLPreTrainedModel],
) -> None:
    config = _config()
    model, arguments = small_model_of(kind, config).train(), arguments_of(kind, config)
    arguments["valid"] = torch.tensor([True, False, True, True])
    loss = model(**arguments).loss
    if kind is not GLSCLForPreTraining:  # whose masks belong to the whole batch
        rest = [0, 2, 3]
        fewer = {name: value[rest] for name, value in arguments.items()}
        torch.testing.assert_close(model(**fewer).loss, loss, rtol=1e-10, atol=1e-10)
        arguments["pixel_values"] = arguments["pixel_values"].clone()
        arguments["pixel_values"][1] = 0
        torch.testing.assert_close(model(**arguments).loss, loss, rtol=1e-12, atol=1e-12)
    arguments["valid"] = torch.zeros(4, dtype=torch.bool)
    model.zero_grad()
    loss = model(**arguments).loss
    assert not loss.detach()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    if kind is not GLSCLForPreTraining:
        with pytest.raises(ValueError, match=r"4 samples, but validity flags of shape \(3,\)"):
            model(**{**arguments, "valid": torch.ones(3, dtype=torch.bool)})


def test_a_text_without_any_token_counts_its_first() -> None:
    config = _config()
    model, arguments = small_model_of(GLSCLModel, config).eval(), arguments_of(GLSCLModel, config)
    nothing = torch.zeros_like(arguments["attention_mask"])
    first = nothing.clone()
    first[:, 0] = 1
    outputs = [model(**{**arguments, "attention_mask": mask}).pooled for mask in (nothing, first)]
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], model(**arguments).pooled)


def test_without_a_mask_every_token_but_padding_counts() -> None:
    config = _config()
    model, arguments = small_model_of(GLSCLModel, config).eval(), arguments_of(GLSCLModel, config)
    with_mask = model(**arguments)
    without = model(arguments["input_ids"], pixel_values=arguments["pixel_values"])
    assert torch.equal(with_mask.pooled, without.pooled)


@every_class
def test_every_trainable_parameter_is_in_one_group_with_its_rate(kind: type[GLSCLPreTrainedModel]) -> None:
    model = small_model_of(kind, _config())
    groups = model.parameter_groups(1.0, 0.01, fusion_multiplier=10.0, head_multiplier=50.0)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert sorted(rates) == sorted(names.values())
    assert sum(len(group["params"]) for group in groups) == len(rates)
    for name, rate in rates.items():
        inside = name.removeprefix("glscl.")
        head = inside.startswith(("matching_head", "language_head", "rank_", "vqa_", "nlvr2_"))
        fused = inside.startswith(
            ("fusion.", "text_transform", "vision_transform", "text_pooler", "vision_pooler")
        )
        assert rate == (50.0 if head else 10.0 if fused else 1.0), name
