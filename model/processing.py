"""From strings and decoded pictures to the tensors the model takes.

Shape legend: B samples, N candidate texts of a sample, T text tokens, F frames, S side of the model's images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin

from model.configuration import GLSCLConfig
from model.pictures import shown

_SHIPPED = "builtin"


class TokenizerError(ValueError):
    """A tokenizer that cannot be had, or does not fit the model."""


class GLSCLImageProcessor(BaseImageProcessor):
    """Brings pictures to the model's size: shorter side to S (bicubic), centre crop S x S, as CLIP does.

    Pixels stay uint8. Neither scaling nor normalisation happens here: both are inside the model, which knows
    its mean and standard deviation (``GLSCLConfig.image_mean``, ``image_std``).

    Args:
        size: S, or ``{"height": S, "width": S}``.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, size: int | dict[str, int] = 288, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sides = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        if set(sides) != {"height", "width"} or sides["height"] != sides["width"] or sides["height"] < 1:
            raise ValueError(f"size is {size!r}: it must be one number above 0, or that as height and width")
        self.size = sides

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Pictures, or rows of as many pictures each, to ``pixel_values`` uint8 [B, F, 3, S, S].

        Args:
            images: PIL images or uint8 arrays [height, width, 3], one or a list: F is 1. A list of lists, or of
                arrays [F, height, width, 3]: the frames of clips, or the pairs of NLVR2. Arrays are taken as they
                are; PIL images as they are shown (``model.pictures``): upright by EXIF, in sRGB, alpha on white,
                depths above 8 bits scaled.
            return_tensors: ``pt`` or ``np``.

        Raises:
            ValueError: no picture, or rows of different lengths.
        """
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        rows = [torch.cat([self.video(picture) for picture in _pictures(row)]) for row in images]
        if len({len(row) for row in rows}) != 1:
            counts = sorted({len(row) for row in rows})
            raise ValueError(
                f"rows of {counts} pictures: a batch needs as many frames in each, and one sample"
            )
        return BatchFeature({"pixel_values": torch.stack(rows)}, tensor_type=return_tensors)

    def video(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [F, height, width, 3] -> uint8 [F, 3, S, S]: shorter side to S, centre crop."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [F, height, width, 3], not {frames.dtype} {frames.shape}")
        fitted = np.stack([_fit(frame, self.size["height"]) for frame in frames])
        return torch.from_numpy(fitted).permute(0, 3, 1, 2).contiguous()


class GLSCLProcessor(ProcessorMixin):
    """Tokenises captions and brings pictures to the model's size.

    Make one with :meth:`from_config`, or :meth:`from_pretrained` of a folder that :meth:`save_pretrained`
    wrote. Normalisation by mean and standard deviation happens inside the model.

    Args:
        image_processor: see :class:`GLSCLImageProcessor`.
        tokenizer: a fast tokenizer; its ``model_max_length`` is where texts are cut.
    """

    def __init__(self, image_processor: GLSCLImageProcessor, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        videos: Any = None,
        padding: str | bool = "longest",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """What a model's forward takes.

        Args:
            images: see :meth:`GLSCLImageProcessor.preprocess`.
            text: one or more texts, or for each sample as many candidates.
            videos: one clip or several, each an array uint8 [F, height, width, 3] or a list of pictures; instead
                of ``images``.
            padding: ``longest`` of the batch, or ``max_length`` (the tokenizer's ``model_max_length``).
            return_tensors: ``pt`` or ``np``.

        Returns:
            of ``input_ids`` and ``attention_mask`` ([B, T]; of candidates [B, N, T]) and ``pixel_values``
            (uint8 [B, F, 3, S, S]) those that something was given for. Texts over the limit are cut.

        Raises:
            ValueError: nothing at all, images and videos together, or rows of different lengths.
        """
        if images is not None and videos is not None:
            raise ValueError("images and videos together: pixel_values has room for one of them")
        if images is None and videos is None and text is None:
            raise ValueError("neither images nor videos nor text to process")
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._texts(text, padding))
        if images is not None:
            data.update(self.image_processor.preprocess(images))
        if videos is not None:
            several = isinstance(videos, (list, tuple)) and not isinstance(videos[0], Image.Image)
            several = several and not (isinstance(videos[0], np.ndarray) and videos[0].ndim == 3)
            data.update(self.image_processor.preprocess(videos if several else [videos]))
        return BatchFeature(data, tensor_type=return_tensors)

    def _texts(self, text: Any, padding: str | bool) -> dict[str, Tensor]:
        texts = [text] if isinstance(text, str) else list(text)
        nested = bool(texts) and not isinstance(texts[0], str)
        rows = [list(row) for row in texts] if nested else [texts]
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError(
                f"rows of {sorted({len(row) for row in rows})} texts: each sample needs as many candidates, and one"
            )
        encoded = self.tokenizer(
            [caption for row in rows for caption in row],
            padding=padding,
            truncation=True,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask")
        if not nested:
            return {name: encoded[name] for name in names}
        return {name: encoded[name].unflatten(0, (len(rows), -1)) for name in names}

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
        loaded.model_max_length = config.max_text_length
        return cls(GLSCLImageProcessor(config.image_size), loaded)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenise captions for pre-training, cut to ``max_text_length`` and padded to the longest of them.

        Returns:
            ``input_ids``, ``attention_mask`` and ``word_ids``, each [B, T] int64; ``word_ids`` numbers the
            words of a caption from 0 and is -1 on special tokens and padding.
        """
        encoded = self.tokenizer(list(texts), padding="longest", truncation=True)
        words = [[-1 if word is None else word for word in one.word_ids] for one in encoded.encodings]
        # By way of NumPy, which is several times as fast over lists of lists as torch.
        return {
            "input_ids": torch.from_numpy(np.array(encoded["input_ids"], dtype=np.int64)),
            "attention_mask": torch.from_numpy(np.array(encoded["attention_mask"], dtype=np.int64)),
            "word_ids": torch.from_numpy(np.array(words, dtype=np.int64)),
        }

    def images(self, images: list[np.ndarray]) -> Tensor:
        """Pictures uint8 [height, width, 3] of any size -> uint8 [B, 1, 3, S, S] (resized, centre crop)."""
        return torch.stack([self.video(image[None]) for image in images])

    def video(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [F, height, width, 3] -> uint8 [F, 3, S, S]: shorter side to S, centre crop."""
        return self.image_processor.video(frames)


def _pictures(row: Any) -> list[np.ndarray]:
    """What makes up a row, each [1, height, width, 3]: their sizes may differ."""
    if isinstance(row, np.ndarray):
        return [row[None]] if row.ndim == 3 else [frame[None] for frame in row]
    pictures = [row] if isinstance(row, Image.Image) else row
    return [np.asarray(shown(one) if isinstance(one, Image.Image) else one)[None] for one in pictures]


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

    if not Path(name).exists() and name.startswith(("/", ".", "~")):
        raise TokenizerError(f"no tokenizer under {name!r}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        where = "folder" if Path(name).exists() else "name"
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"no tokenizer under the {where} {name!r}: {told}") from error
