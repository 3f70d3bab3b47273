"""Promises about what a frame of a clip looks like: its colours as sRGB, and which side is up.

The colour references are patches of known sRGB values, which the tests code themselves, in floating point, by the
formulas of ITU-R BT.601, BT.709, BT.2020, BT.2100 and SMPTE ST 2084.
"""

from __future__ import annotations

import io

import av
import numpy as np
import numpy.typing as npt
import pytest

from sharding.errors import BadData
from sharding.media import decode_image, decode_video
from sharding.media.config import FramesConfig, ImageConfig, VideoConfig
from sharding.media.frames import frames_of
from sharding.media.transcode import transcode_video
from sharding.media.video import clip_info
from tests.sharding.clips import clip, with_edits, with_matrix
from tests.sharding.test_media_hdr import CURVES, TO_2020, TO_P3, light

PATCH = 32
COLOURS = np.array(
    [[255, 255, 255], [128, 128, 128], [0, 0, 0], [200, 60, 30], [224, 172, 138], [40, 140, 60]], np.float64
)
# Luma weights of red and blue, by the number of the matrix in ITU-T H.273.
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
FULL, LIMITED = 2, 1


def _planes(
    rgb: npt.NDArray[np.float64], matrix: int, bits: int, colour_range: int
) -> npt.NDArray[np.uint16]:
    """Y, Cb, Cr (4:2:0), one under the other, of R'G'B' [6, 3] from 0 to 1 as six patches."""
    red, blue = WEIGHTS[matrix]
    luma = rgb @ [red, 1 - red - blue, blue]
    cb, cr = (rgb[:, 2] - luma) / (2 * (1 - blue)), (rgb[:, 0] - luma) / (2 * (1 - red))
    if colour_range == LIMITED:
        scale = 2 ** (bits - 8)
        planes = [scale * (16 + 219 * luma), scale * (128 + 224 * cb), scale * (128 + 224 * cr)]
    else:
        planes = [
            (2**bits - 1) * luma,
            (2**bits - 1) * cb + 2 ** (bits - 1),
            (2**bits - 1) * cr + 2 ** (bits - 1),
        ]
    sizes = (PATCH, PATCH // 2, PATCH // 2)
    shown = [
        np.rint(plane).reshape(2, 3).repeat(size, axis=0).repeat(size, axis=1)
        for plane, size in zip(planes, sizes, strict=True)
    ]
    return np.concatenate([plane.reshape(-1) for plane in shown]).reshape(-1, 3 * PATCH).astype(np.uint16)


def _coded(
    rgb: npt.NDArray[np.float64], *, matrix: int, transfer: int = 2, primaries: int = 2, bits: int = 8,
    colour_range: int = LIMITED, tagged: int | None = None, container: str = "mp4",
) -> bytes:  # fmt: skip
    """Two frames of the patches; ``tagged``: the matrix that the file names, if another than its own."""
    sink = io.BytesIO()
    planes = _planes(rgb, matrix, bits, colour_range)
    with av.open(sink, "w", format=container) as out:
        deep = bits == 10
        stream = out.add_stream("libx265" if deep else "libx264", rate=25)
        stream.options = (
            {"x265-params": "log-level=none", "crf": "4"} if deep else {"crf": "4", "threads": "1"}
        )
        layout = "yuv420p10le" if deep else "yuv420p"
        stream.width, stream.height, stream.pix_fmt = 3 * PATCH, 2 * PATCH, layout
        context = stream.codec_context
        context.colorspace = matrix if tagged is None else tagged
        context.color_trc, context.color_primaries, context.color_range = transfer, primaries, colour_range
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(planes if deep else planes.astype(np.uint8), format=layout)
            frame.color_range, frame.pts = colour_range, number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def _patches(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    middle = PATCH // 2
    return pixels[middle::PATCH, middle::PATCH].reshape(-1, 3).astype(np.float64)


def _everywhere(data: bytes) -> list[npt.NDArray[np.uint8]]:
    """The first frame as it is stored as a clip, as an image, and given to a model without being stored."""
    encoded = transcode_video(data, VideoConfig(crf=2))
    with av.open(io.BytesIO(encoded.data)) as container:
        (stored,) = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:1]
    config = ImageConfig(format="png", frames=FramesConfig(max=1))
    (image,) = frames_of(data, config)
    return [stored, decode_video(encoded.data, 1)[0], decode_image(image.data), decode_video(data, 1)[0]]


@pytest.mark.parametrize("transfer", CURVES)
@pytest.mark.parametrize(
    "tags", [{"primaries": 9}, {"primaries": 9, "tagged": 2}, {"primaries": 2, "tagged": 2}]
)
def test_hdr_is_stored_as_sdr(transfer, tags):
    code = CURVES[transfer](light(COLOURS) @ TO_2020.T * 203)
    data = _coded(code, matrix=9, transfer=transfer, bits=10, **tags)
    for pixels in _everywhere(data):
        shown = _patches(pixels)
        assert shown[0].min() >= 240  # reference white; what is brighter has the rest
        assert np.abs(shown - COLOURS)[1:].max() <= 6


def test_hdr_that_is_shrunk_keeps_its_colours():
    code = CURVES[16](light(COLOURS) @ TO_2020.T * 203)
    data = _coded(code, matrix=9, transfer=16, primaries=9, bits=10)
    for shorter in (16, 20, 64):
        encoded = transcode_video(data, VideoConfig(resize=shorter, crf=2))
        assert (encoded.info.width, encoded.info.height) == (shorter * 3 // 2 // 2 * 2, shorter // 2 * 2)
        shown = decode_video(encoded.data, 1)[0]
        patches = shown[shorter // 4 :: shorter // 2, shorter // 4 :: shorter // 2][:2, :3].reshape(-1, 3)
        assert np.abs(patches.astype(int) - COLOURS)[1:].max() <= 8


@pytest.mark.parametrize(("primaries", "matrix", "wide"), [(9, 9, TO_2020), (12, 1, TO_P3)])
def test_wide_gamuts_are_stored_as_srgb(primaries, matrix, wide):
    linear = np.clip(light(COLOURS) @ wide.T, 0, 1)
    code = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    data = _coded(code, matrix=matrix, transfer=1, primaries=primaries, bits=10)
    for pixels in _everywhere(data):
        assert np.abs(_patches(pixels) - COLOURS).max() <= 6


@pytest.mark.parametrize("matrix", [1, 5, 6, 7])
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
def test_every_matrix_and_range_is_applied(matrix, colour_range):
    data = _coded(COLOURS / 255, matrix=matrix, transfer=1, primaries=1, colour_range=colour_range)
    for pixels in _everywhere(data):
        assert np.abs(_patches(pixels) - COLOURS).max() <= 6


def test_ten_bits_of_sdr_are_rounded_not_cut():
    data = _coded(COLOURS / 255, matrix=1, transfer=1, primaries=1, bits=10)
    for pixels in _everywhere(data):
        assert np.abs(_patches(pixels) - COLOURS).max() <= 5


@pytest.mark.parametrize(
    ("size", "matrix"), [((96, 64), "ITU601"), ((1280, 720), "ITU709"), ((720, 1280), "ITU709")]
)
def test_the_matrix_of_a_file_that_names_none_goes_by_its_size_as_in_players(size, matrix):
    colour = np.array([200, 60, 30], np.uint8)
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        stream = out.add_stream(
            "libx264", rate=25, options={"threads": "1", "preset": "ultrafast", "crf": "4"}
        )
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (size[1], size[0], 3)).copy(), "rgb24")
        out.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix)))
        out.mux(stream.encode(None))
    assert np.abs(decode_video(sink.getvalue(), 1)[0, 9, 9].astype(int) - colour).max() <= 4


