"""Formats by their first bytes: those that are no PIL's to name, and those that are refused by name.

A refused file is counted as ``unsupported-NAME``, so that a report tells a corpus of raw photographs from a broken one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

_AVIF = frozenset({b"avif", b"avis"})
_HEIC = frozenset({
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1",
})  # fmt: skip
# (name, first bytes, where they lie): formats of pictures, pages and clips that are not read as images.
_REFUSED = (
    ("jxl", b"\xff\x0a", 0),
    ("jxl", b"\0\0\0\x0cJXL \r\n\x87\n", 0),
    ("jpeg2000", b"\0\0\0\x0cjP  \r\n\x87\n", 0),
    ("jpeg2000", b"\xff\x4f\xff\x51", 0),
    ("jpegxr", b"II\xbc\x01", 0),
    ("psd", b"8BPS", 0),
    ("xcf", b"gimp xcf", 0),
    ("pdf", b"%PDF-", 0),
    ("postscript", b"%!PS", 0),
    ("postscript", b"\xc5\xd0\xd3\xc6", 0),
    ("ico", b"\0\0\1\0", 0),
    ("icns", b"icns", 0),
    ("exr", b"\x76\x2f\x31\x01", 0),
    ("radiance", b"#?RADIANCE", 0),
    ("radiance", b"#?RGBE", 0),
    ("dds", b"DDS ", 0),
    ("qoi", b"qoif", 0),
    ("djvu", b"AT&TFORM", 0),
    ("fits", b"SIMPLE  =", 0),
    ("bpg", b"BPG\xfb", 0),
    ("jng", b"\x8bJNG\r\n\x1a\n", 0),
    ("mng", b"\x8aMNG\r\n\x1a\n", 0),
    ("wmf", b"\xd7\xcd\xc6\x9a", 0),
    ("emf", b" EMF", 40),
    ("raw", b"FUJIFILMCCD-RAW", 0),
    ("raw", b"FOVb", 0),
    ("raw", b"IIU\0", 0),
    ("raw", b"IIRO", 0),
    ("raw", b"IIRS", 0),
    ("raw", b"MMOR", 0),
    ("raw", b"\0MRM", 0),
    ("raw", b"ftypcrx ", 4),
    ("mp4", b"ftyp", 4),
    ("mp4", b"moov", 4),
    ("matroska", b"\x1aE\xdf\xa3", 0),
    ("avi", b"AVI ", 8),
    ("ogg", b"OggS", 0),
    ("flv", b"FLV\1", 0),
    ("zip", b"PK\3\4", 0),
    ("gzip", b"\x1f\x8b\x08", 0),
)
# Looked for where text begins, behind a byte order mark, blanks, and the prologue and comments of XML.
_PROLOGUE = rb"(?:\xef\xbb\xbf)?\s*(?>(?><\?xml[^>]*>|<!--.*?-->|<!DOCTYPE\s+svg[^>]*>)\s*)*"
_SVG = re.compile(_PROLOGUE + rb"<svg[\s>:]", re.DOTALL | re.IGNORECASE)
_HTML = re.compile(_PROLOGUE + rb"<(?:!doctype\s+html|html|head|body)[\s>]", re.DOTALL | re.IGNORECASE)
_TEXT = 4096
# Tags of TIFF: what a reduced picture, pictures below this one, and raw photographs have.
_SUBFILE_TYPE, _COMPRESSION, _PHOTOMETRIC, _SUB_IFDS, _DNG_VERSION = 254, 259, 262, 330, 50706
_SENSOR = frozenset({32803, 34892})  # photometric interpretations: colour filter array, linear raw


def is_avif(data: bytes) -> bool:
    """Whether a brand of its first box is one of AVIF."""
    return bool(_brands(data) & _AVIF)


def is_heic(data: bytes) -> bool:
    """Whether a brand of its first box is one of HEIF, and none of AVIF."""
    brands = _brands(data)
    return bool(brands & _HEIC) and not brands & _AVIF


def _brands(data: bytes) -> frozenset[bytes]:
    if data[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return frozenset({data[8:12], *(data[place : place + 4] for place in range(16, end - 3, 4))})


def refused_format(data: bytes) -> str | None:
    """The name of a format that is known but not read as an image; ``None``: nothing is known of it."""
    for name, begins, place in _REFUSED:
        if data[place : place + len(begins)] == begins:
            return name
    head = data[:_TEXT]
    if _SVG.match(head):
        return "svg"
    return "html" if _HTML.match(head) else None


def is_raw_photograph(image: TiffImageFile, data: bytes) -> bool:
    """Whether a TIFF is a camera's raw file (DNG, NEF, ARW, CR2, PEF ...), whose first picture is a preview at most."""
    tags = image.tag_v2
    if data[8:10] == b"CR":
        return True
    if _DNG_VERSION in tags or tags.get(_PHOTOMETRIC) in _SENSOR:
        return True
    return bool(tags.get(_SUBFILE_TYPE, 0) & 1) and _SUB_IFDS in tags
