"""The flexible vision encoder: one for images and videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import GLSCLConfig, GLSCLForPreTraining
from model.vision import VisionEncoder
from tests.model.small import small_batch, small_config, small_model


def _encoder(config: GLSCLConfig) -> VisionEncoder:
    return small_model(config).glscl.vision_encoder


def test_shapes_of_complete_removed_and_replaced_frames() -> None:
    config = small_config()
    batch = small_batch(config, samples=2, frames=3)
    complete, removed, replaced = _encoder(config)(
        batch.pixel_values, batch.masks.kept_patches, batch.masks.replaced_patches
    )
    kept = batch.masks.kept_patches.shape[1]
    assert complete.shape == replaced.shape == (2, 3 + 3 * 16, 16)
    assert removed.shape == (2, 3 + 3 * kept, 16)


def test_one_frame_equals_an_encoder_that_never_heard_of_videos() -> None:
    config = small_config()
    encoder = _encoder(config)
    pixels = small_batch(config, samples=2).pixel_values
    before = encoder(pixels)[0]
    with torch.no_grad():
        encoder.temporal_embedding.normal_()
    image_config = small_config(max_frames=1)
    image_encoder = _encoder(image_config)
    state = encoder.state_dict()
    state["temporal_embedding"] = state["temporal_embedding"][:1] * 0
    image_encoder.load_state_dict(state)
    assert torch.equal(encoder(pixels)[0], before)
    assert torch.equal(image_encoder(pixels)[0], before)


def test_equal_frames_without_temporal_embedding_have_the_patches_of_the_image() -> None:
    """A patch token sees its own frame only, so a still clip's patches are the image's after one block."""
    config = small_config(vision_layers=1)
    encoder = _encoder(config)
    with torch.no_grad():
        encoder.temporal_embedding.zero_()
    image = small_batch(config, samples=2).pixel_values
    clip = encoder(image.expand(-1, 3, -1, -1, -1))[0]
    alone = encoder(image)[0]
    torch.testing.assert_close(clip[:, 3:19], alone[:, 1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(clip[:, 0], alone[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", [0, 2])
def test_in_the_first_block_another_frame_reaches_class_tokens_only(changed: int) -> None:
    config = small_config(vision_layers=1)
    encoder = _encoder(config)
    clip = small_batch(config, samples=1, frames=3).pixel_values
    other = clip.clone()
    other[:, changed] = 255 - other[:, changed]
    before, after = encoder(clip)[0], encoder(other)[0]
    patches_before, patches_after = (x[:, 3:].view(1, 3, 16, -1) for x in (before, after))
    for frame in range(3):
        same = torch.equal(patches_before[:, frame], patches_after[:, frame])
        assert same == (frame != changed)
        assert not torch.equal(before[:, frame], after[:, frame])


def test_removed_patches_have_no_influence_and_replaced_ones_only_their_place() -> None:
    config = small_config()
    encoder = _encoder(config)
    batch = small_batch(config, samples=1, frames=2)
    kept, replaced = batch.masks.kept_patches, batch.masks.replaced_patches

    def repaint(patches: list[int]) -> Tensor:
        pixels = batch.pixel_values.clone()
        for place in patches:
            y, x = divmod(place, 4)
            pixels[..., 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 7
        return pixels

    _, removed, swapped = encoder(batch.pixel_values, kept, replaced)
    unseen = [place for place in range(16) if place not in kept[0].tolist()]
    assert torch.equal(encoder(repaint(unseen), kept)[1], removed)
    assert torch.equal(encoder(repaint(replaced[0].tolist()), None, replaced)[2], swapped)
    assert not torch.equal(encoder(repaint(kept[0].tolist()), kept)[1], removed)


def test_temporal_embedding_is_zero_at_first_and_used_for_clips() -> None:
    config = small_config()
    encoder = VisionEncoder(config)
    model = small_model(config)
    assert not type(model)(config).glscl.vision_encoder.temporal_embedding.any()
    encoder = model.glscl.vision_encoder
    clip = small_batch(config, samples=1, frames=2).pixel_values
    before = encoder(clip)[0]
    with torch.no_grad():
        encoder.temporal_embedding.add_(1.0 + torch.arange(16.0))
    assert not torch.equal(encoder(clip)[0], before)


def test_other_resolutions_interpolate_the_positions() -> None:
    config = small_config()
    encoder = _encoder(config)
    pixels = torch.randint(0, 256, (2, 1, 3, 24, 16), dtype=torch.uint8)
    assert encoder(pixels)[0].shape == (2, 1 + 6 * 4, 16)
    with torch.no_grad():
        encoder.position_embedding[1:] = 3.0
    _, positions = encoder._positions((6, 6), torch.float64)
    torch.testing.assert_close(positions, torch.full((36, 16), 3.0, dtype=torch.float64))


def test_float_pixels_in_0_to_1_equal_uint8() -> None:
    config = small_config()
    encoder = _encoder(config)
    pixels = small_batch(config, samples=2).pixel_values
    torch.testing.assert_close(encoder(pixels.double() / 255)[0], encoder(pixels)[0], rtol=1e-12, atol=1e-12)


def test_wrong_sizes_and_too_many_frames_are_refused() -> None:
    config = small_config()
    encoder = _encoder(config)
    with pytest.raises(ValueError, match="18 x 16 pixels: both sides must be multiples of 4"):
        encoder(torch.zeros(1, 1, 3, 16, 18, dtype=torch.uint8))
    with pytest.raises(ValueError, match="5 frames, but the model has room for 4"):
        encoder(torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8))


def test_a_new_image_size_changes_no_output_and_trains_its_own_positions(tmp_path: Path) -> None:
    model = small_model(small_config()).eval()
    pixels = torch.rand(2, 1, 3, 24, 24, dtype=torch.float64)
    before = model.get_image_features(pixels)
    other = model.get_image_features(pixels[..., :16, :16])
    with pytest.raises(ValueError, match="26 is no multiple of 4"):
        model.resize_images(26)
    model.resize_images(24)
    positions = model.glscl.vision_encoder.position_embedding
    assert positions.shape == (1 + 36, 16)
    assert positions.requires_grad
    torch.testing.assert_close(model.get_image_features(pixels), before)
    assert not torch.allclose(model.get_image_features(pixels[..., :16, :16]), other), "now interpolated anew"
    model.float().save_pretrained(tmp_path)
    loaded = GLSCLForPreTraining.from_pretrained(tmp_path).eval()
    assert loaded.config.image_size == 24
    assert torch.equal(loaded.get_image_features(pixels.float()), model.get_image_features(pixels.float()))
