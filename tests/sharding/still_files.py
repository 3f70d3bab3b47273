"""Image files written byte by byte from arrays, so that what they show is known without a decoder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


# ---------------------------------------------------------------- png


def chunk(kind: bytes, payload: bytes, flip: int = 0) -> bytes:
    """``flip``: what the check sum is wrong by."""
    check = zlib.crc32(payload, zlib.crc32(kind)) ^ flip
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", check)


def png_rows(samples: np.ndarray, depth: int, interlaced: bool = False) -> bytes:
    """The bytes below the compression, of integers [H, W, C]."""
    if interlaced:
        return b"".join(png_rows(samples[y::high, x::wide], depth) for x, y, wide, high in _PASSES)
    if not samples.size:
        return b""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    bits = (rows[:, :, None] >> np.arange(depth - 1, -1, -1) & 1).astype(np.uint8)
    return b"".join(b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bits)


def png_header(size: tuple[int, int], depth: int, colour: int, interlaced: bool = False) -> bytes:
    return struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)


def png(
    samples: np.ndarray,
    depth: int,
    colour: int,
    before: bytes = b"",
    behind: bytes = b"",
    *,
    interlaced: bool = False,
    pixels: bytes | None = None,
) -> bytes:
    """``samples``: integers [H, W, C] of the depth. ``pixels``: chunks in place of one IDAT."""
    if pixels is None:
        pixels = chunk(b"IDAT", zlib.compress(png_rows(samples, depth, interlaced)))
    header = png_header(samples.shape[1::-1], depth, colour, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + behind + chunk(b"IEND", b"")


def transparent(*values: int) -> bytes:
    """tRNS that names a grey value or a colour."""
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


# ---------------------------------------------------------------- tiff


def tiff(
    planes: Sequence[bytes], shape: tuple[int, int], tags: dict[int, int | Sequence[int]], order: str = "<"
) -> bytes:
    """Uncompressed, a strip for each of ``planes``; of ``shape`` (height, width). Tags are shorts or, above, longs."""
    tags = {256: shape[1], 257: shape[0], 259: 1, 278: shape[0]} | tags
    place = 8 + sum(len(plane) for plane in planes)
    starts = [8 + sum(len(plane) for plane in planes[:number]) for number in range(len(planes))]
    tags |= {273: starts, 279: [len(plane) for plane in planes]}
    entries, extra, behind = b"", b"", place + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        values = [value] if isinstance(value, int) else list(value)
        letter, kind = ("H", 3) if max(values) < 1 << 16 else ("I", 4)
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) > 4:
            extra, packed = extra + packed, struct.pack(f"{order}I", behind + len(extra))
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", place)
    return head + b"".join(planes) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra


# ---------------------------------------------------------------- gif


def gif(
    size: tuple[int, int],
    colours: np.ndarray,
    frames: Sequence[tuple[tuple[int, int], np.ndarray, int, int | None]],
    background: int = 0,
) -> bytes:
    """``colours``: uint8 [4, 3]. A frame: (x, y), numbers of colours [H, W], disposal, transparent number."""
    out = b"GIF89a" + struct.pack("<HHBBB", *size, 0x81, background, 0) + colours.tobytes()
    for (x, y), numbers, disposal, clear in frames:
        out += b"!\xf9\x04" + bytes([disposal << 2 | (clear is not None), 5, 0, clear or 0, 0])
        out += b"," + struct.pack("<HHHHB", x, y, numbers.shape[1], numbers.shape[0], 0) + b"\2"
        codes = []
        for place, number in enumerate(
            numbers.reshape(-1).tolist()
        ):  # codes of 3 bits, cleared before they grow
            codes += [4, number] if place % 2 == 0 else [number]
        bits = "".join(format(code, "03b")[::-1] for code in [*codes, 5])
        bits += "0" * (-len(bits) % 8)
        data = bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, len(bits), 8))
        for place in range(0, len(data), 255):
            block = data[place : place + 255]
            out += bytes([len(block)]) + block
        out += b"\0"
    return out + b";"


# ---------------------------------------------------------------- webp


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        found.append((data[place : place + 4], data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    return found


def webp(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    body = b"WEBP" + b"".join(_riff(*one) for one in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)


def small_first_frame(picture: Image.Image, canvas: tuple[int, int], place: tuple[int, int]) -> bytes:
    """An animated WebP of two such frames, without the flag that says there is transparency."""
    [(kind, payload)] = webp_chunks(saved(picture, "WEBP", lossless=True))
    numbers = (place[0] // 2, place[1] // 2, picture.width - 1, picture.height - 1, 100)
    frame = b"".join(number.to_bytes(3, "little") for number in numbers) + b"\0" + _riff(kind, payload)
    sides = b"".join((side - 1).to_bytes(3, "little") for side in canvas)
    return webp([(b"VP8X", b"\2\0\0\0" + sides), (b"ANIM", bytes(6)), (b"ANMF", frame), (b"ANMF", frame)])
