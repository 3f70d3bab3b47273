"""The authors' checkpoints: the imported model computes what the released one does."""

from __future__ import annotations

import re

import pytest
import torch

from model import (
    GLSCLConfig,
    GLSCLForImageTextRetrieval,
    GLSCLForNLVR2,
    GLSCLForPreTraining,
    GLSCLForVisualQuestionAnswering,
    GLSCLModel,
    WeightImportError,
    import_weights,
)
from model.glscl import GLSCLPreTrainedModel
from tests.model.importers import sources
from tests.model.importers.reference import ReleasedModel
from tests.model.small import Batch, small_batch, small_config, small_model, small_model_of

_ENCODER = "glscl.vision_encoder."


def _state(config: GLSCLConfig, video: bool, token_types: int = 2) -> dict[str, torch.Tensor]:
    return sources.noise(sources.released(config, video, token_types)) | {"cl_temp": torch.tensor(0.05)}


@pytest.mark.parametrize(
    ("video", "frames", "max_frames"), [(False, 1, 4), (True, 1, 4), (True, 3, 4), (True, 3, 8)]
)
def test_every_output_is_that_of_the_released_model(video: bool, frames: int, max_frames: int) -> None:
    config = small_config(max_frames=max_frames)
    state = _state(config, video)
    model, theirs = small_model(config).eval(), ReleasedModel(config, state, video)
    report = import_weights(model, state)
    assert report.kind == "glscl"
    batch = small_batch(config, samples=3, frames=frames)
    whole = model.glscl(batch.input_ids, batch.attention_mask, batch.pixel_values)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    vision = model.encode_vision(batch.pixel_values)
    logits = model.match(text.states, batch.attention_mask, vision.states, frames)
    for row, (ids, clip) in enumerate(zip(batch.input_ids, batch.pixel_values, strict=True)):
        length = int(batch.attention_mask[row].sum())
        ids = ids[:length]
        pairs = [
            (whole.text_states[row, :length], theirs.fused(ids, clip)[0]),
            (whole.vision_states[row], theirs.fused(ids, clip)[1]),
            (logits[row], theirs.matching(ids, clip)),
            (model.language_head(whole.text_states[row, :length]), theirs.words(ids, clip)),
            (text.embedding[row], theirs.embeddings(ids, clip)[0]),
            (vision.embedding[row], theirs.embeddings(ids, clip)[1]),
        ]
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert model.temperature.value.item() == pytest.approx(0.05)


def test_a_video_models_first_temporal_embedding_moves_into_the_positions() -> None:
    config = small_config()
    state = _state(config, video=True)
    model = small_model(config)
    report = import_weights(model, state)
    assert not model.glscl.vision_encoder.temporal_embedding[0].any()
    assert report.adapted[f"{_ENCODER}position_embedding"] == "the first frame's temporal embedding added"
    assert report.adapted[f"{_ENCODER}temporal_embedding"] == (
        "the first 4 of 8 rows; the first frame's subtracted from all"
    )
    assert report.untouched[f"{_ENCODER}mask_token"] == "released video models have none"


def test_a_video_model_at_another_resolution_keeps_its_frames_apart_from_the_interpolation() -> None:
    """Loaded at the file's resolution and run at another = loaded at that other resolution."""
    state = _state(small_config(), video=True)
    at_file, at_other = (small_model(c) for c in (small_config(), small_config(image_size=24)))
    import_weights(at_file, state)
    how = import_weights(at_other, state).adapted[f"{_ENCODER}position_embedding"]
    assert how == "4 x 4 -> 6 x 6 patches (bicubic); the first frame's temporal embedding added"
    pixels = torch.randint(0, 256, (2, 2, 3, 24, 24), dtype=torch.uint8)
    got, want = (m.glscl.vision_encoder(pixels)[0] for m in (at_other, at_file))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_an_image_model_leaves_the_temporal_embedding_alone() -> None:
    config = small_config()
    model = small_model(config)
    before = model.glscl.vision_encoder.temporal_embedding.clone()
    report = import_weights(model, _state(config, video=False))
    assert torch.equal(model.glscl.vision_encoder.temporal_embedding, before)
    assert report.untouched == {f"{_ENCODER}temporal_embedding": "released image models have none"}
    assert set(report.loaded) == {n for n, _ in model.named_parameters()} - set(report.untouched)


