"""Task heads: what they compute, how weights go from class to class, and what the Auto classes know."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForVisualQuestionAnswering

from model import (
    GLSCLConfig,
    GLSCLForImageTextRetrieval,
    GLSCLForNLVR2,
    GLSCLForPreTraining,
    GLSCLForVisualQuestionAnswering,
    GLSCLModel,
    ModelConfigurationError,
)
from model.glscl import GLSCLPreTrainedModel
from tests.fixtures.groups import run_processes
from tests.model.small import CLASSES, arguments_of, small_batch, small_config, small_model, small_model_of

_HEADS: dict[type[GLSCLPreTrainedModel], set[str]] = {
    GLSCLModel: set(),
    GLSCLForPreTraining: {
        "text_projection",
        "vision_projection",
        "temperature",
        "matching_head",
        "language_head",
    },
    GLSCLForImageTextRetrieval: {
        "text_projection",
        "vision_projection",
        "temperature",
        "matching_head",
        "rank_output",
    },
    GLSCLForVisualQuestionAnswering: {"vqa_classifier"},
    GLSCLForNLVR2: {"nlvr2_classifier"},
}


def _config(**overrides: Any) -> GLSCLConfig:
    return small_config(num_labels=5, **overrides)


@pytest.mark.parametrize("saved", CLASSES)
def test_a_folder_of_any_class_opens_as_any_other(saved: type[GLSCLPreTrainedModel], tmp_path: Path) -> None:
    source = small_model_of(saved, _config(), torch.float32)
    source.save_pretrained(tmp_path)
    names = {name.removeprefix("glscl."): value for name, value in source.state_dict().items()}
    for opened in CLASSES:
        model, info = opened.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert {name.split(".")[0] for name in info["missing_keys"]} == _HEADS[opened] - _HEADS[saved]
        for name, value in model.state_dict().items():
            inside = name.removeprefix("glscl.")
            if inside in names and not (
                opened is GLSCLForNLVR2 and saved is not opened and inside == "token_type_embedding.weight"
            ):
                assert torch.equal(value, names[inside]), name
            assert value.isfinite().all()


def test_what_belongs_to_no_class_is_still_unexpected(tmp_path: Path) -> None:
    small_model(_config(), torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "glscl.fusion.stray": torch.zeros(1)}, file, metadata={"format": "pt"})
    _, info = GLSCLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"glscl.fusion.stray"}


def test_the_rank_head_starts_from_row_1_of_the_matching_head(tmp_path: Path) -> None:
    config = _config()
    source = small_model(config, torch.float32)
    source.save_pretrained(tmp_path / "pretrained")
    model = GLSCLForImageTextRetrieval.from_pretrained(tmp_path / "pretrained")
    assert torch.equal(model.rank_output.weight, source.matching_head.classifier.weight[1:])
    assert torch.equal(model.rank_output.bias, source.matching_head.classifier.bias[1:])
    assert model.rank_output.weight.shape == (1, 32)
    assert not any(parameter.requires_grad for parameter in model.matching_head.parameters())
    with torch.no_grad():
        model.rank_output.weight.fill_(0.25)
    model.save_pretrained(tmp_path / "tuned")
    tuned = GLSCLForImageTextRetrieval.from_pretrained(tmp_path / "tuned")
    assert (tuned.rank_output.weight == 0.25).all()
    back = GLSCLForPreTraining.from_pretrained(tmp_path / "tuned")
    assert torch.equal(back.matching_head.classifier.weight, source.matching_head.classifier.weight)
    small_model_of(GLSCLModel, config, torch.float32).save_pretrained(tmp_path / "backbone")
    fresh = GLSCLForImageTextRetrieval.from_pretrained(tmp_path / "backbone")
    assert not torch.equal(fresh.rank_output.weight, fresh.matching_head.classifier.weight[1:])


def test_the_second_images_type_starts_from_the_first_ones_and_is_then_its_own(tmp_path: Path) -> None:
    source = small_model(_config(), torch.float32)
    types = source.glscl.token_type_embedding.weight
    source.save_pretrained(tmp_path / "pretrained")
    model = GLSCLForNLVR2.from_pretrained(tmp_path / "pretrained")
    loaded = model.glscl.token_type_embedding.weight
    assert torch.equal(loaded[:2], types[:2])
    assert torch.equal(loaded[2], types[1])
    with torch.no_grad():
        loaded[2].fill_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    tuned = GLSCLForNLVR2.from_pretrained(tmp_path / "tuned")
    assert (tuned.glscl.token_type_embedding.weight[2] == 0.5).all()


def test_auto_classes_open_a_folder(tmp_path: Path) -> None:
    config = _config()
    small_model(config, torch.float32).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GLSCLConfig)
    for auto, kind in (
        (AutoModel, GLSCLModel),
        (AutoModelForPreTraining, GLSCLForPreTraining),
        (AutoModelForVisualQuestionAnswering, GLSCLForVisualQuestionAnswering),
    ):
        assert type(auto.from_pretrained(tmp_path)) is kind
        assert type(auto.from_config(config)) is kind


def test_vqa_has_the_usual_answers_unless_told_otherwise(tmp_path: Path) -> None:
    small_model(small_config(), torch.float32).save_pretrained(tmp_path)
    kind = GLSCLForVisualQuestionAnswering
    assert kind.from_pretrained(tmp_path).vqa_classifier[3].weight.shape == (3129, 32)
    assert kind.from_pretrained(tmp_path, num_labels=7).vqa_classifier[3].weight.shape == (7, 32)
    answers = {0: "no", 1: "yes"}
    model = kind.from_pretrained(tmp_path, id2label=answers)
    assert model.vqa_classifier[3].weight.shape == (2, 32)
    model.save_pretrained(tmp_path / "tuned")
    assert kind.from_pretrained(tmp_path / "tuned").config.id2label == answers
    assert GLSCLConfig(num_labels=2).num_labels == 2
    GLSCLConfig(num_labels=2).save_pretrained(tmp_path / "two")
    assert GLSCLConfig.from_pretrained(tmp_path / "two").num_labels == 2
    with pytest.raises(ModelConfigurationError, match=r"model\.num_labels is 0"):
        GLSCLConfig(num_labels=0)


def test_parameters_of_the_heads_have_the_released_names() -> None:
    shapes = {
        GLSCLForVisualQuestionAnswering: {
            "vqa_classifier.0.weight": (32, 32),
            "vqa_classifier.0.bias": (32,),
            "vqa_classifier.1.weight": (32,),
            "vqa_classifier.1.bias": (32,),
            "vqa_classifier.3.weight": (5, 32),
            "vqa_classifier.3.bias": (5,),
        },
        GLSCLForNLVR2: {
            "nlvr2_classifier.0.weight": (32, 64),
            "nlvr2_classifier.0.bias": (32,),
            "nlvr2_classifier.1.weight": (32,),
            "nlvr2_classifier.1.bias": (32,),
            "nlvr2_classifier.3.weight": (2, 32),
            "nlvr2_classifier.3.bias": (2,),
        },
    }
    for kind, wanted in shapes.items():
        found = {
            name: tuple(value.shape)
            for name, value in kind(_config()).state_dict().items()
            if not name.startswith("glscl.")
        }
        assert found == wanted


def test_a_new_answer_head_says_at_first_how_often_each_answer_is_right() -> None:
    model = small_model_of(GLSCLForVisualQuestionAnswering, _config())
    right = torch.tensor([50.0, 24.5, 9.3, 0.5, 0.0], dtype=torch.float64)
    model.begin_with_prior(right, examples=99)
    arguments = arguments_of(GLSCLForVisualQuestionAnswering, _config())
    with torch.no_grad():
        model.vqa_classifier[3].weight.zero_()
        logits = model(**arguments).logits
    wanted = torch.tensor([0.505, 0.25, 0.098, 0.01, 0.005]).double().expand(len(logits), 5)
    torch.testing.assert_close(logits.double().sigmoid(), wanted, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"sums of shape \(4,\) for 5 answers"):
        model.begin_with_prior(right[:4], examples=99)


@pytest.mark.parametrize("frames", [1, 2])
def test_vqa_sums_the_cross_entropies_of_all_answers(frames: int) -> None:
    config = _config()
    model = small_model_of(GLSCLForVisualQuestionAnswering, config)
    arguments = arguments_of(GLSCLForVisualQuestionAnswering, config, frames=frames)
    labels = arguments.pop("labels")
    output = model(**arguments, labels=labels)
    pooled = model.glscl(**arguments).pooled
    logits = model.vqa_classifier[3](F.gelu(model.vqa_classifier[1](model.vqa_classifier[0](pooled))))
    torch.testing.assert_close(output.logits, logits)
    chance = torch.sigmoid(logits)
    entropy = -(labels * chance.log() + (1 - labels) * (1 - chance).log())
    torch.testing.assert_close(output.loss, entropy.mean() * 5)
    assert model(**arguments).loss is None
    with pytest.raises(ValueError, match=r"labels of shape \(4, 4\).*\(4, 5\) of 5 answers"):
        model(**arguments, labels=labels[:, :4])
    with pytest.raises(ValueError, match=r"labels of shape \(4,\)"):
        model(**arguments, labels=torch.zeros(4, dtype=torch.long))


def test_nlvr2_fuses_the_text_with_each_image_under_its_own_type() -> None:
    config = _config()
    model = small_model_of(GLSCLForNLVR2, config)
    arguments = arguments_of(GLSCLForNLVR2, config)
    pair, labels = arguments.pop("pixel_values"), arguments.pop("labels")
    output = model(**arguments, pixel_values=pair, labels=labels)
    first = model.glscl(**arguments, pixel_values=pair[:, :1], image_type=1).pooled
    second = model.glscl(**arguments, pixel_values=pair[:, 1:], image_type=2).pooled
    torch.testing.assert_close(output.logits, model.nlvr2_classifier(torch.cat([first, second], -1)))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    swapped = model(**arguments, pixel_values=pair.flip(1)).logits
    assert not torch.allclose(swapped, output.logits)
    with pytest.raises(ValueError, match=r"pixel_values of shape \(4, 1, 3, 16, 16\) for 4 sentences"):
        model(**arguments, pixel_values=pair[:, :1])
    with pytest.raises(ValueError, match=r"labels of shape \(4, 2\)"):
        model(**arguments, pixel_values=pair, labels=torch.zeros(4, 2))


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("fusion_layers", [1, 3])
def test_retrieval_ranks_the_true_text_and_adds_itc(frames: int, fusion_layers: int) -> None:
    config = _config(fusion_layers=fusion_layers)
    model = small_model_of(GLSCLForImageTextRetrieval, config)
    arguments = arguments_of(GLSCLForImageTextRetrieval, config, frames=frames)
    output = model(**arguments, itc_weight=1.0)
    ids, mask, pixels = (arguments[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    logits = torch.empty(4, 3, dtype=torch.float64)
    for row, place in itertools.product(range(4), range(3)):
        one = slice(row, row + 1)
        pooled = model.glscl(ids[one, place], mask[one, place], pixels[one]).pooled
        logits[row, place] = model.rank_output(pooled)[0, 0]
    torch.testing.assert_close(output.rank_logits, logits)
    torch.testing.assert_close(output.rank_loss, -logits.log_softmax(1)[:, 0].mean())
    texts = model.get_text_features(ids[:, 0], mask[:, 0])
    visions = model.get_video_features(pixels)
    scores = texts @ visions.T / model.temperature()
    want = F.cross_entropy(scores, torch.arange(4)) + F.cross_entropy(scores.T, torch.arange(4))
    torch.testing.assert_close(output.itc_loss, want)
    torch.testing.assert_close(output.loss, output.rank_loss + output.itc_loss)
    torch.testing.assert_close(model(**arguments).loss, output.rank_loss + 0.5 * output.itc_loss)
    torch.testing.assert_close(output.text_embeds[:, 0], texts)
    torch.testing.assert_close(output.vision_embeds, visions)
    assert set(model(**arguments, return_loss=False)) == {"rank_logits", "text_embeds", "vision_embeds"}
    with pytest.raises(ValueError, match=r"input_ids of shape \(4, 12\).*true text first"):
        model(ids[:, 0], mask[:, 0], pixels)


def test_the_scoring_of_a_retrieval_model_is_its_rank_head() -> None:
    config = _config()
    model = small_model_of(GLSCLForImageTextRetrieval, config)
    arguments = arguments_of(GLSCLForImageTextRetrieval, config)
    ids, mask = arguments["input_ids"][:, 0], arguments["attention_mask"][:, 0]
    text, vision = model.encode_text(ids, mask), model.encode_vision(arguments["pixel_values"])
    logits = model.match(text.states, mask, vision.states, 1)
    assert logits.shape == (4, 2)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], model(**arguments).rank_logits[:, 0])


@pytest.mark.parametrize("kind", [GLSCLForPreTraining, GLSCLForImageTextRetrieval])
def test_features_are_unit_embeddings_of_texts_images_and_clips(kind: type[Any]) -> None:
    config = _config()
    model, batch = small_model_of(kind, config), small_batch(config, 4, frames=2)
    features = (
        model.get_text_features(batch.input_ids, batch.attention_mask),
        model.get_image_features(batch.pixel_values[:, :1]),
        model.get_video_features(batch.pixel_values),
    )
    for one in features:
        assert one.shape == (4, 8)
        torch.testing.assert_close(one.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(features[0], model.get_text_features(batch.input_ids))
    assert torch.equal(features[2], model.encode_vision(batch.pixel_values).embedding)
    with pytest.raises(ValueError, match="2 frames: an image has one"):
        model.get_image_features(batch.pixel_values)
    with pytest.raises(ValueError, match="text of 15 tokens, but the model has room for 14"):
        model.get_text_features(torch.full((1, 15), 7))


def _run(kind: type[GLSCLPreTrainedModel], rank: int, workers: int) -> dict[str, torch.Tensor]:
    config = _config()
    model, arguments = small_model_of(kind, config), arguments_of(kind, config, samples=8)
    arguments["valid"] = torch.arange(8) != 1
    size = 8 // workers
    part = {name: value[rank * size : (rank + 1) * size] for name, value in arguments.items()}
    loss = model(**part).loss
    loss.backward()
    gradients = {name: p.grad / workers for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach() / workers, **gradients}


_TASKS = (GLSCLForImageTextRetrieval, GLSCLForVisualQuestionAnswering, GLSCLForNLVR2)


def _worker(rank: int, workers: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    results = {}
    for kind in _TASKS:
        results[kind.__name__] = _run(kind, rank, workers)
        for value in results[kind.__name__].values():
            dist.all_reduce(value)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_fine_tune_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    run_processes(_worker, 2, port, str(tmp_path), count=2)
    results = torch.load(tmp_path / "0.pt", weights_only=True)
    for kind in _TASKS:
        expected = _run(kind, 0, 1)
        assert set(results[kind.__name__]) == set(expected)
        for name, want in expected.items():
            torch.testing.assert_close(results[kind.__name__][name], want, rtol=1e-9, atol=1e-10)
