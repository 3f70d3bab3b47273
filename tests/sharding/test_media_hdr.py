"""Promises about HDR and wide gamuts: what SDR can show keeps its colour, what is brighter or purer keeps its hue.

The references are computed here, in floating point, from the formulas of ITU-R BT.2100 and SMPTE ST 2084.
"""

from __future__ import annotations

import numpy as np
import pytest

from sharding.errors import BadData
from sharding.media.hdr import HLG, PQ, needs_mapping, to_sdr

SDR, BT709, BT2020, P3 = 1, 1, 9, 12
COLOURS = np.array(
    [
        [128, 128, 128],
        [0, 0, 0],
        [200, 60, 30],
        [224, 172, 138],
        [40, 140, 60],
        [10, 20, 200],
        [180, 170, 20],
    ],
    np.float64,
)
# From the primaries of sRGB: ITU-R BT.2087 for BT.2020; SMPTE EG 432-1 for Display P3.
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])


def light(colours: np.ndarray) -> np.ndarray:
    code = colours / 255
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def _hlg(cd: np.ndarray) -> np.ndarray:
    """HLG of light [N, 3] of a display of 1000 cd/m2, in BT.2020."""
    shown = cd / 1000
    luminance = np.maximum(shown @ [0.2627, 0.6780, 0.0593], 1e-9)[:, None]
    scene = shown * luminance ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def _pq(cd: np.ndarray) -> np.ndarray:
    power = (cd / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


CURVES = {HLG: _hlg, PQ: _pq}


def _mapped(code: np.ndarray, transfer: int, primaries: int, bits: int = 16) -> np.ndarray:
    """[N, 3] of codes 0 to 1, through the function under test."""
    kind = np.uint16 if bits == 16 else np.uint8
    pixels = np.rint(code * np.iinfo(kind).max).astype(kind)[None]
    return to_sdr(pixels, transfer, primaries)[0].astype(int)


@pytest.mark.parametrize("transfer", [HLG, PQ])
@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1), (8, 5)])
def test_what_sdr_can_show_keeps_its_colour(transfer, bits, tolerance):
    code = CURVES[transfer](light(COLOURS) @ TO_2020.T * 203)
    assert np.abs(_mapped(code, transfer, BT2020, bits) - COLOURS).max() <= tolerance


@pytest.mark.parametrize(("primaries", "matrix"), [(BT2020, TO_2020), (P3, TO_P3)])
def test_wide_gamuts_of_sdr_are_converted_and_greys_stay(primaries, matrix):
    linear = light(COLOURS) @ matrix.T
    code = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(_mapped(code, SDR, primaries) - COLOURS).max() <= 1
    greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    assert np.array_equal(to_sdr(greys, SDR, primaries), greys)


@pytest.mark.parametrize("transfer", [HLG, PQ])
def test_highlights_stay_apart_and_end_in_white(transfer):
    cd = np.array([20, 100, 203, 400, 700, 1000], np.float64)[:, None].repeat(3, axis=1)
    shown = _mapped(CURVES[transfer](cd), transfer, BT2020)
    assert (np.ptp(shown, axis=1) == 0).all()
    assert (np.diff(shown[:, 0]) > 0).all()
    assert shown[2, 0] == pytest.approx(243, abs=2)
    assert shown[-1].min() >= 254
    ramp = np.linspace(0, 1, 5000)[:, None].repeat(3, axis=1)
    assert (np.diff(_mapped(ramp, transfer, BT2020)[:, 0]) >= 0).all()


def test_light_above_the_peak_is_white_and_a_bright_colour_keeps_its_hue():
    assert _mapped(_pq(np.full((1, 3), 9000.0)), PQ, BT2020).tolist() == [[255] * 3]
    orange = light(np.array([[200.0, 120, 30]])) @ TO_2020.T
    dim, bright = (light(_mapped(_pq(orange * cd), PQ, BT2020).astype(float))[0] for cd in (203, 1200))
    assert bright.max() > 1.4 * dim.max()
    assert bright / bright.max() == pytest.approx(dim / dim.max(), abs=0.02)


def test_colours_outside_of_srgb_move_towards_their_grey_and_no_channel_wraps():
    pure = np.eye(3) * 0.9
    for transfer in (SDR, HLG, PQ):
        shown = _mapped(pure, transfer, BT2020)
        assert (shown.argmax(axis=1) == [0, 1, 2]).all()
        assert (shown.max(axis=1) - shown.min(axis=1) > 100).all()


def test_unspecified_primaries_of_hdr_are_those_of_bt2020():
    code = CURVES[HLG](light(COLOURS) @ TO_2020.T * 203)
    assert np.array_equal(_mapped(code, HLG, 2), _mapped(code, HLG, BT2020))


def test_srgb_and_what_is_near_comes_back_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    for transfer, primaries in ((1, 1), (13, 1), (2, 2), (6, 6), (4, 5), (14, 1)):
        assert not needs_mapping(transfer, primaries)
        assert np.array_equal(to_sdr(pixels, transfer, primaries), pixels)
        assert np.array_equal(to_sdr(pixels.astype(np.uint16) * 257, transfer, primaries), pixels)


def test_linear_light_gets_the_curve_of_srgb():
    assert _mapped(light(COLOURS), 8, BT709).tolist() == COLOURS.astype(int).tolist()


@pytest.mark.parametrize(("transfer", "primaries"), [(PQ, 8), (SDR, 10), (SDR, 99), (9, 1), (17, 10)])
def test_colours_that_are_not_known_are_refused_by_name(transfer, primaries):
    with pytest.raises(BadData, match="unsupported-colour"):
        to_sdr(np.zeros((2, 2, 3), np.uint8), transfer, primaries)