@pytest.mark.parametrize("types", [2, 3])
def test_the_second_images_type_is_the_files_or_begins_as_the_first_images(types: int) -> None:
    config = small_config()
    state, model = _state(config, False, types), small_model(config)
    report = import_weights(model, state)
    theirs = state["token_type_embeddings.weight"]
    got = model.glscl.token_type_embedding.weight
    assert torch.equal(got[:2], theirs[:2])
    assert torch.equal(got[2], theirs[-1])
    assert ("glscl.token_type_embedding.weight" in report.adapted) == (types == 2)


def test_what_has_no_place_is_ignored_with_a_reason_and_nothing_else_is() -> None:
    config = small_config()
    extra = {
        "text_transformer.embeddings.position_ids": torch.arange(16)[None],
        "vqa_classifier.0.weight": torch.zeros(32, 32),
        "nlvr2_classifier.3.bias": torch.zeros(2),
        "rank_output.weight": torch.zeros(1, 32),
    }
    report = import_weights(small_model(config), _state(config, False) | extra)
    left_over = {
        "vision_transformer.mask_token",
        "vision_transformer.decoder_pos_embed",
        "vision_transformer.decoder_blocks.0.attn.qkv.weight",
    }
    pooler = {"text_transformer.pooler.dense.weight", "text_transformer.pooler.dense.bias"}
    assert set(report.ignored) == left_over | pooler | set(extra)
    assert report.ignored["rank_output.weight"] == "a head that is not for this model (rank_output)"
    with pytest.raises(WeightImportError, match=r"unexpected: vision_transformer\.visual\.decoder"):
        import_weights(
            small_model(config), _state(config, False) | {"vision_transformer.visual.decoder": torch.ones(1)}
        )


def test_a_bare_backbone_takes_no_head() -> None:
    config = small_config()
    report = import_weights(GLSCLModel(config), _state(config, False))
    heads = ("mlm_score", "itm_score", "cl_temp", "vision_proj", "language_proj")
    assert {name for name in report.ignored if name.startswith(heads)} == {
        name for name in _state(config, False) if name.startswith(heads)
    }
    assert "fusion.text_stream.self_attention.0.query.weight" in report.loaded


def test_a_checkpoint_without_a_head_that_the_model_has_is_named() -> None:
    config = small_config()
    state = {name: value for name, value in _state(config, False).items() if "itm_score" not in name}
    with pytest.raises(WeightImportError) as caught:
        import_weights(small_model(config), state)
    assert caught.value.missing == ("itm_score.fc.bias", "itm_score.fc.weight")


def _fine_tuned(config: GLSCLConfig, task: str) -> dict[str, torch.Tensor]:
    return sources.noise(sources.fine_tuned(config, task), seed=5) | {"cl_temp": torch.tensor(0.05)}


def test_a_model_fine_tuned_on_vqa_answers_as_the_released_one() -> None:
    config = small_config(num_labels=7)
    state = _fine_tuned(config, "vqa")
    model = small_model_of(GLSCLForVisualQuestionAnswering, config).eval()
    report = import_weights(model, state)
    assert set(report.untouched) == {f"{_ENCODER}temporal_embedding"}
    theirs, batch = ReleasedModel(config, state, video=False), small_batch(config, samples=3)
    logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    for row, (ids, image) in enumerate(_pairs(batch)):
        torch.testing.assert_close(logits[row], theirs.answers(ids, image), rtol=1e-9, atol=1e-9)


def test_a_model_fine_tuned_on_nlvr2_judges_as_the_released_one() -> None:
    config = small_config()
    state = _fine_tuned(config, "nlvr2")
    model = small_model_of(GLSCLForNLVR2, config).eval()
    report = import_weights(model, state)
    assert set(report.untouched) == {f"{_ENCODER}temporal_embedding"}
    theirs, batch = ReleasedModel(config, state, video=False), small_batch(config, samples=3, frames=2)
    logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    for row, (ids, pair) in enumerate(_pairs(batch)):
        torch.testing.assert_close(logits[row], theirs.judgement(ids, *pair), rtol=1e-9, atol=1e-9)


