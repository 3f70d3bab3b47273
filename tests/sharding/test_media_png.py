"""Promises about PNG: what browsers show of it, whatever its chunks; references are arrays, without a decoder."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sharding.errors import BadData
from sharding.media import decode_image, encode_image, probe_image
from sharding.media.config import ImageConfig
from sharding.media.hdr import to_sdr
from tests.sharding.still_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    chunk,
    png,
    png_rows,
    transparent,
)

RANDOM = np.random.default_rng(0)
SAMPLES = RANDOM.integers(0, 256, (9, 13, 3))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
CHROMATICITIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def _stored(data: bytes, **options) -> np.ndarray:
    encoded = encode_image(data, ImageConfig(**{"format": "png", **options}))
    return np.asarray(Image.open(io.BytesIO(encoded.data)))


def _is_bad(data: bytes) -> bool:
    """Whether both ways to read it call it ``decode-failed``."""
    causes = []
    for read in (decode_image, encode_image):
        with pytest.raises(BadData) as caught:
            read(data)
        causes.append(caught.value.cause)
    return causes == ["decode-failed"] * 2


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(float) - other).max())


# ---------------------------------------------------------------- chunks


def _bloated_profile(size: int) -> bytes:
    return struct.pack(">I", size) + SRGB[4:] + bytes(size - len(SRGB))


HARMLESS = {
    "long zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 << 20))),
    "long iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
    "long tEXt": chunk(b"tEXt", b"workflow\0" + b"x" * (2 << 20)),
    "long profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(_bloated_profile(3 << 19))),
    "endless profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(bytes(8 << 20))),
    "empty iCCP": chunk(b"iCCP", b""),
    "iCCP without a name": chunk(b"iCCP", b"\0\0" + zlib.compress(SRGB)),
    "iCCP of another compression": chunk(b"iCCP", b"a\0\1" + zlib.compress(SRGB)),
    "iCCP that is no zlib": chunk(b"iCCP", b"a\0\0abc"),
    "zTXt that is no zlib": chunk(b"zTXt", b"a\0\0abc"),
    "gAMA of nothing": chunk(b"gAMA", bytes(4)),
    "fcTL alone": chunk(b"fcTL", bytes(26)),
    "fcTL out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0\0\0\7" + bytes(22)),
    "acTL of no frames": chunk(b"acTL", bytes(8)),
    "cICP of a YCbCr": chunk(b"cICP", bytes([12, 13, 1, 1])),
    "eXIf that is none": chunk(b"eXIf", b"nothing"),
    "a name of no letters": chunk(b"a\0b1", b"x"),
    "a text named transparency": chunk(b"tEXt", b"transparency\0x"),
    **{
        f"{kind.decode()} with a wrong check sum": chunk(kind, payload, flip=1)
        for kind, payload in (
            (b"tEXt", b"Software\0x"), (b"zTXt", b"a\0\0" + zlib.compress(b"b")), (b"iTXt", b"a\0\0\0\0\0b"),
            (b"pHYs", bytes(9)), (b"gAMA", struct.pack(">I", 100_000)), (b"tIME", bytes(7)), (b"eXIf", TURNED),
            (b"cHRM", struct.pack(">8I", *CHROMATICITIES)), (b"bKGD", bytes(6)), (b"vpAg", bytes(9)),
            (b"tRNS", bytes(6)), (b"cICP", bytes([9, 16, 0, 1])), (b"acTL", struct.pack(">II", 3, 0)),
            (b"iCCP", b"a\0\0" + zlib.compress(SRGB)), (b"PLTE", bytes(6)),
        )
    },
    **{
        f"{kind.decode()} of {size} bytes": chunk(kind, bytes(size))
        for kind, size in (
            (b"gAMA", 1), (b"pHYs", 1), (b"cHRM", 3), (b"sRGB", 0), (b"tRNS", 1), (b"acTL", 3), (b"tIME", 2),
            (b"bKGD", 1), (b"fcTL", 4), (b"cICP", 1), (b"hIST", 1), (b"sPLT", 0), (b"sBIT", 0), (b"eXIf", 0),
        )
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Invalid APNG")
@pytest.mark.parametrize("place", ["before", "behind"])
def test_no_ancillary_chunk_costs_an_image_or_changes_a_pixel(place):
    for name, added in HARMLESS.items():
        data = png(SAMPLES, 8, RGB, **{place: added})
        assert _distance(decode_image(data), SAMPLES) == 0, name
        assert _distance(_stored(data), SAMPLES) == 0, name
        assert (probe_image(data).width, probe_image(data).height) == (13, 9), name


def test_what_other_programs_could_not_open_is_not_kept_as_it_lies():
    plain = png(SAMPLES, 8, RGB, before=chunk(b"pHYs", bytes(9)), behind=chunk(b"tEXt", b"Title\0A"))
    assert encode_image(plain, ImageConfig(format="keep")).data == plain
    profiled = png(SAMPLES, 8, RGB, before=chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(SRGB)))
    assert encode_image(profiled, ImageConfig(format="keep")).data == profiled
    for name in ("long zTXt", "gAMA of 1 bytes", "tEXt with a wrong check sum", "empty iCCP"):
        for place in ("before", "behind"):
            kept = encode_image(png(SAMPLES, 8, RGB, **{place: HARMLESS[name]}), ImageConfig(format="keep"))
            with Image.open(io.BytesIO(kept.data)) as image:
                assert _distance(np.asarray(image), SAMPLES) == 0, name


def test_metadata_cannot_fill_the_memory():
    inflates = zlib.compress(bytes(32 << 20))
    bombs = [
        chunk(b"iCCP", b"a\0\0" + inflates),
        chunk(b"zTXt", b"a\0\0" + inflates),
        chunk(b"iTXt", b"a\0\1\0\0\0" + inflates),
    ]
    for bomb in bombs:
        data = png(SAMPLES, 8, RGB, before=bomb)
        tracemalloc.start()
        decode_image(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def test_pixels_that_are_whole_are_kept_and_lost_ones_are_not():
    packed = zlib.compress(png_rows(SAMPLES, 8))
    other_adler = packed[:-1] + bytes([packed[-1] ^ 1])
    whole = png(SAMPLES, 8, RGB)
    parts = [chunk(b"IDAT", packed[at : at + 7]) + chunk(b"IDAT", b"") for at in range(0, len(packed), 7)]
    for name, data in {
        "IDAT with a wrong check sum": png(SAMPLES, 8, RGB, pixels=chunk(b"IDAT", packed, flip=1)),
        "zlib with a wrong check sum": png(SAMPLES, 8, RGB, pixels=chunk(b"IDAT", other_adler)),
        "no IEND": whole[:-12],
        "an IEND cut short": whole[:-3],
        "bytes behind": whole + b"more" * 9,
        "text between": png(
            SAMPLES, 8, RGB, pixels=chunk(b"IDAT", packed[:50]) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", packed[50:])
        ),
        "many and empty IDAT": png(SAMPLES, 8, RGB, pixels=b"".join(parts)),
    }.items():  # fmt: skip
        assert _distance(decode_image(data), SAMPLES) == 0, name
        assert _distance(_stored(data), SAMPLES) == 0, name
    stored = bytearray(zlib.compress(png_rows(SAMPLES, 8), 0))
    stored[40] ^= 64  # a pixel, where nothing but check sums can tell
    header = bytearray(whole)
    header[29] ^= 1
    colours = chunk(b"PLTE", bytes(6), flip=1)
    for name, data in {
        "a changed pixel": png(SAMPLES, 8, RGB, pixels=chunk(b"IDAT", bytes(stored), flip=1)),
        "half of the rows": png(
            SAMPLES, 8, RGB, pixels=chunk(b"IDAT", zlib.compress(png_rows(SAMPLES[:4], 8)))
        ),
        "half of the rows, interlaced": png(
            SAMPLES,
            8,
            RGB,
            pixels=chunk(b"IDAT", zlib.compress(png_rows(SAMPLES, 8, True)[:-60])),
            interlaced=True,
        ),
        "cut in the pixels": whole[:200],
        "no pixels": png(SAMPLES, 8, RGB, pixels=b""),
        "IHDR with a wrong check sum": bytes(header),
        "a palette with a wrong check sum": png(SAMPLES[..., :1] & 1, 1, PALETTE, before=colours),
        "no palette": png(SAMPLES[..., :1] & 1, 1, PALETTE),
        "an unknown critical chunk": png(SAMPLES, 8, RGB, before=chunk(b"CgBI", bytes(4))),
        "a length beyond the file": whole[:33] + b"\x7f\xff\xff\xfftEXt" + whole[33:],
    }.items():
        assert _is_bad(data), name


# ---------------------------------------------------------------- transparency


def _on(ground: tuple[int, int, int], colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """float [H, W, 3] of colours and alpha from 0 to 1."""
    return 255 * colours * alpha + np.array(ground) * (1 - alpha)


@pytest.mark.parametrize("interlaced", [False, True])
def test_transparency_of_every_colour_type_and_depth_is_composited_and_kept(interlaced):
    for colour, depths in (
        (GREY, (1, 2, 4, 8, 16)), (RGB, (8, 16)), (GREY_ALPHA, (8, 16)), (RGB_ALPHA, (8, 16)),
    ):  # fmt: skip
        channels = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGB_ALPHA: 4}[colour]
        for depth in depths:
            top = (1 << depth) - 1
            samples = RANDOM.integers(0, top + 1, (9, 13, channels))
            added = b""
            if colour in (GREY, RGB):
                key = (top * 2 // 3,) * channels
                samples[2:5, 3:8] = key
                added = transparent(*key)
                alpha = 1 - (samples == key).all(axis=2, keepdims=True)
                shown = samples / top
            else:
                alpha, shown = samples[..., -1:] / top, samples[..., :-1] / top
            data = png(samples, depth, colour, before=added, interlaced=interlaced)
            name = f"colour type {colour}, {depth} bits"
            shown = np.broadcast_to(shown, (9, 13, 3))
            white = _on((255, 255, 255), shown, alpha)
            assert _distance(decode_image(data), white) <= 2, name
            assert _distance(_stored(data), white) <= 2, name
            assert _distance(_stored(data, alpha="#10c020"), _on((16, 192, 32), shown, alpha)) <= 2, name
            kept = _stored(data, alpha="keep")
            assert _distance(kept[..., 3], alpha[..., 0] * 255) <= 1, name
            seen = alpha[..., 0] > 0
            assert _distance(kept[seen][:, :3], (shown * 255)[seen]) <= 1, name


@pytest.mark.parametrize("colour", [GREY, RGB])
def test_sixteen_bits_of_the_transparent_colour_are_compared(colour):
    channels = 1 if colour == GREY else 3
    samples = np.full((4, 4, channels), 0x8000)
    samples[0, :, -1] = 0x8001  # equal in its higher byte
    samples[1, :, 0] = 0x7F00
    shown = decode_image(png(samples, 16, colour, before=transparent(*(0x8000,) * channels)))
    assert (shown[2:] == 255).all()
    assert (shown[:2].min(axis=2) < 130).all()


def test_palettes_are_transparent_as_far_as_their_list_goes():
    for depth in (1, 2, 4, 8):
        count = 1 << depth
        numbers = RANDOM.integers(0, count, (9, 13, 1))
        colours = RANDOM.integers(0, 256, (count, 3))
        palette = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
        for given in {0, 1, count // 2, count, count + 3}:
            listed = RANDOM.integers(0, 256, given)
            alpha = np.full(count, 255)
            alpha[: min(given, count)] = listed[:count]
            data = png(
                numbers, depth, PALETTE, before=palette + chunk(b"tRNS", listed.astype(np.uint8).tobytes())
            )
            shown, part = colours[numbers[..., 0]] / 255, alpha[numbers] / 255
            assert _distance(decode_image(data), _on((255, 255, 255), shown, part)) <= 1, (depth, given)
            if (alpha < 255).any():
                assert _distance(_stored(data, alpha="keep")[..., 3], alpha[numbers[..., 0]]) == 0, depth
    before = png(numbers, 8, PALETTE, before=chunk(b"tRNS", b"\0" * 9) + palette)
    assert _distance(decode_image(before), colours[numbers[..., 0]]) == 0


# ---------------------------------------------------------------- colour and orientation


def _to_srgb(light: np.ndarray) -> np.ndarray:
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def test_gamma_is_applied_unless_something_better_is_said():
    ramp = np.repeat(np.arange(0, 256, 5)[None, :, None], 2, axis=0)
    primaries = chunk(b"cHRM", struct.pack(">8I", *CHROMATICITIES))
    for gamma in (0.35, 0.55, 1.0, 1.8):
        added = chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
        expected = np.repeat(_to_srgb((ramp / 255) ** (1 / gamma)), 3, axis=2)
        for more in (b"", primaries):
            assert _distance(decode_image(png(ramp, 8, GREY, before=added + more)), expected) <= 1, gamma
        for better in (
            chunk(b"sRGB", b"\0"),
            chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(SRGB)),
            chunk(b"cICP", bytes([1, 13, 0, 1])),
        ):
            plain = decode_image(png(ramp, 8, GREY, before=better + added))
            assert _distance(plain, np.repeat(ramp, 3, axis=2)) == 0
    usual = decode_image(png(ramp, 8, GREY, before=chunk(b"gAMA", struct.pack(">I", 45_455))))
    assert _distance(usual, np.repeat(ramp, 3, axis=2)) == 0
    deep = np.repeat(np.arange(0, 65536, 771)[None, :, None], 3, axis=2)
    linear = chunk(b"gAMA", struct.pack(">I", 100_000))
    assert _distance(decode_image(png(deep, 16, RGB, before=linear)), _to_srgb(deep / 65535)) <= 1


def test_primaries_with_a_curve_and_colours_by_number_are_brought_to_srgb():
    colours = RANDOM.integers(60, 200, (9, 13, 3))
    numbered = decode_image(png(colours, 8, RGB, before=chunk(b"cICP", bytes([12, 13, 0, 1]))))
    assert _distance(numbered, to_sdr(colours.astype(np.uint8), 13, 12)) == 0
    wide = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    curve = chunk(b"gAMA", struct.pack(">I", 45_455)) + chunk(b"cHRM", struct.pack(">8I", *wide))
    described = decode_image(png(colours, 8, RGB, before=curve))
    inside = (numbered.min(axis=2) > 40) & (numbered.max(axis=2) < 250)
    assert inside.sum() > 20
    assert (
        _distance(described[inside], numbered[inside]) < 6
    )  # one is the curve of sRGB, one an exponent of 2.2
    bright = RANDOM.integers(0, 65536, (9, 13, 4))
    for transfer in (16, 18):
        data = png(bright, 16, RGB_ALPHA, before=chunk(b"cICP", bytes([9, transfer, 0, 1])))
        mapped = to_sdr(bright[..., :3].astype(np.uint16), transfer, 9)
        kept = _stored(data, alpha="keep")
        assert _distance(kept[..., :3], mapped) == 0
        assert _distance(kept[..., 3], bright[..., 3] / 257) <= 1
        assert encode_image(data, ImageConfig(format="keep")).data != data


def test_exif_turns_a_picture_where_a_browser_reads_it_and_xmp_does_not():
    upright = np.rot90(SAMPLES, -1)
    assert _distance(decode_image(png(SAMPLES, 8, RGB, before=chunk(b"eXIf", TURNED))), upright) == 0
    assert _distance(decode_image(png(SAMPLES, 8, RGB, behind=chunk(b"eXIf", TURNED))), SAMPLES) == 0
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    assert _distance(decode_image(png(SAMPLES, 8, RGB, before=text)), SAMPLES) == 0


# ---------------------------------------------------------------- animations


def _control(number: int, size: tuple[int, int], place: tuple[int, int]) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, *size, *place, 1, 10, 0, 0))


def _data(number: int, samples: np.ndarray) -> bytes:
    return chunk(b"fdAT", struct.pack(">I", number) + zlib.compress(png_rows(samples, 8)))


def test_the_first_frame_of_an_animation_is_shown():
    first, later = SAMPLES, 255 - SAMPLES
    two = chunk(b"acTL", struct.pack(">II", 2, 0))
    full = ((13, 9), (0, 0))
    inside = png(first, 8, RGB, before=two + _control(0, *full), behind=_control(1, *full) + _data(2, later))
    assert _distance(decode_image(inside), first) == 0
    assert probe_image(inside).frames == 2
    # The picture of IDAT is for programs without animation.
    apart = png(later, 8, RGB, before=two, behind=_control(0, *full) + _data(1, first))
    assert _distance(decode_image(apart), first) == 0
    small = png(later, 8, RGB, before=two, behind=_control(0, (5, 4), (6, 3)) + _data(1, first[:4, :5]))
    canvas = np.full((9, 13, 3), 255)
    canvas[3:7, 6:11] = first[:4, :5]
    assert _distance(decode_image(small), canvas) == 0
    for behind in (
        _control(0, (5, 4), (9, 3)) + _data(1, first[:4, :5]),  # beyond the canvas
        _control(0, *full) + _data(7, first),  # out of order
        _control(0, *full),
        _control(3, *full) + _data(1, first),
        chunk(b"fcTL", bytes(26), flip=1) + _data(1, first),
    ):
        assert _distance(decode_image(png(later, 8, RGB, before=two, behind=behind)), later) == 0
