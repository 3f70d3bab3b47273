"""JPEGs without peculiarities, known by their first bytes: libjpeg-turbo reads them as PIL would, sooner."""

from __future__ import annotations

_START_OF_SCAN, _EXIF_OR_XMP, _PROFILE = 0xDA, 0xE1, 0xE2


def is_plain_jpeg(data: bytes) -> bool:
    """Whether it begins as a JPEG, and nothing before the pixels may say how it is oriented or coloured."""
    if data[:2] != b"\xff\xd8":
        return False
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (_START_OF_SCAN, _EXIF_OR_XMP, _PROFILE):
            return marker == _START_OF_SCAN
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False
