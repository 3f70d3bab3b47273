"""From HDR and wide-gamut colours to sRGB: how PQ, HLG, BT.2020 and Display P3 are read.

Colours are named by the numbers of ITU-T H.273, which FFmpeg, PNG's ``cICP``, and the ``nclx`` of AVIF and HEIC share.
The conversion works on light, one picture at a time, without looking at its content, so a clip does not flicker:

1. To light that a display emits, in units of SDR white. PQ: SMPTE ST 2084. HLG: the inverse OETF and the OOTF of
   ITU-R BT.2100 (display of 1000 cd/m2, system gamma 1.2). SDR white is 203 cd/m2, the reference white of ITU-R
   BT.2408. SDR with other primaries: the sRGB curve, since SDR code values are stored as they are.
2. To the primaries of sRGB, by a matrix of the chromaticities.
3. PQ and HLG: the largest of R, G, B is mapped, and all three scaled alike, so that hues stay. Below 80 % of SDR white
   nothing changes; from there to 1000 cd/m2 a Moebius curve, smooth at its beginning, ends at white. Reference white
   (203 cd/m2) keeps 90 % of its light: 244 as sRGB. What is brighter than 1000 cd/m2 becomes white.
4. A colour outside of sRGB is moved towards the grey of its own luminance until it is inside.
5. The curve of sRGB, rounded to 8 bits.

Every step is a table or one IEEE operation a pixel: the same bytes on every processor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sharding.errors import BadData

PQ, HLG = 16, 18
_LINEAR = 8
_UNSUPPORTED = frozenset({9, 10, 17})  # logarithmic, and that of digital cinema
_WHITE = 203.0  # cd/m2 of SDR white, ITU-R BT.2408
_PEAK = 1000.0 / _WHITE
_KNEE = 0.8
# x and y of red, green, blue and white: ITU-T H.273, table 2. Of those that are left out, 1 is sRGB's own, and 4 to 7
# (television before HD) are near enough to it that players show them as they are.
_D65 = (0.3127, 0.3290)
_PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),  # Display P3
}
_NEAR_SRGB = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 22})
_OUT = 1 << 15  # steps of the table to sRGB: an eighth of a step of 8 bits where it is steepest
_FINE = 1 << 14
_BLOCK = 1 << 15  # pixels at a time, whose intermediates stay in a processor's cache


def needs_mapping(transfer: int, primaries: int) -> bool:
    """Whether pixels of these H.273 numbers differ, to the eye, from sRGB: PQ, HLG, linear light, a wide gamut."""
    return transfer in (PQ, HLG, _LINEAR) or transfer in _UNSUPPORTED or primaries not in _NEAR_SRGB


def to_sdr(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """uint8 [H, W, 3] in sRGB of colours that ``needs_mapping`` tells of; others come back with the same colours.

    A PNG is such a picture where its ``cICP`` chunk says so (four bytes: primaries, transfer, matrix, full range; the
    chunk overrides ``iCCP``, ``sRGB``, ``gAMA`` and ``cHRM``); AVIF and HEIC say it by ``nclx``. A decoder that gives
    RGB has applied the matrix. HDR wants 16 bits; of 8, dark shades come in steps.

    Args:
        rgb: uint8 or uint16 [H, W, 3], the non-linear R'G'B' of the file in full range (0 is black; a picture whose
            full-range flag is 0 has to be stretched before).
        transfer: H.273 transfer characteristics; 16 is PQ, 18 HLG, 8 linear. Others are read with the curve of sRGB.
        primaries: H.273 colour primaries. For PQ and HLG 2 (unspecified) stands for BT.2020.

    Raises:
        BadData: ``unsupported-colour``: primaries or a transfer that are not known here.
    """
    assert rgb.dtype in (np.uint8, np.uint16)
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    if not needs_mapping(transfer, primaries):
        return rgb if rgb.dtype == np.uint8 else _OF_16_BITS[rgb]
    if transfer in _UNSUPPORTED:
        raise BadData(
            "unsupported-colour", f"transfer characteristics {transfer} (ITU-T H.273) are not known"
        )
    if primaries in _NEAR_SRGB:
        primaries = 9 if primaries == 2 and transfer in (PQ, HLG) else 1
    if primaries not in _PRIMARIES:
        raise BadData("unsupported-colour", f"colour primaries {primaries} (ITU-T H.273) are not known")
    pixels = rgb.reshape(-1, 3)
    mapped = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), _BLOCK):
        mapped[start : start + _BLOCK] = _mapped(pixels[start : start + _BLOCK], transfer, primaries)
    return mapped.reshape(rgb.shape)


def _mapped(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """uint8 [N, 3] of [N, 3]."""
    table = _light(transfer, 65_535 if pixels.dtype == np.uint16 else 255)
    red, green, blue = (table[pixels[:, channel]] for channel in range(3))
    if transfer == HLG:
        # The OOTF: light of the display is that of the scene times its luminance to the power of gamma - 1.
        weights = _luminance(primaries)
        luminance = weights[0] * red + weights[1] * green + weights[2] * blue
        gain = _HLG_GAIN[_steps(np.sqrt(luminance), _FINE)]
        red, green, blue = red * gain, green * gain, blue * gain
    if primaries != 1:
        red, green, blue = _turned(red, green, blue, _to_srgb(primaries))
    if transfer in (PQ, HLG):
        largest = np.maximum(np.maximum(red, green), blue)
        if largest.max(initial=0) > _KNEE:
            ratio = _tone_ratio(largest)
            red, green, blue = red * ratio, green * ratio, blue * ratio
    if primaries != 1:
        red, green, blue = _inside(red, green, blue)
    return np.stack([_SRGB[_steps(channel, _OUT)] for channel in (red, green, blue)], axis=1)


def _steps(values: np.ndarray, top: int) -> np.ndarray:
    """Places in a table whose last one, ``top``, stands for 1."""
    return np.rint(np.clip(values, np.float32(0), np.float32(1)) * np.float32(top)).astype(np.int32)


def _turned(red: np.ndarray, green: np.ndarray, blue: np.ndarray, matrix: np.ndarray) -> list[np.ndarray]:
    return [row[0] * red + row[1] * green + row[2] * blue for row in matrix]


def _inside(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> list[np.ndarray]:
    """Light in sRGB's primaries, moved towards the grey of its luminance until no value is below 0 or above 1."""
    least = np.minimum(np.minimum(red, green), blue)
    most = np.maximum(np.maximum(red, green), blue)
    outside = np.flatnonzero((least < 0) | (most > 1))
    if len(outside):
        weights = _luminance(1)
        parts = [red[outside], green[outside], blue[outside]]
        grey = weights[0] * parts[0] + weights[1] * parts[1] + weights[2] * parts[2]
        grey = np.clip(grey, np.float32(0), np.float32(1))
        least, most = least[outside], most[outside]
        # Both denominators are 0 only where the numerators are, and there any share will do.
        tiny = np.float32(1e-9)
        share = np.minimum(
            np.where(least < 0, grey / np.maximum(grey - least, tiny), np.float32(1)),
            np.where(most > 1, (1 - grey) / np.maximum(most - grey, tiny), np.float32(1)),
        )
        for channel, part in zip((red, green, blue), parts, strict=True):
            channel[outside] = grey + share * (part - grey)
    return [red, green, blue]


