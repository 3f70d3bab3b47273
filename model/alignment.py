"""Which regions of a picture the words of a caption attend to.

The map of a text token is its row of the cross-attention from text to vision in the last fusion layer, at the
patches (the vision class tokens dropped), maximum over heads; the map of a word is the sum over its BPE pieces,
punctuation left out, and the global map is that of the text class token: what GLSCL's evaluation of local and
global alignment scores.

Shape legend: B samples, T text tokens, W words, F frames, S side of the images, gh and gw the rows and columns of
patches.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.glscl import GLSCLModel, GLSCLPreTrainedModel
from model.processing import GLSCLProcessor


@dataclass(frozen=True)
class WordMaps:
    """Attention maps of a caption over a picture. Not normalised; values are attention weights, zero or above.

    Args:
        words: the W words, without the punctuation around them, in their order.
        spans: [start, end) of each in the caption, characters.
        maps: [W, gh, gw] of a picture, [W, F, gh, gw] of a clip; float, on the CPU.
        global_map: [gh, gw], or [F, gh, gw], of the text class token.
        unread: the end of a caption that has more tokens than the model takes; mostly empty.
    """

    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    maps: Tensor
    global_map: Tensor
    unread: str


@torch.no_grad()
def word_maps(model: GLSCLPreTrainedModel, processor: GLSCLProcessor, image: Any, caption: str) -> WordMaps:
    """The maps of ``caption`` over what the model sees of ``image``: its centre crop at the processor's size.

    Args:
        model: of any class, in evaluation mode.
        processor: at the resolution to use; a multiple of the model's ``patch_size``.
        image: a PIL image or uint8 [height, width, 3]; a clip uint8 [F, height, width, 3] or a list of pictures.
        caption: words are what stands between white space.

    Raises:
        ValueError: a caption without a word; as the model and the processor raise.
    """
    clip = isinstance(image, (list, tuple)) or (isinstance(image, np.ndarray) and image.ndim == 4)
    inputs = processor(**{"videos" if clip else "images": image}, text=caption).to(model.device)
    (grids,) = text_grids(model, inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
    return words_on_grid(processor, caption, grids if clip else grids[:, 0])


@torch.no_grad()
def text_grids(
    model: GLSCLPreTrainedModel, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor
) -> Tensor:
    """The map of every text token: [B, T, F, gh, gw], float, on the CPU.

    Args:
        model: of any class, in evaluation mode.
        input_ids, attention_mask: [B, T]; the rows of padding mean nothing.
        pixel_values: [B, F, 3, S, S].

    Raises:
        ValueError: as the model raises.
    """
    backbone = model if isinstance(model, GLSCLModel) else model.glscl
    frames, _, height, width = pixel_values.shape[1:]
    patch = backbone.config.patch_size
    mask = backbone.valid_tokens(input_ids, attention_mask)
    text, vision = backbone.embed_text(input_ids, mask), backbone.embed_vision(pixel_values)
    weights = backbone.fusion.last_text_attention(text, mask, vision)[..., frames:].amax(dim=1)  # [B, T, F*P]
    weights = weights.to("cpu", torch.promote_types(weights.dtype, torch.float32))
    return weights.unflatten(-1, (frames, height // patch, width // patch))


def words_on_grid(processor: GLSCLProcessor, caption: str, grids: Tensor) -> WordMaps:
    """The maps of a caption's words of those of its tokens [T, gh, gw], or [T, F, gh, gw].

    Raises:
        ValueError: a caption without a word.
    """
    words, unread = _words(processor, caption)
    if not words:
        raise ValueError(f"the caption {caption!r} has no word")
    return WordMaps(
        words=tuple(caption[word.start : word.end] for word in words),
        spans=tuple((word.start, word.end) for word in words),
        maps=torch.stack([grids[word.tokens].sum(dim=0) for word in words]),
        global_map=grids[0],
        unread=unread,
    )


@dataclass
class _Word:
    start: int
    end: int
    tokens: list[int]  # rows of the caption's tokens, ``<s>`` being row 0


def _words(processor: GLSCLProcessor, caption: str) -> tuple[list[_Word], str]:
    """The words as far as the model reads the caption, and what it does not read."""
    encoded = processor.tokenizer(
        caption, truncation=True, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    special = encoded["special_tokens_mask"]
    pieces = [
        (token, start, end)
        for token, (start, end) in enumerate(encoded["offset_mapping"])
        if not special[token]
    ]
    words = []
    for run in re.finditer(r"\S+", caption):
        # A space that became a piece of its own has no extent, and stands where its word begins.
        inside = [piece for piece in pieces if run.start() <= piece[1] < run.end()]
        inside = [(token, a, b) for token, a, b in inside if a == b or not _is_punctuation(caption[a:b])]
        extents = [(start, end) for _, start, end in inside if start < end]
        if extents:
            tokens = [token for token, *_ in inside]
            words.append(_Word(extents[0][0], extents[-1][1], tokens))
    read = max((end for *_, end in pieces), default=0)
    return words, caption[read:].strip()


def _is_punctuation(text: str) -> bool:
    """Marks of any script, and ASCII's symbols such as ``+`` and ``$``; pictographs are words."""
    kinds = [(unicodedata.category(character)[0], character) for character in text]
    return all(kind in "PZ" or (kind == "S" and character.isascii()) for kind, character in kinds)
