"""Small well-formed images and clips of every format that is read."""

from __future__ import annotations

import functools
import io
import zlib
from typing import Any

import av
import numpy as np
import pillow_heif
from PIL import Image, PngImagePlugin


def _pixels(height: int, width: int, channels: int) -> np.ndarray:
    ramp = np.arange(height * width * channels, dtype=np.uint32)
    return (ramp * 7 % 251).astype(np.uint8).reshape(height, width, channels)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _heic(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    pillow_heif.from_pillow(image).save(sink, quality=30)
    return sink.getvalue()


def _with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind IHDR, which ends at byte 33."""
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


@functools.cache
def images() -> tuple[bytes, ...]:
    """JPEG, PNG (colour types, depths, metadata, HDR), WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC."""
    rgb, rgba = Image.fromarray(_pixels(12, 16, 3)), Image.fromarray(_pixels(12, 16, 4))
    grey16 = Image.fromarray(_pixels(12, 16, 1)[..., 0].astype(np.uint16) * 257)
    palette = rgb.quantize(16)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a text")
    text.add_itxt("Title", "ein Text", zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(_pixels(12, 16, 4) + number) for number in range(3)]
    return (
        _saved(rgb, "JPEG", exif=exif),
        _saved(rgb.convert("CMYK"), "JPEG"),
        _saved(rgb, "JPEG", progressive=True, icc_profile=b"not a profile"),
        _saved(rgb, "PNG", pnginfo=text, exif=exif),
        _saved(rgba, "PNG"),
        _saved(rgb, "PNG", transparency=(0, 7, 14)),
        _saved(grey16, "PNG"),
        _saved(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        _saved(rgb.convert("1"), "PNG"),
        _saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        _saved(rgb, "WEBP", exif=exif),
        _saved(rgba, "WEBP", lossless=True),
        _saved(palette, "GIF", transparency=3),
        _saved(rgb, "BMP"),
        _saved(rgb, "TIFF", compression="tiff_lzw"),
        _saved(rgba, "TIFF"),
        _saved(grey16, "TIFF"),
        _saved(rgb, "PPM"),
        _saved(rgb, "AVIF", quality=30),
        _heic(rgb),
        _with_chunk(_saved(rgb, "PNG"), b"cICP", bytes([9, 16, 0, 1])),  # BT.2020 with PQ
    )


def _clip(container: str, codec: str, options: dict[str, str], muxer: dict[str, str] | None = None) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=10, options={"threads": "1", **options})
        stream.width, stream.height = 32, 24
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 20 * number, np.uint8), "rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


@functools.cache
def clips() -> tuple[bytes, ...]:
    """mp4 (whole, fragmented), mkv, webm, avi, ogg, flv, ts, animated GIF and WebP; twelve frames at 10 a second."""
    x264 = {"g": "4", "bf": "2"}
    frames = [Image.fromarray(np.full((24, 32, 3), 20 * number, np.uint8)) for number in range(12)]
    animated: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 100}
    return (
        _clip("mp4", "libx264", x264),
        _clip("mp4", "libx264", x264, {"movflags": "frag_keyframe+empty_moov"}),
        _clip("matroska", "libx264", x264),
        _clip("webm", "libvpx", {"deadline": "realtime"}),
        _clip("avi", "mpeg4", {"g": "4"}),
        _clip("ogg", "libvpx", {"deadline": "realtime"}),
        _clip("flv", "flv1", {}),
        _clip("mpegts", "libx264", x264),
        _clip("mpegts", "mpeg2video", {"g": "4"}),
        _saved(frames[0], "GIF", **animated),
        _saved(frames[0], "WEBP", **animated),
    )
