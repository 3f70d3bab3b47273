"""Captions and pictures on their way into the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLImageProcessor, GLSCLProcessor, TokenizerError

_TEXTS = ["A smiling face with heart-eyes", "cat", "unbelievably ünïcödé 🙂 text"]


@pytest.fixture(scope="module")
def processor() -> GLSCLProcessor:
    return GLSCLProcessor.from_config(GLSCLConfig.preset("tiny"))


def test_the_shipped_vocabulary_is_robertas() -> None:
    processor = GLSCLProcessor.from_config(GLSCLConfig.preset("base"))
    tokens = processor.tokenize(["Hello world"])
    assert tokens["input_ids"].tolist() == [[0, 31414, 232, 2]]


def test_the_cut_vocabulary_stays_lossless_and_inside_the_table(processor: GLSCLProcessor) -> None:
    tokens = processor.tokenize(_TEXTS)
    assert int(tokens["input_ids"].max()) < 8191
    for row, text in zip(tokens["input_ids"], _TEXTS, strict=True):
        assert processor.tokenizer.decode(row, skip_special_tokens=True) == text
    assert processor.tokenizer.mask_token_id == 8191


def test_texts_are_padded_to_the_longest_and_words_numbered(processor: GLSCLProcessor) -> None:
    tokens = processor.tokenize(_TEXTS)
    ids, mask, words = tokens["input_ids"], tokens["attention_mask"], tokens["word_ids"]
    assert ids.shape == mask.shape == words.shape
    assert ids.dtype == mask.dtype == words.dtype == torch.int64
    assert int(mask.sum(1).max()) == ids.shape[1]
    special = (ids == 0) | (ids == 1) | (ids == 2)
    assert torch.equal(words == -1, special)
    assert torch.equal(mask == 0, ids == 1)
    assert words[1].max() == 0
    assert processor.tokenize(["cat"])["input_ids"].shape[1] < ids.shape[1]


def test_text_over_the_limit_is_cut_and_empty_text_defined(processor: GLSCLProcessor) -> None:
    tokens = processor.tokenize(["word " * 200, ""])
    assert tokens["input_ids"].shape == (2, 50)
    assert tokens["input_ids"][0, -1] == 2
    assert tokens["input_ids"][1, :3].tolist() == [0, 2, 1]


def test_a_tokenizer_can_come_from_a_folder_and_must_fit(tmp_path: Path, processor: GLSCLProcessor) -> None:
    processor.tokenizer.save_pretrained(tmp_path)
    again = GLSCLProcessor.from_config(GLSCLConfig.preset("tiny"), str(tmp_path))
    assert again.tokenize(_TEXTS)["input_ids"].tolist() == processor.tokenize(_TEXTS)["input_ids"].tolist()
    with pytest.raises(TokenizerError, match="8192 tokens, but the model's vocab_size is 50265"):
        GLSCLProcessor.from_config(GLSCLConfig.preset("base"), str(tmp_path))
    with pytest.raises(TokenizerError, match="no tokenizer under the name"):
        GLSCLProcessor.from_config(GLSCLConfig.preset("tiny"), str(tmp_path / "missing"))
    with pytest.raises(TokenizerError, match="no room for all bytes"):
        GLSCLProcessor.from_config(GLSCLConfig.preset("tiny", vocab_size=200))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90), (200, 70), (1, 300)])
def test_pictures_of_any_size_become_squares(processor: GLSCLProcessor, height: int, width: int) -> None:
    picture = np.full((height, width, 3), (10, 100, 200), dtype=np.uint8)
    pixels = processor.images([picture, picture])
    assert pixels.shape == (2, 1, 3, 64, 64)
    assert pixels.dtype == torch.uint8
    assert pixels[0, 0, :, 5, 5].tolist() == [10, 100, 200]
    clip = processor.video(np.stack([picture] * 3))
    assert clip.shape == (3, 3, 64, 64)
    assert torch.equal(clip[1], pixels[0, 0])


def test_the_centre_is_kept(processor: GLSCLProcessor) -> None:
    picture = np.zeros((64, 128, 3), dtype=np.uint8)
    picture[:, 32:96] = 255
    assert (processor.images([picture]) == 255).all()


def test_what_is_no_picture_is_refused(processor: GLSCLProcessor) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        processor.images([np.zeros((8, 8, 3), dtype=np.float32)])


def _picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_one_call_gives_what_a_model_takes(processor: GLSCLProcessor) -> None:
    pictures = [_picture(80, 64, 1), Image.fromarray(_picture(64, 100, 2))]
    inputs = processor(images=pictures, text=_TEXTS[:2])
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    tokens = processor.tokenize(_TEXTS[:2])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(inputs[name], tokens[name])
    assert torch.equal(inputs["pixel_values"], processor.images([np.asarray(one) for one in pictures]))
    config = GLSCLConfig.preset("tiny", vision_layers=1, text_layers=1, fusion_layers=1)
    assert GLSCLForPreTraining(config).glscl(**inputs).pooled.shape == (2, 2 * 192)


def test_one_picture_and_one_text_are_a_batch_of_one(processor: GLSCLProcessor) -> None:
    for picture in (_picture(64, 64), Image.fromarray(_picture(64, 64)), Image.new("L", (70, 64), 9)):
        inputs = processor(images=picture, text="cat")
        assert inputs["pixel_values"].shape == (1, 1, 3, 64, 64)
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
        assert len(inputs["input_ids"]) == 1
    assert set(processor(text="cat")) == {"input_ids", "attention_mask"}
    assert set(processor(images=_picture(64, 64))) == {"pixel_values"}


def test_clips_pairs_and_candidates_have_a_dimension_more(processor: GLSCLProcessor) -> None:
    clip = np.stack([_picture(70, 64, seed) for seed in range(3)])
    as_list = [Image.fromarray(frame) for frame in clip]
    for videos in (clip, as_list, [clip], [as_list], (as_list,)):
        pixels = processor(videos=videos)["pixel_values"]
        assert torch.equal(pixels, processor.video(clip)[None])
    pair = processor(images=[[_picture(64, 90), _picture(100, 64)]] * 2)["pixel_values"]
    assert pair.shape == (2, 2, 3, 64, 64)
    texts = processor(text=[["a cat", "a very long dog"], ["one", "two"]])
    flat = processor.tokenize(["a cat", "a very long dog", "one", "two"])
    assert texts["input_ids"].shape[:2] == (2, 2)
    assert torch.equal(texts["input_ids"].flatten(0, 1), flat["input_ids"])
    assert torch.equal(texts["attention_mask"].flatten(0, 1), flat["attention_mask"])


def test_padding_and_tensors_can_be_chosen(processor: GLSCLProcessor) -> None:
    inputs = processor(images=_picture(64, 64), text=["cat"], padding="max_length", return_tensors="np")
    assert isinstance(inputs["pixel_values"], np.ndarray)
    assert inputs["input_ids"].shape == (1, 50)
    assert processor(text="word " * 200)["input_ids"].shape == (1, 50)


def test_a_saved_processor_loads_as_it_was(tmp_path: Path, processor: GLSCLProcessor) -> None:
    processor.save_pretrained(tmp_path)
    GLSCLForPreTraining(
        GLSCLConfig.preset("tiny", vision_layers=1, text_layers=1, fusion_layers=1)
    ).save_pretrained(tmp_path)
    want = processor(images=_picture(80, 70), text=[*_TEXTS, "word " * 200])
    for loaded in (GLSCLProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is GLSCLProcessor
        assert type(loaded.image_processor) is GLSCLImageProcessor
        assert loaded.tokenizer.model_max_length == 50
        got = loaded(images=_picture(80, 70), text=[*_TEXTS, "word " * 200])
        assert all(torch.equal(want[name], got[name]) for name in want)
        assert torch.equal(loaded.tokenize(_TEXTS)["word_ids"], processor.tokenize(_TEXTS)["word_ids"])
        loaded.save_pretrained(tmp_path / "again")
        for file in ("processor_config.json", "tokenizer.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is GLSCLImageProcessor
    larger = GLSCLImageProcessor.from_pretrained(tmp_path, size={"height": 96, "width": 96})
    assert larger(_picture(80, 70))["pixel_values"].shape == (1, 1, 3, 96, 96)


def test_what_fits_no_batch_is_refused(processor: GLSCLProcessor) -> None:
    picture = _picture(64, 64)
    with pytest.raises(ValueError, match="images and videos together"):
        processor(images=picture, videos=picture[None])
    with pytest.raises(ValueError, match="neither images nor videos nor text"):
        processor()
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] pictures"):
        processor(images=[[picture], [picture, picture]])
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] texts"):
        processor(text=[["a"], ["b", "c"]])
    with pytest.raises(ValueError, match=r"rows of \[\] pictures"):
        processor(images=[])
    with pytest.raises(ValueError, match="must be uint8"):
        processor(images=picture / 255)
    with pytest.raises(ValueError, match="size is"):
        GLSCLImageProcessor({"height": 64, "width": 32})