UNKNOWN = [
    ({"tagged": 8}, "matrix"),
    ({"tagged": 14}, "matrix"),
    ({"transfer": 9}, "transfer"),
    ({"primaries": 10}, "primaries"),
]


@pytest.mark.parametrize(("tags", "what"), UNKNOWN)
def test_colours_that_are_not_known_are_refused_by_name(tags, what):
    data = _coded(COLOURS / 255, **{"matrix": 1, "transfer": 1, "primaries": 1, "bits": 10, **tags})
    for function in (
        lambda: transcode_video(data, VideoConfig()),
        lambda: list(frames_of(data, ImageConfig(frames=FramesConfig()))),
        lambda: decode_video(data, 1),
    ):
        with pytest.raises(BadData, match=f"unsupported-colour: .*{what}"):
            function()


def test_hdr_of_eight_bits_is_not_kept_byte_for_byte():
    code = CURVES[18](light(COLOURS) @ TO_2020.T * 203)
    hlg = _coded(code, matrix=9, transfer=18, primaries=9)
    sdr = _coded(COLOURS / 255, matrix=1, transfer=1, primaries=1)
    config = VideoConfig(keyframe_interval=250)
    assert transcode_video(sdr, config).data == sdr
    assert transcode_video(hlg, config).data != hlg


# ---------------------------------------------------------------- orientation

SIZE = (48, 64)  # height and width


def _scene() -> npt.NDArray[np.uint8]:
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32], pixels[24:, 32:] = (
        (220, 20, 20), (20, 180, 20), (20, 20, 220), (235, 235, 235)
    )  # fmt: skip
    return pixels


# a, b, c, d of the matrix, and what is stored so that the matrix makes it upright.
ORIENTATIONS = {
    (1, 0, 0, 1): lambda scene: scene,
    (-1, 0, 0, 1): lambda scene: scene[:, ::-1],
    (1, 0, 0, -1): lambda scene: scene[::-1],
    (-1, 0, 0, -1): lambda scene: scene[::-1, ::-1],
    (0, 1, 1, 0): lambda scene: scene.transpose(1, 0, 2),
    (0, 1, -1, 0): lambda scene: np.rot90(scene, 1),
    (0, -1, 1, 0): lambda scene: np.rot90(scene, 3),
    (0, -1, -1, 0): lambda scene: scene[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_every_orientation_is_undone(matrix, container):
    scene = _scene()
    stored = np.ascontiguousarray(ORIENTATIONS[matrix](scene))
    data = with_matrix(clip(container, pixels=[stored] * 5, b_frames=0), *matrix)
    for pixels in _everywhere(data):
        assert pixels.shape == scene.shape
        assert np.abs(pixels.astype(int) - scene).mean() < 6
    info = clip_info(data)
    assert (info.height, info.width) == SIZE


def test_a_clip_that_lies_upright_alone_is_kept_byte_for_byte():
    config = VideoConfig(keyframe_interval=25)
    for matrix, turn in ORIENTATIONS.items():
        data = with_matrix(clip(pixels=[np.ascontiguousarray(turn(_scene()))] * 5, b_frames=0), *matrix)
        assert (transcode_video(data, config).data == data) == (matrix == (1, 0, 0, 1))


def test_a_mirrored_clip_with_an_edit_list_and_long_pixels_is_shown_right():
    scene = _scene()
    numbered = [np.zeros_like(scene)] * 4 + [np.ascontiguousarray(scene[:, ::-1])] * 6
    data = with_matrix(with_edits(clip(pixels=numbered, b_frames=0), [(4, 6)]), -1, 0, 0, 1)
    for pixels in _everywhere(data):
        assert np.abs(pixels.astype(int) - scene).mean() < 6
