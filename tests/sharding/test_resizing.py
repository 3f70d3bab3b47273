"""Promises of resizing: near a floating-point reference, colours untouched, any size, and no torch for it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from sharding.media import encode_image
from sharding.media.config import ImageConfig
from sharding.media.resizing import resized_pixels, resized_planes

SIZE = (150, 100)


def _texture(width: int = 200, height: int = 133) -> np.ndarray:
    """uint8 [H, W, 3]: detail at every scale, falling off as in photographs."""
    spectrum = np.fft.rfft2(np.random.default_rng(0).normal(size=(3, height, width)))
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    texture = np.fft.irfft2(spectrum / radius, s=(height, width)).transpose(1, 2, 0)
    # Colours of a photograph vary less than its brightness.
    texture = 0.8 * texture.mean(axis=2, keepdims=True) + 0.2 * texture
    return np.clip(128 + 40 * texture / texture.std(), 0, 255).astype(np.uint8)


def _lanczos(source: int, target: int) -> np.ndarray:
    """float64 [target, source]"""
    scale = source / target
    x = (np.arange(source) + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _reference(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows = np.tensordot(_lanczos(pixels.shape[0], size[1]), pixels.astype(float), 1)
    return np.clip(np.tensordot(_lanczos(pixels.shape[1], size[0]), rows, (1, 1)).swapaxes(0, 1), 0, 255)


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


def _by_pil(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(190, 126), SIZE, (100, 67), (41, 27)])
def test_resizing_is_closer_to_a_floating_point_reference_than_pils_bicubic(size):
    pixels = _texture()
    reference = _reference(pixels, size)
    assert _psnr(resized_pixels(pixels, size), reference) > _psnr(_by_pil(pixels, size), reference)
    grey = resized_pixels(pixels[:, :, :1], size)
    assert np.array_equal(grey[:, :, 0], resized_pixels(pixels, size)[:, :, 0])  # each channel by itself


@pytest.mark.parametrize("chroma", ["420", "444"])
def test_a_jpeg_made_of_planes_is_as_good_as_one_of_resized_pixels(chroma):
    pixels = _texture()
    reference = _reference(pixels, SIZE)
    planes = resized_planes(pixels, SIZE, chroma)
    by_planes = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg_yuv_planes(*planes, quality=95))
    by_pixels = simplejpeg.encode_jpeg(_by_pil(pixels, SIZE), 95, "RGB", chroma)
    assert _psnr(by_planes, reference) >= _psnr(simplejpeg.decode_jpeg(by_pixels), reference)
    stored = encode_image(
        _png(pixels), ImageConfig(resize=100, format="jpg", quality=95, subsampling=int(chroma))
    )
    assert stored.data == simplejpeg.encode_jpeg_yuv_planes(*planes, quality=95)
    assert simplejpeg.decode_jpeg_header(stored.data) == (100, 150, "YCbCr", chroma)


def test_even_surfaces_stay_as_they_are():
    """Greys exactly, and colours within the rounding of YCbCr: no seams, no tint, no white that is not white."""
    for level in range(256):
        flat = np.full((40, 60, 3), level, np.uint8)
        assert (resized_pixels(flat, (33, 22)) == level).all()
        y, cb, cr = resized_planes(flat, (33, 22), "420")
        assert (y == level).all()
        assert (cb == 128).all()
        assert (cr == 128).all()
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (12, 200, 91)]:
        flat = np.full((40, 60, 3), colour, np.uint8)
        assert (resized_pixels(flat, (33, 22)) == colour).all()
        expected = np.asarray(Image.fromarray(flat[:1, :1]).convert("YCbCr"))[0, 0].astype(int)
        for plane, value in zip(resized_planes(flat, (33, 22), "420"), expected, strict=True):
            assert np.abs(plane - value).max() <= 1


@pytest.mark.parametrize(
    ("source", "target"),
    [((1, 1), (2, 3)), ((2, 2), (1, 1)), ((3, 5), (1, 2)), ((9, 7), (5, 3)), ((20_000, 3), (7, 1)),
     ((2, 9_000), (1, 40)), ((2_000, 2_000), (16, 16)), ((17, 11), (40, 30))],
)  # fmt: skip
def test_any_size_becomes_any_other_and_keeps_its_brightness(source, target):
    pixels = np.random.default_rng(0).integers(0, 256, (source[1], source[0], 3), np.uint8)
    small = resized_pixels(pixels, target)
    assert small.shape == (target[1], target[0], 3)
    y, cb, cr = resized_planes(pixels, target, "420")
    assert y.shape == (target[1], target[0])
    assert cb.shape == cr.shape == (-(-target[1] // 2), -(-target[0] // 2))
    if pixels.size > 50_000:
        assert abs(small.mean() - pixels.mean()) < 1.5
        assert abs(y.mean() - pixels.mean()) < 1.5


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_resizing_needs_no_torch_which_every_decoding_process_would_load_anew(kind):
    source = f"""
import sys
from sharding.media.worker import MediaDecoder
decoder = MediaDecoder({{"resize": 20, "format": {kind!r}}}, None)
((facts, data),) = decoder.parts(sys.stdin.buffer.read())
assert facts["info"]["height"] == 20
print(*sys.modules)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", source],
        input=_png(_texture()),
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.split()
    assert b"av" in loaded
    assert b"torch" not in loaded
