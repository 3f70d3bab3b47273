"""Promises about what happens to training pictures: draws of their own, and torchvision's pictures."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipeline.training.augmentation import Augmentation, random_crop
from pipeline.training.config import AugmentationBlock

SIZE = 32


def _draws(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _frames(height: int, width: int, frames: int = 1) -> np.ndarray:
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    picture = np.stack([255 * across, 255 * down, 127 * (across + down)], axis=-1)
    noise = np.random.default_rng(1).normal(0, 8, (frames, *picture.shape))
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70), (20, 31), (SIZE, SIZE)])
def test_without_crops_a_picture_is_resized_by_its_shorter_side_and_cropped_in_the_middle(
    shape: tuple[int, int],
) -> None:
    frames = _frames(*shape)
    got = Augmentation(AugmentationBlock(), SIZE)(frames, _draws())
    resize = v2.Compose([v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)])
    expected = resize(torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert got.shape == (1, 3, SIZE, SIZE)
    assert got.dtype == torch.uint8
    # The square is cut out first: a difference of half a pixel at most.
    assert (got.int() - expected.int()).abs().float().mean() < 4


def test_pixels_lie_channels_last_and_the_input_stays_as_it_was() -> None:
    block = AugmentationBlock(crop=0.5, flip=1.0, rand_augment=True)
    for augmentation in (Augmentation(AugmentationBlock(), SIZE), Augmentation(block, SIZE)):
        frames = _frames(50, 40, frames=3)
        frames.flags.writeable = False
        before = frames.copy()
        pixels = augmentation(frames, _draws())
        assert pixels.permute(0, 2, 3, 1).is_contiguous()
        assert np.array_equal(frames, before)


def test_draws_come_from_the_picture_s_generator_and_leave_torch_s_alone() -> None:
    augmentation = Augmentation(AugmentationBlock(crop=0.3, flip=0.5, rand_augment=True), SIZE)
    frames = _frames(64, 80)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = [augmentation(frames, _draws(seed)) for seed in range(8)]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    again = [augmentation(frames, _draws(seed)) for seed in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({pixels.numpy().tobytes() for pixels in first}) == 8


def test_all_frames_of_a_clip_get_the_same_draw() -> None:
    still = _frames(64, 80).repeat(4, axis=0)
    pixels = Augmentation(AugmentationBlock(crop=0.3, flip=0.5), SIZE)(still, _draws(3))
    assert all(torch.equal(pixels[0], frame) for frame in pixels)


def test_flips_mirror() -> None:
    frames = _frames(SIZE, SIZE)
    flipped = Augmentation(AugmentationBlock(flip=1.0), SIZE)(frames, _draws())
    assert np.array_equal(flipped[0].permute(1, 2, 0).numpy(), frames[0, :, ::-1])
    half = Augmentation(AugmentationBlock(flip=0.5), SIZE)
    turned = sum(
        not np.array_equal(half(frames, _draws(i))[0].permute(1, 2, 0), frames[0]) for i in range(200)
    )
    assert 70 < turned < 130


def test_crops_lie_inside_with_the_shares_and_aspects_of_torchvision_s() -> None:
    height, width, scale = 300, 400, 0.2
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [v2.RandomResizedCrop(8, scale=(scale, 1.0)).make_params([image]) for _ in range(3000)]
    draws = _draws()
    ours = [random_crop(height, width, scale, draws) for _ in range(3000)]
    assert all(0 <= t < b <= height and 0 <= left < r <= width for t, left, b, r in ours)
    for measure in ("share", "aspect", "top", "left"):
        mine = np.array([_measures(t, left, b - t, r - left)[measure] for t, left, b, r in ours])
        their = np.array([_measures(p["top"], p["left"], p["height"], p["width"])[measure] for p in theirs])
        deciles = np.linspace(0.1, 0.9, 9)
        spread = np.quantile(their, 0.95) - np.quantile(their, 0.05)
        assert np.abs(np.quantile(mine, deciles) - np.quantile(their, deciles)).max() < 0.08 * spread, measure


def _measures(top: int, left: int, height: int, width: int) -> dict[str, float]:
    return {"share": height * width, "aspect": np.log(width / height), "top": top, "left": left}


@pytest.mark.parametrize(
    ("shape", "expected"), [((10, 1000), (0, 494, 10, 507)), ((1000, 10), (494, 0, 507, 10))]
)
def test_a_picture_too_narrow_for_any_crop_gives_its_middle(
    shape: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    top, left, bottom, right = random_crop(*shape, 0.9, _draws())
    assert np.abs(np.subtract((top, left, bottom, right), expected)).max() <= 1


@pytest.mark.parametrize("crop", [1.0, 0.5, 0.05])
def test_the_detail_asked_of_the_decoder_is_twice_the_size_in_every_crop(crop: float) -> None:
    detail = Augmentation(AugmentationBlock(crop=crop), SIZE).detail
    if crop == 1.0:
        assert detail == 2 * SIZE
        return
    draws = _draws()
    for _ in range(500):
        top, left, bottom, right = random_crop(detail, detail, crop, draws)
        assert min(bottom - top, right - left) >= 2 * SIZE - 1
