"""Promises about media: what is decoded, what is refused before it costs anything, and equal bytes."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from sharding.errors import BadData
from sharding.media import decode_image, decode_video, encode_image, probe_image, probe_video
from sharding.media.config import ImageConfig, VideoConfig
from sharding.media.transcode import transcode_video


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _animation(frames: int = 24, size=(48, 40), milliseconds: int = 40) -> bytes:
    pictures = []
    for number in range(frames):
        pixels = np.zeros((size[1], size[0], 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = number * 10, 255
        pixels[:8, :, 3] = 0
        pictures.append(Image.fromarray(pixels))
    return _bytes(
        pictures[0], "WEBP", save_all=True, append_images=pictures[1:], duration=milliseconds, lossless=True
    )


def _clip(frames=24, size=(48, 40), fps=24, gop=12, audio=False, codec="libx264", container="mp4") -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, options={"g": str(gop), "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        sound = out.add_stream("aac", rate=48000) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number * 10, np.uint8), "rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            silence.sample_rate = 48000
            out.mux(sound.encode(silence))
            out.mux(sound.encode(None))
    return sink.getvalue()


def _cause(function, *arguments, **options) -> str:
    with pytest.raises(BadData) as caught:
        function(*arguments, **options)
    return caught.value.cause


def _levels(clip: np.ndarray) -> list[int]:
    """The number of the source frame that each decoded frame shows."""
    return np.rint(clip[:, -4, -4, 0] / 10).astype(int).tolist()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(kind):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, 3:] = (255, 0, 0, 255)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(_bytes(Image.fromarray(pixels), kind, **options))
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 5].tolist() == [255, 0, 0]


def test_transparent_palettes_are_composited_too():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert decode_image(_bytes(image, "PNG", transparency=1)).min() == 255


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (10, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _bytes(image, "JPEG", exif=exif)
    assert decode_image(data).shape == (10, 6, 3)
    assert encode_image(data).info.height == 10


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(1, 16).repeat(2, axis=0)
    image = decode_image(_bytes(Image.fromarray(grey), "PNG"))
    assert image[0, :, 0].tolist() == np.rint(grey[0] / 257).astype(int).tolist()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_other_colour_modes_become_rgb(mode):
    assert decode_image(_bytes(Image.new(mode, (5, 4)), "TIFF")).shape == (4, 5, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header():
    bomb = _bytes(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 100_000
    assert _cause(decode_image, bomb) == "too-many-pixels"
    assert _cause(probe_image, bomb) == "too-many-pixels"
    assert _cause(encode_image, bomb) == "too-many-pixels"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_image_is_bad_data(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = _bytes(Image.fromarray(noise), kind)
    for length in (0, 5, 40, len(data) // 2):
        assert _cause(decode_image, data[:length]) == "decode-failed"
        assert _cause(encode_image, data[:length], ImageConfig(resize=16)) == "decode-failed"


def test_formats_that_run_programs_are_not_opened():
    assert (
        _cause(decode_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
        == "unsupported-postscript"
    )


def test_images_are_shrunk_by_the_shorter_side_and_never_enlarged():
    image = Image.new("RGB", (120, 60))
    for kind in ("PNG", "JPEG"):
        encoded = encode_image(_bytes(image, kind), ImageConfig(resize=30))
        assert (encoded.info.width, encoded.info.height) == (60, 30)
        assert decode_image(encoded.data).shape == (30, 60, 3)
    assert encode_image(_bytes(image, "PNG"), ImageConfig(resize=500)).info.width == 120


def test_alpha_is_kept_on_demand():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = 255
    data = _bytes(Image.fromarray(pixels), "PNG")
    for kind in ("webp", "png"):
        kept = encode_image(data, ImageConfig(format=kind, alpha="keep")).data
        assert Image.open(io.BytesIO(kept)).mode == "RGBA"
        assert decode_image(kept).min() > 250
        white = encode_image(data, ImageConfig(format=kind)).data
        assert Image.open(io.BytesIO(white)).mode == "RGB"


def test_a_jpeg_of_odd_sides_does_not_depend_on_what_lies_behind_it_in_memory():
    noise = np.random.default_rng(0).integers(0, 255, (54, 71, 3), np.uint8)
    data = _bytes(Image.fromarray(noise), "PNG")
    found = set()
    for number in range(300):
        junk = [np.full(size, number % 256, np.uint8) for size in (1400, 1485, 1600)]
        del junk
        encoded = encode_image(data, ImageConfig(resize=33, format="jpg"))
        assert (encoded.info.width, encoded.info.height) == (43, 33)
        found.add(encoded.data)
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
def test_encoding_an_image_twice_gives_the_same_bytes(kind):
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    data = _bytes(Image.fromarray(noise), "PNG")
    first, second = (encode_image(data, ImageConfig(resize=32, format=kind, quality=80)) for _ in range(2))
    assert first == second
    assert first.extension == kind


def test_frames_come_from_the_middles_of_equal_segments():
    clip = _clip(frames=24)
    assert _levels(decode_video(clip, 4)) == [3, 9, 15, 21]
    assert _levels(decode_video(clip, 2, [0.0, 0.99])) == [0, 23]
    assert decode_video(clip, 3).shape == (3, 40, 48, 3)


def test_every_frame_can_be_taken_and_short_clips_repeat_frames():
    clip = _clip(frames=6)
    assert _levels(decode_video(clip, 6)) == [0, 1, 2, 3, 4, 5]
    assert _levels(decode_video(clip, 12)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_animations_are_decoded_like_clips():
    assert _levels(decode_video(_animation(frames=24), 4)) == [3, 9, 15, 21]
    assert decode_video(_animation(), 1)[0, 0, 0].tolist() == [255, 255, 255]
    assert probe_video(_animation()).width == 48


def test_positions_outside_a_segment_are_the_callers_mistake():
    for positions in ([0.5], [0.5, 1.0], [-0.1, 0.5]):
        with pytest.raises(ValueError, match="positions"):
            decode_video(b"", 2, positions)


def test_transcoded_clips_are_h264_with_near_keyframes_and_no_sound():
    encoded = transcode_video(
        _clip(frames=24, gop=250, audio=True), VideoConfig(resize=32, keyframe_interval=6)
    )
    assert encoded.info.frames == 24
    assert (encoded.info.width, encoded.info.height) == (38, 32)
    assert encoded.info.duration == pytest.approx(1.0)
    with av.open(io.BytesIO(encoded.data)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].codec_context.name == "h264"
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert [number for number, key in enumerate(keys) if key] == [0, 6, 12, 18]
    assert _levels(decode_video(encoded.data, 4)) == [3, 9, 15, 21]


@pytest.mark.parametrize(
    "source", [_animation, lambda: _clip(gop=250), lambda: _clip(size=(50, 38), gop=250)]
)
def test_transcoding_a_clip_again_and_again_gives_the_same_bytes(source):
    data = source()
    assert len({transcode_video(data, VideoConfig(resize=36)).data for _ in range(6)}) == 1


def test_a_clip_that_fits_is_copied_unchanged():
    once = transcode_video(_animation(), VideoConfig(resize=32))
    again = transcode_video(once.data, VideoConfig(resize=32))
    assert (again.data, again.extension, again.info) == (once.data, once.extension, once.info)
    assert transcode_video(once.data, VideoConfig(resize=16)).data != once.data
    assert transcode_video(once.data, VideoConfig(keyframe_interval=2)).data != once.data


def test_clips_are_cut_and_thinned():
    clip = _clip(frames=24, fps=24)
    assert transcode_video(clip, VideoConfig(max_frames=5)).info.frames == 5
    assert transcode_video(clip, VideoConfig(clip_s=0.5)).info.frames == 12
    thinned = transcode_video(clip, VideoConfig(fps=6))
    assert thinned.info.frames == 6
    assert thinned.info.duration == pytest.approx(1.0)


def test_containers_other_than_mp4_are_read():
    clip = _clip(codec="mpeg4", container="avi")
    assert transcode_video(clip, VideoConfig()).info.frames == 24
    assert transcode_video(_clip(container="matroska"), VideoConfig()).info.frames == 24


def test_a_clip_larger_than_its_limit_is_dropped():
    assert _cause(transcode_video, _clip(gop=250), VideoConfig(max_mb=0.0001)) == "clip-too-large"


def test_cut_and_broken_clips_are_bad_data():
    clip = transcode_video(_animation(), VideoConfig()).data
    for length in (0, 10, 300, len(clip) // 2, len(clip) - 100):
        assert _cause(transcode_video, clip[:length], VideoConfig()) == "decode-failed"
        assert _cause(decode_video, clip[:length], 4) == "decode-failed"
    matroska = _clip(frames=24, container="matroska")
    assert _cause(transcode_video, matroska[:120], VideoConfig()) == "decode-failed"
    holed = bytearray(clip)
    holed[len(clip) // 2 : len(clip) // 2 + 200] = bytes(200)
    assert _cause(transcode_video, bytes(holed), VideoConfig()) == "decode-failed"


def test_playlists_never_reach_the_demuxer():
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"
    for data in (playlist, b"ffconcat version 1.0\nfile /etc/hostname\n"):
        assert _cause(decode_video, data, 1) == "decode-failed"
        assert _cause(transcode_video, data, VideoConfig()) == "decode-failed"


def test_frames_of_too_many_pixels_are_refused_by_the_header():
    assert _cause(decode_video, _clip(), 2, max_pixels=1000) == "too-many-pixels"
    assert _cause(transcode_video, _clip(), VideoConfig(max_pixels=1000)) == "too-many-pixels"
