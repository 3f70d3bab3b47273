"""Pictures as heavy as photographs, made from the bundled emoji: the same for every contestant and every run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

EMOJI = Path(__file__).parents[1] / "pipeline" / "demo" / "corpus" / "images"
_FIELD = 1024
_FIELDS = 8


def pictures(count: int, shorter: tuple[int, int], *, quality: int = 90) -> Iterator[tuple[bytes, str]]:
    """(JPEG, caption) of so many pictures: an emoji on a piece of a noise field with a photograph's spectrum.

    The shorter side is drawn from ``shorter`` (both ends included), the longer is up to 1.34 times as long; half
    are upright. 4:2:0, as cameras and web servers store them; about 0.36 bytes a pixel at ``quality`` 90.
    """
    files = sorted(EMOJI.glob("*.webp"))
    for number in range(count):
        draws = np.random.Generator(np.random.Philox(key=number))
        short = int(draws.integers(shorter[0], shorter[1] + 1))
        long = int(short * draws.uniform(1.0, 1.34))
        width, height = (short, long) if draws.random() < 0.5 else (long, short)
        left, top = draws.integers(0, _FIELD - width), draws.integers(0, _FIELD - height)
        picture = Image.fromarray(
            _field(int(draws.integers(_FIELDS)))[top : top + height, left : left + width]
        )
        file = files[number % len(files)]
        side = int(short * draws.uniform(0.5, 1.0))
        with Image.open(file) as emoji:
            sticker = emoji.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
        picture.paste(sticker, ((width - side) // 2, (height - side) // 2), sticker)
        sink = io.BytesIO()
        picture.save(sink, "JPEG", quality=quality)
        yield sink.getvalue(), f"number {number}: the emoji {file.stem} on a field of many colours"


@cache
def _field(number: int) -> np.ndarray:
    """uint8 [1024, 1024, 3]: noise whose amplitude falls with frequency, as it does in photographs."""
    draws = np.random.Generator(np.random.Philox(key=(number, 1)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_FIELD), np.fft.rfftfreq(_FIELD), indexing="ij"))
    amplitude = 1 / np.maximum(frequency, 1 / _FIELD)
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(draws.standard_normal((_FIELD, _FIELD))) * amplitude
        values = np.fft.irfft2(spectrum, s=(_FIELD, _FIELD))
        channels.append(values / values.std())
    # Colours of a photograph vary less than its brightness.
    shared = np.mean(channels, axis=0)
    mixed = np.stack([0.8 * shared + 0.2 * channel for channel in channels], axis=-1)
    return np.clip(128 + 45 * mixed, 0, 255).astype(np.uint8)
