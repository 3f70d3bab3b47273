"""Word-to-region maps: the right rows and columns of the last text-to-vision attention, summed over a word's pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from model import (
    GLSCLConfig,
    GLSCLForPreTraining,
    GLSCLImageProcessor,
    GLSCLProcessor,
    text_grids,
    word_maps,
    words_on_grid,
)
from tests.model.small import small_model

_CONFIG = GLSCLConfig.preset(
    "tiny",
    image_size=24,
    vocab_size=400,
    hidden_size=24,
    num_attention_heads=3,
    intermediate_size=32,
    vision_layers=1,
    text_layers=1,
    projection_size=8,
)


@pytest.fixture(scope="module")
def processor() -> GLSCLProcessor:
    return GLSCLProcessor.from_config(_CONFIG)


@pytest.fixture(scope="module")
def model() -> GLSCLForPreTraining:
    return small_model(_CONFIG).eval()


def _picture(height: int = 30, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@torch.no_grad()
def _attention(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, clip: np.ndarray, caption: str
) -> torch.Tensor:
    """[H, T, F + F*P] of the last fusion layer, from its own definition: the layer's inputs and weights."""
    batch = processor(videos=clip, text=caption)
    states = model.glscl(**batch, output_hidden_states=True)
    text, vision = states.fused_text_hidden_states[-2], states.fused_vision_hidden_states[-2]
    stream = model.glscl.fusion.text_stream
    text = stream.self_attention[-1](text)  # nothing is padded
    layer = stream.cross_attention[-1]
    query = layer.query(text[0])
    key, _ = layer.key_value(vision[0]).chunk(2, dim=-1)
    heads = zip(query.chunk(3, dim=-1), key.chunk(3, dim=-1), strict=True)
    return torch.stack([torch.softmax(q @ k.T / 8**0.5, dim=-1) for q, k in heads])


@pytest.mark.parametrize("frames", [1, 3])
def test_a_words_map_sums_its_pieces_and_the_global_map_is_the_class_tokens(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, frames: int
) -> None:
    clip = np.stack([_picture(seed=seed) for seed in range(frames)])
    caption = 'The cat\'s "red-hot", 猫 sofa!'
    got = word_maps(model, processor, clip, caption)
    pieces = processor.tokenizer.convert_ids_to_tokens(processor(text=caption)["input_ids"][0])
    weights = _attention(model, processor, clip, caption)
    assert got.words == ("The", "cat's", "red-hot", "猫", "sofa")
    assert got.spans == ((0, 3), (4, 9), (11, 18), (21, 22), (23, 27))
    # By hand, from how the 400 tokens of this vocabulary cut the caption: quote, hyphen, comma and ! are left out.
    assert len(pieces) == 24
    rows = ([1, 2], [3, 4, 5], [7, 8, 10, 11], [14, 15, 16, 17], [18, 19, 20, 21])
    for word, own in zip(got.words, rows, strict=True):
        text = processor.tokenizer.convert_tokens_to_string([pieces[row] for row in own]).strip()
        assert text == word.replace("-", "")
    for frame in range(frames):
        for row in range(3):
            for column in range(3):
                place = frames + frame * 9 + row * 3 + column
                for word, own in enumerate(rows):
                    want = sum(float(weights[:, token, place].max()) for token in own)
                    assert float(got.maps[word, frame, row, column]) == pytest.approx(want, rel=1e-9)
                assert float(got.global_map[frame, row, column]) == pytest.approx(
                    float(weights[:, 0, place].max()), rel=1e-9
                )


def test_a_picture_has_maps_without_frames_and_any_form_of_it_will_do(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    picture = _picture()
    got = word_maps(model, processor, picture, "a cat")
    assert got.maps.shape == (2, 3, 3)
    assert got.global_map.shape == (3, 3)
    for other in (Image.fromarray(picture), [picture], picture[None]):
        again = word_maps(model, processor, other, "a cat")
        assert torch.equal(again.maps.flatten(), got.maps.flatten())
    bare = word_maps(model.glscl, processor, picture, "a cat")
    assert torch.equal(bare.maps, got.maps)


def test_a_batch_has_the_maps_of_its_captions_alone(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    captions = ["a cat", 'The cat\'s "red-hot" sofa, unhappily!', "owl"]
    pictures = [_picture(seed=seed) for seed in range(3)]
    grids = text_grids(model, **processor(images=pictures, text=captions))
    assert grids.shape[0] == 3
    assert grids.shape[2:] == (1, 3, 3)
    for picture, caption, grid in zip(pictures, captions, grids, strict=True):
        alone, batched = (
            word_maps(model, processor, picture, caption),
            words_on_grid(processor, caption, grid[:, 0]),
        )
        assert batched.words == alone.words
        torch.testing.assert_close(batched.maps, alone.maps, rtol=1e-9, atol=0)
        torch.testing.assert_close(batched.global_map, alone.global_map, rtol=1e-9, atol=0)


def test_the_grid_is_that_of_the_processors_size(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    larger = GLSCLProcessor(GLSCLImageProcessor(40), processor.tokenizer)
    assert word_maps(model, larger, _picture(), "a cat").maps.shape == (2, 5, 5)


def test_what_the_model_does_not_read_is_named(model: GLSCLForPreTraining, processor: GLSCLProcessor) -> None:
    got = word_maps(model, processor, _picture(), "cat " * 100)
    assert set(got.words) <= {"cat", "ca", "c"}
    assert len(got.words) + got.unread.count("cat") in (100, 101)
    assert got.unread.endswith("cat")
    assert not word_maps(model, processor, _picture(), "cat ").unread


@pytest.mark.parametrize("caption", ["", "  ", "?!", "-- + --"])
def test_a_caption_without_a_word_is_refused(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, caption: str
) -> None:
    with pytest.raises(ValueError, match="has no word"):
        word_maps(model, processor, _picture(), caption)


def test_pictographs_are_words(model: GLSCLForPreTraining, processor: GLSCLProcessor) -> None:
    assert word_maps(model, processor, _picture(), "— 👍🏽 👩‍🚀 ok").words == ("👍🏽", "👩‍🚀", "ok")
