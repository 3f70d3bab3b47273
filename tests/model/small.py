"""Small models and batches for the tests of ``model/``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from model import (
    OBJECTIVES,
    GLSCLConfig,
    GLSCLForImageTextRetrieval,
    GLSCLForNLVR2,
    GLSCLForPreTraining,
    GLSCLForVisualQuestionAnswering,
    GLSCLModel,
    PretrainingMasks,
    draw_masks,
)
from model.glscl import GLSCLPreTrainedModel

CLASSES: tuple[type[GLSCLPreTrainedModel], ...] = (
    GLSCLModel,
    GLSCLForPreTraining,
    GLSCLForImageTextRetrieval,
    GLSCLForVisualQuestionAnswering,
    GLSCLForNLVR2,
)
_Model = TypeVar("_Model", bound=GLSCLPreTrainedModel)


def small_config(**overrides: Any) -> GLSCLConfig:
    """A model of a few thousand parameters, without dropout."""
    values: dict[str, Any] = {
        "image_size": 16,
        "patch_size": 4,
        "vocab_size": 60,
        "mask_token_id": 59,
        "max_text_length": 12,
        "max_position_embeddings": 16,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vision_layers": 2,
        "text_layers": 2,
        "fusion_layers": 3,
        "projection_size": 8,
        "max_frames": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return GLSCLConfig(**{**values, **overrides})


def small_model(config: GLSCLConfig, dtype: torch.dtype = torch.float64) -> GLSCLForPreTraining:
    """A model with every parameter away from its first value, so that no mistake hides behind it."""
    return small_model_of(GLSCLForPreTraining, config, dtype)


def small_model_of(kind: type[_Model], config: GLSCLConfig, dtype: torch.dtype = torch.float64) -> _Model:
    """The same of any class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if name == "temperature.value":
                parameter.fill_(0.07)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


@dataclass
class Batch:
    """Arguments of a pre-training forward."""

    input_ids: Tensor
    attention_mask: Tensor
    word_ids: Tensor
    pixel_values: Tensor
    valid: Tensor
    seeds: list[int]
    masks: PretrainingMasks

    def part(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop`` as the batch of one worker (a whole number of groups)."""
        cut = {field.name: getattr(self, field.name)[start:stop] for field in fields(self)[:-1]}
        return replace(self, **cut, masks=self.masks.part(start, stop))

    def inputs(self) -> dict[str, Any]:
        """As keyword arguments, without weights and group size."""
        names = ("input_ids", "attention_mask", "pixel_values", "masks", "valid")
        return {name: getattr(self, name) for name in names}


def small_batch(
    config: GLSCLConfig,
    samples: int = 6,
    frames: int = 1,
    invalid: tuple[int, ...] = (),
    group_size: int | None = None,
    seed: int = 0,
) -> Batch:
    """Random texts of 3 to 12 tokens in words of one to three pieces, random pictures, drawn masks."""
    generator = torch.Generator().manual_seed(seed)
    length = config.max_text_length
    ids = torch.full((samples, length), config.pad_token_id)
    words = torch.full((samples, length), -1)
    for row in range(samples):
        count = int(torch.randint(1, length - 1, (), generator=generator)) if row else length - 2
        ids[row, 0], ids[row, count + 1] = config.bos_token_id, config.eos_token_id
        ids[row, 1 : count + 1] = torch.randint(4, config.mask_token_id, (count,), generator=generator)
        words[row, 1 : count + 1] = torch.randint(0, 2, (count,), generator=generator).cumsum(0)
        words[row, 1 : count + 1] -= int(words[row, 1])
    mask = (ids != config.pad_token_id).long()
    shape = (samples, frames, 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    valid = torch.ones(samples, dtype=torch.bool)
    valid[list(invalid)] = False
    seeds = [1000 * seed + row for row in range(samples)]
    masks = draw_masks(config, ids, mask, words, valid, seeds, group_size or samples, config.num_patches)
    return Batch(ids, mask, words, pixels, valid, seeds, masks)


def arguments_of(
    kind: type[GLSCLPreTrainedModel], config: GLSCLConfig, samples: int = 4, frames: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments of a forward of any class, with labels where it takes them (frames: ignored by NLVR2)."""
    batch = small_batch(config, samples, frames, seed=seed)
    if kind is GLSCLForPreTraining:
        return {**batch.inputs(), "objectives": dict.fromkeys(OBJECTIVES, 1.0), "group_size": samples}
    found: dict[str, Any] = {
        name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")
    }
    generator = torch.Generator().manual_seed(seed)
    if kind is GLSCLForImageTextRetrieval:
        others = [small_batch(config, samples, seed=seed + 1 + n) for n in range(2)]
        for name in ("input_ids", "attention_mask"):
            found[name] = torch.stack([getattr(one, name) for one in (batch, *others)], dim=1)
    elif kind is GLSCLForVisualQuestionAnswering:
        found["labels"] = torch.rand(samples, config.num_labels, generator=generator, dtype=torch.float64)
    elif kind is GLSCLForNLVR2:
        found["pixel_values"] = small_batch(config, samples, frames=2, seed=seed).pixel_values
        found["labels"] = torch.randint(0, 2, (samples,), generator=generator)
    return found
