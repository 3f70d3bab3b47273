"""The random choices of a step: rates, independence of the batch, and the trade of images."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from model import GLSCLConfig, PretrainingMasks, draw_masks
from model.masking import hard_partners
from tests.model.small import small_batch, small_config


def _draw(config: GLSCLConfig, words: torch.Tensor, seeds: list[int], **changes) -> PretrainingMasks:  # type: ignore[no-untyped-def]
    ids = torch.where(words >= 0, 10 + words, config.pad_token_id)
    ids[:, 0] = config.bos_token_id
    mask = (ids != config.pad_token_id).long()
    ends = mask.sum(1) - 1
    ids[torch.arange(len(ids)), ends] = config.eos_token_id
    words = words.scatter(1, ends[:, None], -1)
    values = {
        "valid": torch.ones(len(ids), dtype=torch.bool),
        "group_size": len(ids),
        "num_patches": 64,
        **changes,
    }
    return draw_masks(config, ids, mask, words, seeds=seeds, **values)


def _words(samples: int, length: int) -> torch.Tensor:
    words = (torch.arange(length) - 1).div(2, rounding_mode="floor").expand(samples, length).clone()
    words[:, 0] = -1
    return words


def test_a_samples_masks_depend_on_its_seed_alone() -> None:
    config = small_config()
    batch = small_batch(config, samples=6, group_size=2, seed=3)
    again = small_batch(config, samples=6, group_size=2, seed=3)
    order = torch.tensor([2, 3, 0, 1])
    valid = torch.ones(4, dtype=torch.bool)
    seeds = [batch.seeds[i] for i in order]
    # Other neighbours and more padding: the same masks for the same seeds.
    pad = torch.nn.functional.pad
    longest = int(batch.attention_mask[order].sum(1).max())
    moved = draw_masks(
        config,
        batch.input_ids[order, :longest],
        batch.attention_mask[order, :longest],
        batch.word_ids[order, :longest],
        valid,
        seeds,
        2,
        config.num_patches,
    )
    width = config.max_text_length - longest
    for name in ("mlm_input_ids", "completion_input_ids", "kept_patches", "replaced_patches"):
        assert torch.equal(getattr(batch.masks, name), getattr(again.masks, name))
        value = getattr(moved, name)
        value = pad(value, (0, width), value=config.pad_token_id) if name.endswith("ids") else value
        assert torch.equal(getattr(batch.masks, name)[order], value)
    assert torch.equal(batch.masks.itm_labels[order], moved.itm_labels)
    assert torch.equal(batch.masks.itm_partner[order] % 2, moved.itm_partner % 2)
    other = small_batch(config, samples=6, group_size=2, seed=4)
    assert not torch.equal(batch.masks.kept_patches, other.masks.kept_patches)


def test_rates_are_those_of_the_paper() -> None:
    config = GLSCLConfig.preset("base")
    samples = 600
    words = _words(samples, 42)  # 40 inner tokens, two to a word
    masks = _draw(config, words, list(range(samples)))
    masked = masks.mlm_labels >= 0
    assert float(masked.sum()) / (samples * 40) == pytest.approx(0.15, abs=0.01)
    pairs = masked[:, 1:41].view(samples, 20, 2)
    assert torch.equal(pairs[..., 0], pairs[..., 1])  # whole words
    assert not masked[:, [0, 41]].any()
    shown, original = masks.mlm_input_ids[masked], masks.mlm_labels[masked]
    assert float((shown == config.mask_token_id).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((shown == original).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert int(shown[(shown != config.mask_token_id)].min()) > config.unk_token_id

    assert masks.completion_positions.sum(1).max() <= int(0.4 * 40) + 1
    # 17 draws with replacement from 40: 40 * (1 - (1 - 1/40) ** 17) distinct ones are expected
    assert float(masks.completion_positions.sum(1).float().mean()) == pytest.approx(14.0, abs=0.3)
    assert not masks.completion_positions[:, [0, 41]].any()
    assert (masks.completion_input_ids[masks.completion_positions] == config.mask_token_id).all()

    for name, count in (("kept_patches", 12), ("replaced_patches", 19)):
        patches = getattr(masks, name)
        assert patches.shape == (samples, count)
        assert (patches.diff(dim=1) > 0).all()
        hits = torch.bincount(patches.flatten(), minlength=64).float() / samples
        assert float(hits.max() - hits.min()) < 0.2


def test_one_word_is_masked_where_there_is_one() -> None:
    config = small_config()
    masks = _draw(config, _words(64, 4), list(range(64)), num_patches=16)
    assert (masks.mlm_labels >= 0).any(dim=1).all()
    nothing = _draw(
        config, torch.full((3, 2), -1).scatter(1, torch.ones(3, 1, dtype=torch.long), 0), [1, 2, 3]
    )
    assert (nothing.mlm_labels == -100).all()
    assert not nothing.completion_positions.any()


@pytest.mark.parametrize(
    ("samples", "group_size", "invalid"), [(48, 24, ()), (48, 12, (0, 13, 14)), (6, 3, ())]
)
def test_exactly_half_of_each_groups_valid_samples_meet_a_wrong_image(
    samples: int, group_size: int, invalid: tuple[int, ...]
) -> None:
    masks = small_batch(small_config(), samples, invalid=invalid, group_size=group_size).masks
    own = torch.arange(samples)
    for start in range(0, samples, group_size):
        members = [i for i in range(start, start + group_size) if i not in invalid]
        wrong = [i for i in members if masks.itm_labels[i] == 0]
        assert len(wrong) == len(members) // 2
        partners = masks.itm_partner[wrong].tolist()
        assert all(partner in members and partner != i for i, partner in zip(wrong, partners, strict=True))
        if len(wrong) > 1:
            assert sorted(partners) == wrong  # they trade among themselves
    right = masks.itm_labels == 1
    assert torch.equal(masks.itm_partner[right], own[right])
    assert all(masks.itm_labels[i] == 1 for i in invalid)


def test_a_group_with_one_valid_sample_stays_matched() -> None:
    masks = small_batch(small_config(), 4, invalid=(1, 2, 3), group_size=4).masks
    assert masks.itm_labels.tolist() == [1, 1, 1, 1]
    assert masks.itm_partner.tolist() == [0, 1, 2, 3]


def test_lengths_that_do_not_fit_are_refused() -> None:
    config = small_config()
    with pytest.raises(ValueError, match="groups of 4"):
        _draw(config, _words(6, 8), list(range(6)), group_size=4)
    with pytest.raises(ValueError, match="5 seeds"):
        _draw(config, _words(6, 8), list(range(5)))
    with pytest.raises(ValueError, match="longest allowed is 12"):
        _draw(config, _words(6, 14), list(range(6)))


def test_hard_negatives_are_other_valid_samples_of_the_group_drawn_by_similarity() -> None:
    config = small_config()
    drawn: Counter[int] = Counter()
    similarity = torch.tensor([[9.0, 1.0, 0.0, 5.0, 7.0, 7.0]]).repeat(6, 1)
    for seed in range(300):
        batch = small_batch(config, 6, invalid=(3,), group_size=6, seed=seed)
        partner = hard_partners(similarity, batch.masks, batch.valid, group_size=6)
        for row in range(6):
            if row == 3 or batch.masks.itm_labels[row] == 1:
                assert partner[row] == batch.masks.itm_partner[row] == row
            else:
                assert partner[row] not in (row, 3)
        drawn[int(partner[0])] += int(batch.masks.itm_labels[0] == 0)
    shares = torch.softmax(torch.tensor([1.0, 0.0, 7.0, 7.0]), 0).tolist()
    total = drawn.total()
    assert total > 100
    for image, share in zip((1, 2, 4, 5), shares, strict=True):
        assert drawn[image] / total == pytest.approx(share, abs=0.1)


def test_hard_negatives_stay_in_their_group() -> None:
    batch = small_batch(small_config(), 8, invalid=(1, 6, 7), group_size=2, seed=3)
    partner = hard_partners(torch.randn(8, 8) * 20, batch.masks, batch.valid, group_size=2)
    assert torch.equal(partner // 2, torch.arange(8) // 2)
    for alone in (0, 1, 6, 7):  # without another valid sample there is no wrong image
        assert partner[alone] == alone
