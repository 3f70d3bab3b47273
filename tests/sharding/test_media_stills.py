"""Promises about GIF, WebP, TIFF, AVIF, HEIC and the rest: what is shown, and what is refused by its name."""

from __future__ import annotations

import io
import struct

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from sharding.errors import BadData
from sharding.media import decode_image, decode_video, encode_image, probe_image
from sharding.media.config import ImageConfig
from sharding.media.hdr import to_sdr
from tests.sharding.still_files import gif, saved, small_first_frame, tiff, webp, webp_chunks

RANDOM = np.random.default_rng(0)
HEIGHT, WIDTH = 6, 10
SHAPE = (HEIGHT, WIDTH)
COLOURS = RANDOM.integers(0, 256, (*SHAPE, 3))
ALPHA = RANDOM.integers(0, 256, (*SHAPE, 1))
ON_WHITE = COLOURS * (ALPHA / 255) + 255 - ALPHA
XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
# From upright to how it lies in a file of each orientation.
LYING = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(float) - other).max())


def _cause(data: bytes) -> str:
    causes = set()
    for read in (decode_image, encode_image):
        with pytest.raises(BadData) as caught:
            read(data)
        causes.add(caught.value.cause)
    assert len(causes) == 1
    return causes.pop()


def _smooth(width: int = 64, height: int = 48) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + x * 2, 30 + y * 3, 60 + (x + y)], axis=-1).astype(np.uint8)


# ---------------------------------------------------------------- gif


FOUR = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)


def test_what_no_frame_of_a_gif_covers_is_transparent():
    numbers = RANDOM.integers(0, 4, (3, 4))
    for background in (0, 2):
        data = gif((8, 6), FOUR, [((2, 1), numbers, 0, None)], background)
        expected = np.full((6, 8, 3), 255)
        expected[1:4, 2:6] = FOUR[numbers]
        assert _distance(decode_image(data), expected) == 0
        kept = encode_image(data, ImageConfig(format="png", alpha="keep"))
        alpha = np.asarray(Image.open(io.BytesIO(kept.data)))[..., 3]
        assert (alpha == 255).sum() == 12
        assert alpha.min() == 0
    clear = np.where((numbers == 1)[..., None], 255, FOUR[numbers])
    assert _distance(decode_image(gif((4, 3), FOUR, [((0, 0), numbers, 0, 1)], 1)), clear) == 0
    for canvas in ((0, 0), (3, 2)):  # a frame larger than the canvas enlarges it
        assert _distance(decode_image(gif(canvas, FOUR, [((0, 0), numbers, 0, None)])), FOUR[numbers]) == 0


def test_frames_of_a_gif_are_composed_and_disposed_of_as_browsers_do():
    """The expected frames follow the rules for GIF89a; the same frames were compared with Chromium's by hand."""
    size, canvas = (8, 6), np.full((6, 8, 3), 255)
    frames, expected = [], []
    for number in range(12):
        height, width = RANDOM.integers(1, 7), RANDOM.integers(1, 9)
        y, x = RANDOM.integers(0, 7 - height), RANDOM.integers(0, 9 - width)
        numbers, disposal = RANDOM.integers(0, 4, (height, width)), number % 4
        clear = int(RANDOM.integers(0, 4)) if number % 3 else None
        frames.append(((x, y), numbers, disposal, clear))
        before, canvas = canvas, canvas.copy()
        part = canvas[y : y + height, x : x + width]
        part[numbers != clear] = FOUR[numbers[numbers != clear]]
        expected.append(canvas)
        if disposal == 2:
            canvas = canvas.copy()
            canvas[y : y + height, x : x + width] = 255
        elif disposal == 3:
            canvas = before
    data = gif(size, FOUR, frames, background=3)
    assert probe_image(data).frames == 12
    assert _distance(decode_image(data), expected[0]) == 0
    assert _distance(decode_video(data, 12), np.stack(expected)) == 0
    for cut in range(13, len(data), 23):
        try:
            decode_image(data[:cut])
        except BadData as fault:
            assert fault.cause == "decode-failed"  # noqa: PT017 - many cuts are whole, and that is right


# ---------------------------------------------------------------- webp


