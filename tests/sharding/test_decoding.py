"""Promises about decoding for reading: the pixels of PIL, whatever the way, and PIL's verdict on what is odd."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sharding import decoding, media
from sharding.decoding import decode_image
from sharding.errors import BadData


def _picture(width: int, height: int) -> Image.Image:
    """Gradients, edges and a little noise, as in photographs."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * across, 255 * down, 255 * (1 - across)], axis=-1)
    pixels += np.random.default_rng(0).normal(0, 6, pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(200, 30, 60))
    return image


def _jpeg(image: Image.Image, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", **{"quality": 90, **options})
    return sink.getvalue()


def _forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def pil(data: bytes, max_pixels: int) -> np.ndarray:
        raise AssertionError("PIL was asked")

    monkeypatch.setattr(media, "decode_image", pil)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(301, 207), (64, 64), (1, 1)])
def test_a_plain_jpeg_has_the_pixels_that_pil_gives_it_without_asking_pil(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], progressive: bool, subsampling: int
) -> None:
    data = _jpeg(_picture(*size), subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    _forbid(monkeypatch)
    got = decode_image(data)
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 2  # two builds of libjpeg-turbo


def test_grey_jpegs_become_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _jpeg(_picture(40, 30).convert("L"))
    expected = media.decode_image(data)
    _forbid(monkeypatch)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_jpeg_that_says_how_it_is_oriented_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _jpeg(_picture(40, 24), exif=exif)
    assert np.array_equal(decode_image(data), media.decode_image(data))
    assert decode_image(data).shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))


def test_an_orientation_behind_other_segments_is_seen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _jpeg(_picture(40, 24), exif=exif)
    segment = b"\xff\xed" + (60_002).to_bytes(2, "big") + bytes(60_000)
    assert decode_image(data[:2] + 2 * segment + data[2:]).shape == (40, 24, 3)


def test_cmyk_jpegs_are_left_to_pil() -> None:
    data = _jpeg(_picture(40, 24).convert("CMYK"))
    assert np.array_equal(decode_image(data), media.decode_image(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_left_to_pil(kind: str) -> None:
    sink = io.BytesIO()
    _picture(40, 24).save(sink, kind)
    assert np.array_equal(decode_image(sink.getvalue()), media.decode_image(sink.getvalue()))


def test_a_cut_jpeg_is_bad_data_wherever_it_is_cut() -> None:
    data = _jpeg(_picture(80, 60))
    for length in (0, 2, 3, 20, 200, len(data) // 2, len(data) - 40):
        with pytest.raises(BadData) as caught:
            decode_image(data[:length])
        assert caught.value.cause == "decode-failed"


def test_a_jpeg_that_the_fast_decoder_complains_about_gets_pils_verdict() -> None:
    data = bytearray(_jpeg(_picture(80, 60)))
    data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    damaged = bytes(data)
    with pytest.raises(decoding._Peculiar):
        decoding._decode_jpeg(damaged, None, media.MAX_PIXELS)
    assert np.array_equal(decode_image(damaged), media.decode_image(damaged))


def test_too_many_pixels_are_refused_by_the_header() -> None:
    with pytest.raises(BadData) as caught:
        decode_image(_jpeg(_picture(80, 60)), max_pixels=4799)
    assert caught.value.cause == "too-many-pixels"


@pytest.mark.parametrize(
    ("at_least", "shorter"),
    [(None, 480), (481, 480), (480, 480), (241, 480), (240, 240), (121, 240), (120, 120), (60, 60), (7, 60)],
)
def test_a_jpeg_is_decoded_smaller_only_by_powers_of_two_and_never_below_what_is_asked(
    at_least: int | None, shorter: int
) -> None:
    image = decode_image(_jpeg(_picture(640, 480)), at_least)
    assert image.shape == (shorter, shorter * 4 // 3, 3)


def test_resampling_to_half_of_what_was_asked_looks_the_same() -> None:
    """Twice the target is the reserve that PIL's ``thumbnail`` holds to be indistinguishable."""
    data = _jpeg(_picture(900, 900))

    def small(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((112, 112), Image.Resampling.BICUBIC)).astype(int)

    reduced = decode_image(data, 224)
    assert reduced.shape == (225, 225, 3)
    difference = np.abs(small(reduced) - small(decode_image(data)))
    assert difference.mean() < 1
    assert np.quantile(difference, 0.999) < 16
