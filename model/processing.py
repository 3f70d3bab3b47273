"""From strings and decoded pictures to the tensors the model takes."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.configuration import GLSCLConfig

_SHIPPED = "builtin"


class TokenizerError(ValueError):
    """A tokenizer that cannot be had, or does not fit the model."""


class GLSCLProcessor:
    """Tokenises captions and brings pictures to the model's size.

    Make one with :meth:`from_config`. Normalisation by mean and standard deviation happens inside the model.
    """

    def __init__(self, config: GLSCLConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_config(cls, config: GLSCLConfig, tokenizer: str = _SHIPPED) -> GLSCLProcessor:
        """A processor for models of ``config``.

        Args:
            tokenizer: ``builtin`` for the RoBERTa vocabulary shipped with the package (cut to its first
                merges if ``config.vocab_size`` is smaller), or the name or path of a Hugging Face tokenizer.

        Raises:
            TokenizerError: it cannot be loaded, is not a fast one (word numbers are needed), or its
                vocabulary or special tokens are not those of ``config``.
        """
        loaded = _builtin(config.vocab_size) if tokenizer == _SHIPPED else _pretrained(tokenizer)
        if not loaded.is_fast:
            raise TokenizerError(
                f"tokenizer {tokenizer!r} has no fast version, which is needed for word numbers"
            )
        if len(loaded) != config.vocab_size:
            raise TokenizerError(
                f"tokenizer {tokenizer!r} has {len(loaded)} tokens, "
                f"but the model's vocab_size is {config.vocab_size}"
            )
        for name in ("bos", "pad", "eos", "unk", "mask"):
            have, want = getattr(loaded, f"{name}_token_id"), getattr(config, f"{name}_token_id")
            if have != want:
                raise TokenizerError(
                    f"tokenizer {tokenizer!r} has {name}_token_id {have}, but the model's is {want}"
                )
        return cls(config, loaded)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenise captions, cut to ``config.max_text_length`` tokens and padded to the longest of them.

        Returns:
            ``input_ids``, ``attention_mask`` and ``word_ids``, each [B, T] int64; ``word_ids`` numbers the
            words of a caption from 0 and is -1 on special tokens and padding.
        """
        encoded = self.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.config.max_text_length
        )
        words = [
            [-1 if word is None else word for word in encoded.word_ids(index)] for index in range(len(texts))
        ]
        return {
            "input_ids": torch.tensor(encoded["input_ids"], dtype=torch.int64),
            "attention_mask": torch.tensor(encoded["attention_mask"], dtype=torch.int64),
            "word_ids": torch.tensor(words, dtype=torch.int64),
        }

    def images(self, images: list[np.ndarray]) -> Tensor:
        """Pictures uint8 [height, width, 3] of any size -> uint8 [B, 1, 3, S, S] (resized, centre crop)."""
        return torch.stack([self.video(image[None]) for image in images])

    def video(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [F, height, width, 3] -> uint8 [F, 3, S, S]: shorter side to S, centre crop."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [F, height, width, 3], not {frames.dtype} {frames.shape}")
        side = self.config.image_size
        fitted = np.stack([_fit(frame, side) for frame in frames])
        return torch.from_numpy(fitted).permute(0, 3, 1, 2).contiguous()


def _fit(picture: np.ndarray, side: int) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    resized = (
        Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        if size != (width, height)
        else picture
    )
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(resized)[top : top + side, left : left + side]


def _builtin(vocab_size: int) -> Any:
    from transformers import RobertaTokenizerFast

    folder = files("model") / "vocabulary"
    vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line and line[0] != "#")]
    if vocab_size < len(vocabulary):
        vocabulary, merges = _cut(vocabulary, merges, vocab_size)
    return RobertaTokenizerFast(vocab=vocabulary, merges=merges)


def _cut(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary with its first merges only: still lossless on any text, with more pieces a word.

    RoBERTa's four first specials keep their ids and ``<mask>`` the last one; the byte tokens come in between.
    """
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = [token for token in vocabulary if len(token) == 1]
    room = size - len(specials) - len(alphabet) - 1
    if room < 0:
        raise TokenizerError(
            f"a vocabulary of {size} has no room for all bytes: at least {size - room} are needed"
        )
    merges = merges[:room]
    tokens = [*specials, *alphabet, *(left + right for left, right in merges), "<mask>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _pretrained(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = "folder" if Path(name).exists() else "name"
        raise TokenizerError(
            f"no tokenizer under the {where} {name!r}: {str(error).splitlines()[0]}"
        ) from error