def test_what_no_frame_of_a_webp_covers_is_transparent():
    picture = Image.new("RGB", (20, 16), (200, 30, 40))
    shown = decode_image(small_first_frame(picture, (64, 48), (4, 2)))
    expected = np.full((48, 64, 3), 255)
    expected[2:18, 4:24] = (200, 30, 40)
    assert _distance(shown, expected) == 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_of_webp_costs_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved(Image.fromarray(_smooth()), "WEBP", lossless=True, exif=exif, icc_profile=b"none")
    chunks = webp_chunks(whole)
    for kind in (b"EXIF", b"ICCP"):
        for wrong in (b"", b"\0\1\2", b"II*\0\xff\xff\xff\xff"):
            data = webp([(name, wrong if name == kind else payload) for name, payload in chunks])
            expected = np.rot90(_smooth(), -1) if kind == b"ICCP" else _smooth()
            assert _distance(decode_image(data), expected) == 0
    assert _distance(decode_image(whole + b"more"), np.rot90(_smooth(), -1)) == 0


# ---------------------------------------------------------------- tiff


def _bits(values: np.ndarray, depth: int) -> bytes:
    bits = (values[..., None] >> np.arange(depth - 1, -1, -1) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(len(values), -1), axis=1).tobytes()


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiffs_of_every_depth_are_scaled_and_inverted(order):
    kinds = {1: None, 2: None, 4: None, 8: "u1", 16: f"{order}u2"}
    for depth, letter in kinds.items():
        values = RANDOM.integers(0, 1 << depth, SHAPE)
        plane = values.astype(letter).tobytes() if letter else _bits(values, depth)
        for photometric in (0, 1):
            shown = decode_image(tiff([plane], SHAPE, {258: depth, 262: photometric, 277: 1}, order))
            scaled = values * (255 / ((1 << depth) - 1))
            expected = _grey(scaled if photometric else 255 - scaled)
            assert _distance(shown, expected) <= 0.51, (depth, photometric)
    real = RANDOM.random(SHAPE)
    for photometric in (0, 1):
        data = tiff(
            [real.astype(f"{order}f4").tobytes()], SHAPE, {258: 32, 262: photometric, 277: 1, 339: 3}, order
        )
        assert _distance(decode_image(data), _grey(real if photometric else 1 - real) * 255) <= 0.51
    for kind, letter, top in ((1, "u4", 2**32 - 1), (2, "i4", 2**31 - 1)):
        values = RANDOM.integers(0, top, SHAPE)
        values[0, 0] = top
        data = tiff(
            [values.astype(order + letter).tobytes()], SHAPE, {258: 32, 262: 1, 277: 1, 339: kind}, order
        )
        assert _distance(decode_image(data), _grey(values / top * 255)) <= 0.51