def test_a_model_fine_tuned_on_retrieval_ranks_as_the_released_one() -> None:
    config = small_config()
    state = _fine_tuned(config, "retrieval")
    model = small_model_of(GLSCLForImageTextRetrieval, config).eval()
    report = import_weights(model, state)
    itm = {"matching_head.classifier.weight", "matching_head.classifier.bias"}
    assert set(report.untouched) == {f"{_ENCODER}temporal_embedding"} | itm
    theirs, batch = ReleasedModel(config, state, video=False), small_batch(config, samples=3)
    output = model(
        batch.input_ids[:, None], batch.attention_mask[:, None], batch.pixel_values, return_loss=False
    )
    for row, (ids, image) in enumerate(_pairs(batch)):
        text, vision = theirs.embeddings(ids, image)
        for got, want in (
            (output.rank_logits[row], theirs.rank(ids, image)),
            (output.text_embeds[row, 0], text),
            (output.vision_embeds[row], vision),
        ):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def _pairs(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Texts without padding, each with its pixels."""
    lengths = batch.attention_mask.sum(1).tolist()
    rows = zip(batch.input_ids, lengths, batch.pixel_values, strict=True)
    return [(ids[:length], pixels) for ids, length, pixels in rows]


@pytest.mark.parametrize("kind", [GLSCLForVisualQuestionAnswering, GLSCLForNLVR2])
def test_a_pre_trained_checkpoint_leaves_a_classifier_as_it_was(kind: type[GLSCLPreTrainedModel]) -> None:
    config = small_config(num_labels=7)
    model = small_model_of(kind, config)
    heads = {name: p.clone() for name, p in model.named_parameters() if "classifier" in name}
    report = import_weights(model, _state(config, False))
    assert set(report.untouched) == {f"{_ENCODER}temporal_embedding", *heads}
    assert len(heads) == 6
    for name, before in heads.items():
        assert torch.equal(model.get_parameter(name), before)
        assert "only fine-tuned checkpoints have its weights" in report.untouched[name]


def test_the_rank_head_begins_as_the_row_of_the_itm_head_that_says_matches() -> None:
    config = small_config()
    model, state = small_model_of(GLSCLForImageTextRetrieval, config), _state(config, False)
    report = import_weights(model, state)
    assert torch.equal(model.rank_output.weight, state["itm_score.fc.weight"][1:])
    assert torch.equal(model.rank_output.bias, state["itm_score.fc.bias"][1:])
    assert report.adapted["rank_output.weight"] == "begins as row 1 of the ITM head"
    del state["itm_score.fc.weight"], state["itm_score.fc.bias"]
    with pytest.raises(WeightImportError) as caught:
        import_weights(model, state)
    assert caught.value.missing == ("itm_score.fc.bias", "itm_score.fc.weight")


def test_other_answers_than_the_files_are_refused() -> None:
    state = _fine_tuned(small_config(num_labels=7), "vqa")
    model = small_model_of(GLSCLForVisualQuestionAnswering, small_config(num_labels=5))
    with pytest.raises(
        WeightImportError, match=r"vqa_classifier.3.bias gives \[7\], but vqa_classifier.3.bias is \[5\]"
    ):
        import_weights(model, state)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"vision_layers": 1},
            "visual.transformer.resblocks.N: 2 blocks in the file, but vision_layers is 1",
        ),
        ({"fusion_layers": 2}, "cross_modal_image_layers.N: 3 layers in the file, but fusion_layers is 2"),
        ({"text_layers": 3}, "text_transformer.encoder.layer.N: 2 layers in the file, but text_layers is 3"),
        ({"max_frames": 9}, "temporal_embed: 8 rows, but max_frames is 9"),
        ({"projection_size": 4}, r"vision_proj.3.bias gives \[8\], but vision_projection.out.bias is \[4\]"),
    ],
)
def test_a_model_of_another_size_is_refused(sizes: dict[str, int], message: str) -> None:
    state = _state(small_config(), video=True)
    with pytest.raises(WeightImportError, match=message) as caught:
        import_weights(small_model(small_config(**sizes)), state)
    assert not caught.value.missing
    assert not caught.value.unexpected


@pytest.mark.parametrize("video", [False, True])
def test_the_true_base_shapes_fit_the_base_model(video: bool) -> None:
    """All of a released checkpoint's names and shapes; only the values are left out."""
    with torch.device("meta"):
        config = GLSCLConfig.preset("base")
        model = GLSCLForPreTraining(config)
    state = sources.on_meta(sources.released(config, video))
    count = len(list(model.parameters())) - 1
    with pytest.raises(WeightImportError, match=re.escape(f"have no values\n  {count} parameters")):
        import_weights(model, state)
