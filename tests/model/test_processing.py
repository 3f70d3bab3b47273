"""Captions and pictures on their way into the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model import GLSCLConfig, GLSCLProcessor
from model.processing import TokenizerError

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