@pytest.mark.parametrize("order", ["<", ">"])
def test_colour_tiffs_have_their_pixels_and_alpha_interleaved_or_in_planes(order):
    multiplied = np.concatenate([np.rint(COLOURS * ALPHA / 255).astype(int), ALPHA], axis=-1)
    apart = np.concatenate([COLOURS, ALPHA], axis=-1)
    for name, samples, extra, expected, tolerance in (
        ("RGB", COLOURS, {}, COLOURS, 0),
        ("alpha apart", apart, {338: 2}, ON_WHITE, 1),
        ("alpha multiplied in", multiplied, {338: 1}, ON_WHITE, 3),
        ("a channel that is no alpha", apart, {338: 0}, COLOURS, 0),
    ):
        count = samples.shape[2]
        for depth, letter, scale in ((8, "u1", 1), (16, f"{order}u2", 257)):
            tags = {258: [depth] * count, 262: 2, 277: count} | extra
            stored = (samples * scale).astype(letter)
            planes = [stored[..., channel].tobytes() for channel in range(count)]
            files = [tiff([stored.tobytes()], SHAPE, tags, order)]
            if extra != {338: 0}:  # of planes PIL reads no such file
                files.append(tiff(planes, SHAPE, tags | {284: 2}, order))
            for data in files:
                assert _distance(decode_image(data), expected) <= tolerance, (name, depth)
    grey = np.concatenate([COLOURS[..., :1], ALPHA], axis=-1).astype(np.uint8).tobytes()
    shown = decode_image(tiff([grey], SHAPE, {258: [8, 8], 262: 1, 277: 2, 338: 2}, order))
    assert _distance(shown, np.repeat(ON_WHITE[..., :1], 3, axis=2)) <= 1
    numbers, palette = RANDOM.integers(0, 256, SHAPE), RANDOM.integers(0, 256, (256, 3))
    for scale in (1, 257):  # 8 bits are against the specification, and met with
        tags = {258: 8, 262: 3, 277: 1, 320: (palette.T.reshape(-1) * scale).tolist()}
        data = tiff([numbers.astype(np.uint8).tobytes()], SHAPE, tags, order)
        assert _distance(decode_image(data), palette[numbers]) == 0
    inks = RANDOM.integers(0, 256, (*SHAPE, 4))
    data = tiff([inks.astype(np.uint8).tobytes()], SHAPE, {258: [8] * 4, 262: 5, 277: 4}, order)
    assert _distance(decode_image(data), (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255) <= 1.5


def test_tiffs_are_turned_upright_once():
    for orientation, lying in LYING.items():
        picture = np.ascontiguousarray(lying(COLOURS)).astype(np.uint8)
        data = tiff([picture.tobytes()], picture.shape[:2], {258: [8] * 3, 262: 2, 277: 3, 274: orientation})
        assert _distance(decode_image(data), COLOURS) == 0
        assert (probe_image(data).width, probe_image(data).height) == (WIDTH, HEIGHT)
        encoded = encode_image(data, ImageConfig(format="png", resize=3))
        assert (encoded.info.width, encoded.info.height) == (5, 3)


def test_tiffs_that_are_not_read_are_named():
    real = RANDOM.random((*SHAPE, 3))
    for plane, tags in (
        (real.astype("<f4"), {258: [32] * 3, 262: 2, 277: 3, 339: [3] * 3}),
        (real[..., 0].astype("<f8"), {258: 64, 262: 1, 277: 1, 339: 3}),
    ):
        assert _cause(tiff([plane.tobytes()], SHAPE, tags)) == "unsupported-tiff"
    pixels = COLOURS.astype(np.uint8).tobytes()
    colour = {258: [8] * 3, 262: 2, 277: 3}
    for tags in (
        colour | {50706: [1, 4]},  # DNG
        colour | {254: 1, 330: [8]},  # a small preview, the photograph below it
        {258: 8, 262: 32803, 277: 1},
    ):
        data = tiff([pixels], SHAPE, tags)
        assert _cause(data) in ("unsupported-raw", "unsupported-tiff")
    assert _cause(tiff([b"CR\2\0" + pixels[4:]], SHAPE, colour)) == "unsupported-raw"


# ---------------------------------------------------------------- jpeg, netpbm


def test_only_exif_turns_a_jpeg():
    photo = Image.fromarray(_smooth())
    assert decode_image(saved(photo, "JPEG", xmp=XMP)).shape == (48, 64, 3)
    assert encode_image(saved(photo, "JPEG", xmp=XMP), ImageConfig(format="keep")).info.height == 48


def test_dark_netpbm_of_16_bits_stays_dark():
    values = RANDOM.integers(0, 200, SHAPE)
    data = b"P5 10 6 65535\n" + values.astype(">u2").tobytes()
    assert _distance(decode_image(data), _grey(values / 257)) <= 0.51


# ---------------------------------------------------------------- avif and heic


def _with_numbers(data: bytes, primaries: int, transfer: int) -> bytes:
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]


def test_avif_colours_by_number_are_brought_to_srgb():
    data = saved(Image.fromarray(_smooth()), "AVIF", quality=95)
    plain = decode_image(data)
    for transfer, primaries in ((13, 12), (16, 9), (18, 9), (13, 9)):
        shown = decode_image(_with_numbers(data, primaries, transfer))
        assert _distance(shown, to_sdr(plain, transfer, primaries)) == 0
    for transfer, primaries in ((1, 1), (2, 2), (6, 1)):
        assert _distance(decode_image(_with_numbers(data, primaries, transfer)), plain) == 0
    with pytest.raises(BadData) as caught:
        decode_image(_with_numbers(data, 10, 13))
    assert caught.value.cause == "unsupported-colour"


