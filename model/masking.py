"""The random choices of a pre-training step, drawn per sample.

What is masked in a sample is a function of that sample's seed alone: not of the batch it is in, its padding,
the number of workers or of loader processes. The wrong images of ITM are a function of the seeds of the
group.

Shape legend: B samples, T text tokens, K kept and M replaced patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from model.configuration import GLSCLConfig

_IGNORED = -100


@dataclass(frozen=True)
class PretrainingMasks:
    """Everything random in a step; may be built by hand to fix it.

    Args:
        mlm_input_ids: [B, T] int64, text with 15 % of the words masked, replaced or (to be predicted) kept.
        mlm_labels: [B, T] int64, the original token at those positions, -100 elsewhere.
        completion_input_ids: [B, T] int64, text with 40 % of its tokens masked.
        completion_positions: [B, T] bool, where.
        kept_patches: [B, K] int64, ascending, the patches left when 80 % are removed.
        replaced_patches: [B, M] int64, ascending, the 30 % replaced by the mask token.
        itm_partner: [B] int64, the sample (index into this batch) whose image the text meets.
        itm_labels: [B] int64, 1 own image, 0 wrong image.
        itm_draw: [B] float64 in [0, 1), with which ``hard_negatives`` chooses another wrong image.
    """

    mlm_input_ids: Tensor
    mlm_labels: Tensor
    completion_input_ids: Tensor
    completion_positions: Tensor
    kept_patches: Tensor
    replaced_patches: Tensor
    itm_partner: Tensor
    itm_labels: Tensor
    itm_draw: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PretrainingMasks:
        """The same masks on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PretrainingMasks:
        """The same masks in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def part(self, start: int, stop: int) -> PretrainingMasks:
        """The masks of samples ``start`` to ``stop`` (whole groups), as if they were a batch of their own."""
        cut = self._map(lambda tensor: tensor[start:stop])
        return replace(cut, itm_partner=cut.itm_partner - start)

    def trimmed(self, length: int) -> PretrainingMasks:
        """The masks of texts cut to ``length`` tokens (of which the rest was padding)."""
        names = ("mlm_input_ids", "mlm_labels", "completion_input_ids", "completion_positions")
        return replace(self, **{name: getattr(self, name)[:, :length] for name in names})

    def _map(self, function: Callable[[Tensor], Tensor]) -> PretrainingMasks:
        return PretrainingMasks(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


def draw_masks(
    config: GLSCLConfig,
    input_ids: Tensor,
    attention_mask: Tensor,
    word_ids: Tensor,
    valid: Tensor,
    seeds: Sequence[int],
    group_size: int,
    num_patches: int,
) -> PretrainingMasks:
    """Draw the masks of a batch.

    Args:
        config: ratios, vocabulary and special tokens.
        input_ids, attention_mask, word_ids: [B, T]; ``word_ids`` numbers the words, -1 for specials and
            padding.
        valid: [B] bool; an invalid sample has nothing masked and takes no part in ITM.
        seeds: one non-negative integer below 2**64 per sample.
        group_size: consecutive samples that form a group; wrong images come from the own group.
        num_patches: patches of one frame (a video has the same positions masked in every frame).

    Raises:
        ValueError: lengths that do not fit together, or text longer than ``config.max_text_length``.
    """
    batch, length = input_ids.shape
    if len(seeds) != batch or valid.shape != (batch,):
        raise ValueError(f"{batch} texts, but {len(seeds)} seeds and {tuple(valid.shape)} validity flags")
    if group_size < 1 or batch % group_size:
        raise ValueError(f"a batch of {batch} does not divide into groups of {group_size}")
    if length > config.max_text_length:
        raise ValueError(f"text of {length} tokens, but the longest allowed is {config.max_text_length}")
    ids, words = input_ids.numpy(), word_ids.numpy()
    is_valid = valid.numpy().astype(bool)
    lengths = np.where(is_valid, attention_mask.numpy().sum(axis=1), 0)

    # A fixed layout of uniforms per sample, sized by the configuration and not by the batch.
    reach = config.max_text_length
    uniform = np.empty((batch, 1 + 4 * reach + 2 * num_patches + 1))
    # One generator, set to each seed in turn: a new one asks the system for entropy, which costs more than the draws.
    philox = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(philox), philox.state
    for row, seed in enumerate(seeds):
        fresh["state"]["key"][0] = seed
        philox.state = fresh
        generator.random(out=uniform[row])
    for_words, for_actions, for_tokens, for_positions = (
        uniform[:, 1 + part * reach : 1 + (part + 1) * reach] for part in range(4)
    )
    mlm_ids, mlm_labels = _mask_words(
        config, ids, np.where(is_valid[:, None], words, -1), uniform[:, 0], for_words, for_actions, for_tokens
    )
    completion = _completion_positions(config, lengths, length, for_positions)
    kept = max(1, int(num_patches * (1 - config.removal_ratio) + 1e-6))
    replaced = max(1, int(num_patches * config.replacement_ratio + 1e-6))
    partner, labels = _wrong_images(is_valid, seeds, group_size)
    return PretrainingMasks(
        mlm_input_ids=torch.from_numpy(mlm_ids),
        mlm_labels=torch.from_numpy(mlm_labels),
        completion_input_ids=torch.from_numpy(np.where(completion, config.mask_token_id, ids)),
        completion_positions=torch.from_numpy(completion),
        kept_patches=_lowest(uniform[:, 1 + 4 * reach : 1 + 4 * reach + num_patches], kept),
        replaced_patches=_lowest(uniform[:, 1 + 4 * reach + num_patches : -1], replaced),
        itm_partner=torch.from_numpy(partner),
        itm_labels=torch.from_numpy(labels),
        itm_draw=torch.from_numpy(uniform[:, -1].copy()),
    )


def _mask_words(
    config: GLSCLConfig,
    ids: np.ndarray,
    words: np.ndarray,
    rounding: np.ndarray,
    scores: np.ndarray,
    actions: np.ndarray,
    tokens: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """15 % of the words, at least one, all pieces of a word together; 80/10/10 per piece."""
    length = ids.shape[1]
    inside = words >= 0
    previous = np.concatenate([np.full((len(words), 1), -1), words[:, :-1]], axis=1)
    number = np.maximum(np.cumsum(inside & (words != previous), axis=1) - 1, 0)
    count = np.where(inside, number + 1, 0).max(axis=1, initial=0)
    # The fraction is rounded at random, so that short captions have 15 % on average too (above one word).
    wanted = np.floor(config.mlm_ratio * count + rounding).astype(np.int64)
    wanted = np.where(count > 0, np.maximum(wanted, 1), 0)
    ranked = np.where(np.arange(scores.shape[1]) < count[:, None], scores, 2.0)
    ranks = np.argsort(np.argsort(ranked, axis=1), axis=1)
    chosen = inside & (np.take_along_axis(ranks, number, axis=1) < wanted[:, None])

    actions, tokens = actions[:, :length], tokens[:, :length]
    # Ids between the four first specials and <mask>: a special token in the text would move RoBERTa's
    # positions.
    first, last = config.unk_token_id + 1, config.mask_token_id
    random_ids = first + (tokens * (last - first)).astype(np.int64)
    masked = np.where(chosen & (actions < 0.8), config.mask_token_id, ids)
    masked = np.where(chosen & (actions >= 0.8) & (actions < 0.9), random_ids, masked)
    return masked, np.where(chosen, ids, _IGNORED)


def _completion_positions(
    config: GLSCLConfig, lengths: np.ndarray, width: int, uniform: np.ndarray
) -> np.ndarray:
    """int(0.4 * (len - 2)) + 1 draws with replacement among the tokens that are neither <s> nor </s>."""
    inner = np.maximum(lengths - 2, 0)
    draws = np.where(inner > 0, (inner * config.completion_ratio).astype(np.int64) + 1, 0)
    drawn = 1 + (uniform * inner[:, None]).astype(np.int64)
    used = np.arange(uniform.shape[1]) < draws[:, None]
    positions = np.zeros((len(lengths), width), dtype=bool)
    rows, columns = np.nonzero(used)
    positions[rows, drawn[rows, columns]] = True
    return positions


def _lowest(scores: np.ndarray, count: int) -> Tensor:
    """Positions of the ``count`` lowest scores of each row, ascending."""
    return torch.from_numpy(np.sort(np.argpartition(scores, count - 1, axis=1)[:, :count], axis=1))


def _wrong_images(valid: np.ndarray, seeds: Sequence[int], group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of a group's valid samples trade images in a ring; one alone takes another's image."""
    partner = np.arange(len(valid), dtype=np.int64)
    labels = np.ones(len(valid), dtype=np.int64)
    for start in range(0, len(valid), group_size):
        members = start + np.flatnonzero(valid[start : start + group_size])
        if len(members) < 2:
            continue
        key = hashlib.blake2b(",".join(str(seeds[int(i)]) for i in members).encode(), digest_size=8).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
        order = generator.permutation(members)
        wrong = order[: len(members) // 2]
        partner[wrong] = np.roll(wrong, 1) if len(wrong) > 1 else order[1]
        labels[wrong] = 0
    return partner, labels


def hard_partners(similarity: Tensor, masks: PretrainingMasks, valid: Tensor, group_size: int) -> Tensor:
    """Wrong images for ITM that are hard to tell from the right one.

    A text whose ``itm_labels`` is 0 meets the image of another valid sample of its group, drawn with
    probability proportional to exp(``similarity``) by the sample's ``itm_draw``; where there is no other, and
    for label 1, the partner is that of ``masks``.

    Args:
        similarity: [B, B] of texts (rows) and images, divided by the temperature.
        valid: [B] bool.

    Returns:
        [B] int64 partners.
    """
    batch = len(valid)
    place = torch.arange(batch, device=valid.device)
    others = (place[:, None] // group_size == place // group_size) & valid & (place[:, None] != place)
    # float64: a draw must fall on the same sample whatever the order of summation was.
    chances = similarity.double().masked_fill(~others, -torch.inf)
    chances = torch.softmax(chances, dim=1).nan_to_num(0.0)
    below = chances.cumsum(dim=1) <= masks.itm_draw[:, None]
    last = torch.where(others, place, -1).amax(dim=1)
    drawn = torch.minimum(below.sum(dim=1), last)
    wrong = (masks.itm_labels == 0) & valid & others.any(dim=1)
    return torch.where(wrong, drawn, masks.itm_partner)
