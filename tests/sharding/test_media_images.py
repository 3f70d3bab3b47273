"""Promises about stored images: the right colours whatever the file, bytes kept where nothing need change."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms
from pydantic import ValidationError

from sharding.errors import BadData
from sharding.media import decode_image, encode_image, probe_image
from sharding.media.config import ImageConfig

PNG = ImageConfig(format="png")
KEEP = ImageConfig(format="keep")


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth, colourful, without symmetry."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def _stored(data: bytes, config: ImageConfig = PNG) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encode_image(data, config).data)))


def _cause(function, *arguments) -> str:
    with pytest.raises(BadData) as caught:
        function(*arguments)
    return caught.value.cause


def _distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def _deep_png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel: pixels uint16 [H, W, C]; colour types 0 grey, 2 RGB, 4 grey+alpha, 6 RGBA."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 for a display."""
    places, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        places += name + struct.pack(">II", start + len(body), len(value))
        body += value
    header = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ", b"", b"acsp"
    )
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50
    header = header + bytes(68 - len(header)) + white
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + places + body


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
WHITE = {b"wtpt": _xyz(0.9642, 1, 0.8249)}


def _rgb_profile(red=RED, green=GREEN, blue=BLUE, gamma=2.2) -> bytes:
    primaries = {b"rXYZ": _xyz(*red), b"gXYZ": _xyz(*green), b"bXYZ": _xyz(*blue)}
    return _profile(b"RGB ", WHITE | primaries | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def _cmyk(rgb: np.ndarray) -> np.ndarray:
    """Inks (0 none, 255 full) without black, but for a quarter of the picture printed with it."""
    inks = np.concatenate([255 - rgb, np.zeros_like(rgb[..., :1])], axis=-1)
    inks[: len(inks) // 2, : inks.shape[1] // 2, 3] = 100
    return inks


def _printed(inks: np.ndarray) -> np.ndarray:
    ink, black = inks[..., :3].astype(float), inks[..., 3:].astype(float)
    return np.rint((255 - ink) * (255 - black) / 255)


# ---------------------------------------------------------------- colour


def test_cmyk_jpegs_have_the_colours_that_are_printed():
    inks = _cmyk(np.asarray(_photo()))
    data = _bytes(Image.fromarray(inks, "CMYK"), "JPEG", quality=98)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    for image in (decode_image(data), _stored(data)):
        assert _distance(image, _printed(inks)) < 20


def test_ycck_jpegs_as_adobe_writes_them_inverted_have_the_colours_that_are_printed():
    inks = _cmyk(np.asarray(_photo()))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(255 - inks), 98, "CMYK", "444")
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 2
    for image in (decode_image(data), _stored(data)):
        assert _distance(image, _printed(inks)) < 20


def test_sixteen_bit_colour_keeps_its_high_bits():
    deep = np.random.default_rng(0).integers(0, 65536, (6, 8, 3)).astype(np.uint16)
    data = _deep_png(deep, 2)
    for image in (decode_image(data), _stored(data)):
        assert _distance(image, deep / 257) <= 1


def test_sixteen_bit_grey_is_scaled_even_where_it_is_dark():
    dark = np.linspace(0, 200, 16).astype(np.uint16).reshape(4, 4)
    assert decode_image(_bytes(Image.fromarray(dark), "PNG")).max() == 1
    wide = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    for kind in ("PNG", "TIFF"):
        image = decode_image(_bytes(Image.fromarray(wide), kind))
        assert (image == np.rint(wide / 257)[..., None]).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_sixteen_bit_alpha_is_composited_or_kept(channels):
    deep = np.zeros((4, 4, channels), np.uint16)
    deep[:2, :, -1] = 65535
    data = _deep_png(deep, {2: 4, 4: 6}[channels])
    assert _stored(data)[:, 0, 0].tolist() == [0, 0, 255, 255]
    kept = _stored(data, ImageConfig(format="png", alpha="keep"))
    assert kept[:, 0, 3].tolist() == [255, 255, 0, 0]


def test_floating_point_and_32_bit_grey_are_scaled():
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    assert _distance(decode_image(_bytes(Image.fromarray(ramp), "TIFF"))[..., 0], ramp * 255) <= 1
    deep = (ramp * 65535).astype(np.int32)
    assert _distance(decode_image(_bytes(Image.fromarray(deep), "TIFF"))[..., 1], ramp * 255) <= 1


def test_one_bit_grey_and_palette_images_become_rgb():
    checks = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    for image in (checks, checks.convert("1")):
        stored = _stored(_bytes(image, "PNG"))
        assert stored.shape == (8, 8, 3)
        assert (stored[..., 0] == np.asarray(checks)).all()
    photo = _photo().quantize(64)
    assert (_stored(_bytes(photo, "PNG")) == np.asarray(photo.convert("RGB"))).all()
    assert (_stored(_bytes(photo, "GIF")) == np.asarray(photo.convert("RGB"))).all()


def test_palettes_with_transparency_of_every_kind_are_composited():
    image = Image.new("P", (6, 1))
    image.putdata([0, 1, 2, 0, 1, 2])
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    single = _stored(_bytes(image, "PNG", transparency=1))
    assert single[0, :3].tolist() == [[200, 0, 0], [255, 255, 255], [0, 0, 200]]
    several = _stored(_bytes(image, "PNG", transparency=bytes([255, 0, 128])))
    assert several[0, 1].tolist() == [255, 255, 255]
    assert _distance(several[0, 2], np.array([127, 127, 227])) <= 1
    gif = _stored(_bytes(image, "GIF", transparency=2))
    assert gif[0, 2].tolist() == [255, 255, 255]
    grey = _stored(_bytes(Image.fromarray(np.array([[10, 20]], np.uint8)), "PNG", transparency=20))
    assert grey[0].tolist() == [[10, 10, 10], [255, 255, 255]]
    colour = _stored(_bytes(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert colour.min() == 255


def test_alpha_is_composited_on_the_chosen_colour():
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[0] = (0, 0, 0, 255)
    data = _bytes(Image.fromarray(pixels), "PNG")
    stored = _stored(data, ImageConfig(format="png", alpha="#1020ff"))
    assert stored[:, 0].tolist() == [[0, 0, 0], [16, 32, 255]]


def test_invisible_colours_do_not_bleed_through_resizing():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)
    pixels[:, 32:] = (0, 255, 0, 0)
    stored = _stored(_bytes(Image.fromarray(pixels), "PNG"), ImageConfig(resize=21, format="png"))
    # Red fades to the white ground; the green that nobody sees would show where it does not equal the blue.
    assert _distance(stored[..., 1], stored[..., 2]) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_profile_is_applied_and_not_stored(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    swapped = _rgb_profile(red=BLUE, blue=RED)
    data = _bytes(Image.new("RGB", (16, 16), (250, 10, 10)), kind, icc_profile=swapped, **options)
    for image_format in ("png", "webp", "jpg", "keep"):
        encoded = encode_image(data, ImageConfig(format=image_format, quality=95))
        stored = Image.open(io.BytesIO(encoded.data))
        assert _distance(np.asarray(stored.convert("RGB"))[8, 8], np.array([10, 10, 250])) < 12
        assert "icc_profile" not in stored.info
    assert decode_image(data)[8, 8].argmax() == 2


def test_profiles_of_grey_and_of_pictures_with_alpha_are_applied():
    linear = _profile(b"GRAY", WHITE | {b"kTRC": _curve(1.0)})
    grey = Image.new("L", (4, 4), 55)
    assert _distance(decode_image(_bytes(grey, "PNG", icc_profile=linear)), np.full((4, 4, 3), 127)) <= 2
    with_alpha = Image.merge("LA", (grey, Image.new("L", (4, 4), 0)))
    assert decode_image(_bytes(with_alpha, "PNG", icc_profile=linear)).min() == 255
    image = Image.new("RGBA", (4, 4), (250, 10, 10, 99))
    data = _bytes(image, "PNG", icc_profile=_rgb_profile(red=BLUE, blue=RED))
    kept = _stored(data, ImageConfig(format="png", alpha="keep"))[0, 0]
    assert kept[3] == 99
    assert kept[:3].argmax() == 2


def test_a_profile_that_is_srgb_or_broken_or_of_another_space_changes_nothing():
    photo = _photo()
    plain = decode_image(_bytes(photo, "PNG"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = _profile(b"GRAY", WHITE | {b"kTRC": _curve(1.0)})
    for profile in (srgb, b"no profile", srgb[:200], grey):
        assert (decode_image(_bytes(photo, "PNG", icc_profile=profile)) == plain).all()


# ---------------------------------------------------------------- orientation

UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_applied_to_pixels_and_sizes(orientation, kind):
    photo = _photo(96, 64)
    lying = photo if UNDO[orientation] is None else photo.transpose(UNDO[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    )
    data = _bytes(lying, kind, exif=exif, **options)
    assert _distance(decode_image(data), np.asarray(photo)) < 12
    assert (probe_image(data).width, probe_image(data).height) == (96, 64)
    encoded = encode_image(data, ImageConfig(resize=32, format="png"))
    assert (encoded.info.width, encoded.info.height) == (48, 32)
    expected = photo.resize((48, 32), Image.Resampling.BICUBIC)
    assert _distance(_stored(data, ImageConfig(resize=32, format="png")), np.asarray(expected)) < 12
    assert Image.open(io.BytesIO(encoded.data)).getexif().get(0x0112) is None
    kept = encode_image(data, KEEP)
    assert (kept.data == data) == (orientation == 1)
    assert (kept.info.width, kept.info.height) == (96, 64)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_leaves_the_picture_as_it_lies():
    data = _bytes(_photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20))
    assert decode_image(data).shape == (64, 96, 3)


# ---------------------------------------------------------------- kept bytes


@pytest.mark.parametrize(
    ("kind", "extension", "options"),
    [
        ("JPEG", "jpg", {"quality": 91, "progressive": True}),
        ("PNG", "png", {}),
        ("WEBP", "webp", {"quality": 70}),
    ],
)
def test_what_fits_is_kept_byte_for_byte_and_what_does_not_is_encoded_in_its_own_format(
    kind, extension, options
):
    data = _bytes(_photo(), kind, **options)
    kept = encode_image(data, ImageConfig(format="keep", resize=64))
    assert kept.data == data
    assert (kept.extension, kept.info.width, kept.info.height) == (extension, 96, 64)
    shrunk = encode_image(data, ImageConfig(format="keep", resize=32))
    assert shrunk.extension == extension
    assert Image.open(io.BytesIO(shrunk.data)).size == (48, 32)
    for cut in (len(data) // 2, len(data) - 40):
        assert _cause(encode_image, data[:cut], KEEP) == "decode-failed"


def test_alpha_animation_print_colours_and_deep_grey_are_not_kept():
    photo = _photo()
    faded = photo.copy()
    faded.putalpha(100)
    for data in (
        _bytes(faded, "PNG"),
        _bytes(faded, "WEBP"),
        _bytes(photo.convert("CMYK"), "JPEG"),
        _bytes(photo, "WEBP", save_all=True, append_images=[_photo(seed=1)], duration=40),
        _bytes(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
    ):
        encoded = encode_image(data, KEEP)
        assert encoded.data != data
        stored = Image.open(io.BytesIO(encoded.data))
        assert (stored.mode, getattr(stored, "n_frames", 1)) == ("RGB", 1)
    for kind in ("PNG", "WEBP"):
        data = _bytes(faded, kind)
        assert encode_image(data, ImageConfig(format="keep", alpha="keep")).data == data


def test_formats_that_shards_do_not_hold_become_webp():
    for kind in ("GIF", "BMP", "TIFF", "PPM", "AVIF"):
        assert encode_image(_bytes(_photo(), kind), KEEP).extension == "webp"


# ---------------------------------------------------------------- jpeg


@pytest.mark.parametrize("progressive", [False, True])
def test_cut_and_damaged_jpegs_are_bad_data(progressive):
    whole = _bytes(_photo(256, 192), "JPEG", quality=90, progressive=progressive)
    for length in (2, 100, 700, len(whole) // 2, len(whole) - 30):
        for function in (decode_image, encode_image):
            assert _cause(function, whole[:length]) == "decode-failed"
    holed = bytearray(whole)
    middle = len(whole) * 2 // 3
    holed[middle : middle + 64] = b"\xff\xd9" * 32
    assert _cause(encode_image, bytes(holed)) == "decode-failed"


def test_stray_bytes_between_markers_do_no_harm():
    whole = _bytes(_photo(), "JPEG")
    table = whole.index(b"\xff\xdb")
    odd = whole[:table] + b"\0\0\0\0" + whole[table:]
    assert (decode_image(odd) == decode_image(whole)).all()


def test_pictures_of_phones_with_a_second_picture_inside_are_read():
    data = _bytes(_photo(), "MPO", save_all=True, append_images=[_photo(seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert _distance(decode_image(data), np.asarray(_photo())) < 60
    encoded = encode_image(data, KEEP)
    assert encoded.extension == "jpg"
    assert len(encoded.data) < len(data)


@pytest.mark.parametrize(
    ("options", "chroma"),
    [({"quality": 85}, "420"), ({"quality": 90}, "444"), ({"quality": 95, "subsampling": 420}, "420"),
     ({"subsampling": 444}, "444")],
)  # fmt: skip
def test_the_chroma_of_jpeg_follows_its_quality_unless_it_is_chosen(options, chroma):
    data = encode_image(_bytes(_photo(), "PNG"), ImageConfig(format="jpg", **options)).data
    assert simplejpeg.decode_jpeg_header(data)[3] == chroma


def test_quality_sets_the_size_of_jpeg_and_webp():
    data = _bytes(_photo(256, 256), "PNG")
    for kind in ("jpg", "webp"):
        sizes = [len(encode_image(data, ImageConfig(format=kind, quality=q)).data) for q in (20, 60, 95)]
        assert sizes == sorted(set(sizes))


# ---------------------------------------------------------------- resizing


def _weights(source: int, target: int, kernel) -> np.ndarray:
    """float64 [target, source]: the antialiased kernel at each target pixel."""
    scale = source / target
    offsets = (np.arange(source) + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / scale
    weights = kernel(offsets)
    return weights / weights.sum(axis=1, keepdims=True)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def _area(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: what OpenCV calls INTER_AREA."""
    edges = np.arange(target + 1)[:, None] * source / target
    left, right = np.maximum(edges[:-1], np.arange(source)), np.minimum(edges[1:], np.arange(source) + 1)
    return np.maximum(0, right - left) * target / source


def _resized(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [target, target, C] of a square image [source, source, C]."""
    return np.tensordot(weights, np.tensordot(weights, image, 1), (1, 1)).swapaxes(0, 1)


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one - other) ** 2)))


@pytest.mark.parametrize("target", [180, 128, 70, 40, 22])
def test_resizing_is_closer_to_a_floating_point_reference_than_area_averaging(target):
    rng = np.random.default_rng(0)
    # Detail at every scale, falling off as in photographs.
    size = 200
    spectrum = np.fft.rfft2(rng.normal(size=(3, size, size)))
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 1 / size
    texture = np.fft.irfft2(spectrum / radius, s=(size, size)).transpose(1, 2, 0)
    photo = Image.fromarray(np.clip(128 + 40 * texture / texture.std(), 0, 255).astype(np.uint8))
    data = _bytes(photo, "JPEG", quality=95, subsampling=0)
    full = decode_image(data).astype(np.float64)
    kernel = _weights(size, target, _lanczos)
    reference = np.clip(_resized(full, kernel), 0, 255)
    area = np.rint(_resized(full, _area(size, target)))
    ours = _stored(data, ImageConfig(resize=target, format="png")).astype(np.float64)
    assert _psnr(ours, reference) > _psnr(area, reference)


def test_large_photographs_are_scaled_by_the_decoder_and_still_checked_to_their_end():
    photo = _photo(1024, 768)
    data = _bytes(photo, "JPEG", quality=95)
    stored = _stored(data, ImageConfig(resize=48, format="png"))
    assert stored.shape == (48, 64, 3)
    expected = photo.resize((64, 48), Image.Resampling.BICUBIC)
    assert _distance(stored, np.asarray(expected)) < 12
    assert _cause(encode_image, data[:-30], ImageConfig(resize=48)) == "decode-failed"


@pytest.mark.parametrize(
    "changes", [{"alpha": "red"}, {"alpha": "#12"}, {"subsampling": 411}, {"format": "keep", "frames": {}},
                {"format": "jpg", "alpha": "keep"}, {"frames": {"every_s": 0}}],
)  # fmt: skip
def test_image_blocks_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValidationError):
        ImageConfig.model_validate(changes)