def _heic(samples: np.ndarray, mode: str, **options) -> bytes:
    sink = io.BytesIO()
    size = (samples.shape[1], samples.shape[0])
    pillow_heif.encode(mode, size, np.ascontiguousarray(samples).tobytes(), sink, quality=95, **options)
    return sink.getvalue()


def test_heic_is_read_upright_with_alpha_and_in_srgb():
    """The decoder's own encoder writes the files; what they show is known from the arrays."""
    smooth = _smooth()
    assert _distance(decode_image(_heic(smooth, "RGB", chroma=444)), smooth) <= 6
    exif = Image.Exif()
    for orientation in (2, 6, 7):
        exif[0x0112] = orientation
        lying = np.ascontiguousarray(LYING[orientation](smooth))
        sink = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(lying)).save(
            sink, quality=95, chroma=444, exif=exif.tobytes()
        )
        data = sink.getvalue()
        assert _distance(decode_image(data), smooth) <= 6
        assert (probe_image(data).width, probe_image(data).height) == (64, 48)
    alpha = np.full((48, 64, 1), 255)
    alpha[:, :30] = 0
    data = _heic(np.concatenate([smooth, alpha], axis=2).astype(np.uint8), "RGBA", chroma=444)
    shown = decode_image(data)
    assert shown[:, :28].min() >= 252
    assert _distance(shown[:, 34:], smooth[:, 34:]) <= 8
    for resize in (None, 24):
        encoded = encode_image(data, ImageConfig(format="keep", resize=resize))
        assert encoded.extension == "webp"


def test_hdr_of_heic_is_mapped_from_all_its_bits():
    deep = _smooth().astype(np.uint16) * 150
    options = {
        "color_primaries": 9,
        "transfer_characteristics": 16,
        "matrix_coefficients": 9,
        "full_range_flag": 1,
    }
    shown = decode_image(_heic(deep, "RGB;16", chroma=444, **options))
    assert np.abs(shown.astype(int) - to_sdr(deep, 16, 9)).mean() < 3
    assert len(np.unique(shown)) > 60  # more than 8 bits of so dark a picture could give


def test_damaged_and_large_heic_is_bad_data():
    whole = _heic(_smooth(), "RGB")
    for cut in (30, 60, 200, len(whole) // 2, len(whole) - 20):
        assert _cause(whole[:cut]) == "decode-failed"
    for seed in range(8):
        damaged = bytearray(whole)
        places = np.random.default_rng(seed).integers(0, len(whole), 12)
        for place in places:
            damaged[place] ^= 0x55
        try:
            decode_image(bytes(damaged))
        except BadData as fault:
            assert fault.cause in ("decode-failed", "too-many-pixels", "unsupported-mp4")  # noqa: PT017
    with pytest.raises(BadData) as caught:
        probe_image(whole, max_pixels=1000)
    assert caught.value.cause == "too-many-pixels"


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("jxl", b"\xff\x0a\xfa\x1f\x41\x91"),
        ("jxl", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "),
        ("jpeg2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
        ("psd", b"8BPS\0\1"),
        ("pdf", b"%PDF-1.7\n%"),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'),
        ("svg", b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -- b -->\n<!DOCTYPE svg PUBLIC "a" "b">\n <svg:svg>'),
        ("html", b"\n<!DOCTYPE html><html><body>404"),
        ("raw", b"FUJIFILMCCD-RAW 0201"),
        ("raw", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom"),
        ("raw", b"IIRO\x08\0\0\0"),
        ("mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"),
        ("matroska", b"\x1aE\xdf\xa3\x9fB\x86"),
        ("ico", b"\0\0\1\0\1\0\x10\x10"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_are_named(name, data):
    for padded in (data, data + bytes(600)):
        assert _cause(padded) == f"unsupported-{name}"
        with pytest.raises(BadData) as caught:
            probe_image(padded)
        assert caught.value.cause == f"unsupported-{name}"


def test_what_is_nothing_is_no_unsupported_format():
    for data in (
        b"",
        b"\0",
        b"hello",
        bytes(2000),
        b"<!---->" * 600,
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"II*\0",
    ):
        assert _cause(data) == "decode-failed"