@lru_cache(maxsize=16)
def _light(transfer: int, top: int) -> np.ndarray:
    """float32 [top + 1]: code values to light. PQ: of the display; HLG: of the scene, 0 to 1; both at most the peak."""
    code = np.arange(top + 1, dtype=np.float64) / top
    if transfer == PQ:
        power = code ** (1 / 78.84375)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
        return np.minimum(light * 10_000 / _WHITE, _PEAK).astype(np.float32)
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    return (code if transfer == _LINEAR else _srgb_to_light(code)).astype(np.float32)


def _srgb_to_light(code: np.ndarray) -> np.ndarray:
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def _light_to_srgb() -> np.ndarray:
    light = np.arange(_OUT + 1) / _OUT
    code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(code * 255).astype(np.uint8)


def _hlg_gain() -> np.ndarray:
    """By the square root of the scene's luminance: 1000 cd/m2, in units of SDR white, times luminance ** 0.2."""
    return (_PEAK * (np.arange(_FINE + 1) / _FINE) ** 0.4).astype(np.float32)


def _tone_ratio(light: np.ndarray) -> np.ndarray:
    """By what this light, in units of SDR white, is multiplied: 1 up to the knee, then a curve that ends in white."""
    knee, peak = _KNEE, _PEAK
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    scale = (b**2 + 2 * b * knee + knee**2) / (b - a)
    bright = np.clip(light, np.float32(knee), np.float32(peak))
    curve = np.float32(scale) * (bright + np.float32(a)) / (bright + np.float32(b))
    return np.where(light <= np.float32(knee), np.float32(1), curve / np.maximum(light, np.float32(knee)))


_SRGB, _HLG_GAIN = _light_to_srgb(), _hlg_gain()
_OF_16_BITS = np.rint(np.arange(65_536) / 257).astype(np.uint8)


def _to_xyz(primaries: int) -> np.ndarray:
    """float64 [3, 3], from linear RGB: SMPTE RP 177."""
    red, green, blue, white = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in _PRIMARIES[primaries])
    columns = np.stack([red, green, blue], axis=1)
    return columns * np.linalg.solve(columns, white)


@lru_cache(maxsize=8)
def _to_srgb(primaries: int) -> np.ndarray:
    """float32 [3, 3]; whites are kept (von Kries, in the cone space of Bradford) where they differ."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    given, wanted = (bradford @ _to_xyz(number) @ np.ones(3) for number in (primaries, 1))
    adapted = np.linalg.inv(bradford) @ np.diag(wanted / given) @ bradford
    return (np.linalg.inv(_to_xyz(1)) @ adapted @ _to_xyz(primaries)).astype(np.float32)


@lru_cache(maxsize=8)
def _luminance(primaries: int) -> np.ndarray:
    """float32 [3]: shares of R, G and B in the luminance."""
    return _to_xyz(primaries)[1].astype(np.float32)
