"""Telling still images from clips, where clips are wanted.

Downloaders put a thumbnail beside each video under its name, as WebP or GIF too, of which there are animated ones that
are clips. The suffix does not tell; the content does.
"""

from __future__ import annotations

import io

from PIL import Image

from sharding.errors import BadData
from sharding.media.untrusted import decoding

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
_STILL_BRANDS = {  # of ISO media; sequences of images have others (avis, hevc, msf1)
    b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIF",
}  # fmt: skip


def refuse_still(data: bytes) -> None:
    """Raise BadData ``still-image``, naming the format, where the bytes are an image of one frame."""
    found = _still_format(data)
    if found is not None:
        raise BadData(STILL, f"a {found} image of one frame, where clips are wanted")


@decoding()
def _still_format(data: bytes) -> str | None:
    head = data[:16]
    if head[4:8] == b"ftyp":
        return _STILL_BRANDS.get(head[8:12])
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return None if _frames_of_png(data) > 1 else "PNG"
    if head[:4] == b"GIF8" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as image:
            return None if _has_second_frame(image) else image.format
    return next((name for start, name in _HEADS if data.startswith(start)), None)


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


def _has_second_frame(image: Image.Image) -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    return True
