"""Telling still images from clips, where clips are wanted.

Downloaders put a thumbnail beside each video under its name, as WebP or GIF too, of which there are animated ones that
are clips. The suffix does not tell; the content does.
"""

from __future__ import annotations

from sharding.errors import BadData
from sharding.media.gif import Gif
from sharding.media.untrusted import MAX_PIXELS, decoding

STILL = "still-image"

_HEADS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\x01\0", "ICO"),
)
_WEBP_ANIMATED = 0x02  # of the flags of the extended header
_STILL_BRANDS = {  # of ISO media; sequences of images have others (avis, hevc, msf1)
    b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIF",
}  # fmt: skip


def refuse_still(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Raise BadData where the bytes are an image of one frame: ``still-image``, naming the format.

    Only headers are read. Of a GIF, whose frames say where they lie, also ``too-many-pixels``.
    """
    found = _still_format(data, max_pixels)
    if found is not None:
        raise BadData(STILL, f"a {found} image of one frame, where clips are wanted")


@decoding()
def _still_format(data: bytes, max_pixels: int) -> str | None:
    head = data[:16]
    if head[4:8] == b"ftyp":
        return _STILL_BRANDS.get(head[8:12])
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return None if _frames_of_png(data) > 1 else "PNG"
    if head[:4] == b"GIF8":
        return None if len(Gif(data, max_pixels)) > 1 else "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return None if _is_animated_webp(data) else "WEBP"
    return next((name for start, name in _HEADS if data.startswith(start)), None)


def _is_animated_webp(data: bytes) -> bool:
    """By its chunks ANMF, a frame each. One that ends early is none of one frame: nobody knows how many it had."""
    if data[12:16] != b"VP8X" or not data[20:21] or not data[20] & _WEBP_ANIMATED:
        return False
    frames, place = 0, 12
    while place + 8 <= len(data):
        frames += data[place : place + 4] == b"ANMF"
        if frames > 1:
            return True
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return int.from_bytes(data[4:8], "little") + 8 > len(data)


def _frames_of_png(data: bytes) -> int:
    """As the chunk acTL says, which stands before the first pixels."""
    position = 8
    while position + 12 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind == b"acTL":
            return int.from_bytes(data[position + 8 : position + 12], "big")
        if kind in (b"IDAT", b"IEND"):
            break
        position += 12 + size
    return 1
