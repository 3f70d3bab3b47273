"""PNG as browsers read it: the chunks that decide the picture, whatever lies between them.

A PNG is cut into its chunks here, and the decoder (PIL, which stops at many an ancillary chunk) is given a stream of
IHDR, PLTE, IDAT, and tRNS of a palette alone. So text, times, resolutions and unknown chunks never cost an image: not
by a wrong check sum, a wrong length, or what they would inflate to. Of the ancillary chunks these are used, the first
of each kind before the pixels, where check sum and length are right; otherwise the picture is shown as without them:

================  ==============================================================================
tRNS              transparency: of a palette's first entries, or of one grey value or colour
cICP              colour by numbers of ITU-T H.273; before iCCP, sRGB, gAMA
iCCP              a profile, which may inflate to ``MAX_PROFILE`` bytes; before sRGB, gAMA
sRGB              says that gAMA and cHRM are to be left alone
gAMA, with cHRM   the curve, and with it the primaries
eXIf              orientation
acTL, fcTL, fdAT  an animation (APNG), of which the first frame is shown
================  ==============================================================================

Pixels are whole where the check sums of all IDAT chunks are right, or that of the zlib stream in them.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageFile

from sharding.errors import BadData
from sharding.media.untrusted import decoding

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 1 << 22
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGB_ALPHA: 4}
_HEADER = struct.Struct(">IIBBBBB")
_PLACE = struct.Struct(">IIIII")  # fcTL begins with: sequence number, width, height, x, y
_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_LONGEST = (1 << 31) - 1
_MOST_CHUNKS = 100_000  # encoders write pixels in chunks of 8 KiB and more
_PIECE = 1 << 24
# The passes of Adam7: (x, y) of the first pixel of each, and the steps to the next.
_PASSES = (
    ((0, 0), (8, 8)), ((4, 0), (8, 8)), ((0, 4), (4, 8)), ((2, 0), (4, 4)), ((0, 2), (2, 4)), ((1, 0), (2, 2)),
    ((0, 1), (1, 2)),
)  # fmt: skip
# Lengths of chunks at which no reader stumbles.
_HARMLESS = {b"IEND": 0, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"pHYs": 9, b"tIME": 7}
_HARMLESS_TEXT = 1 << 16


def is_png(data: bytes) -> bool:
    """Whether it begins as a PNG."""
    return data[:8] == SIGNATURE


@dataclass(frozen=True)
class _Chunk:
    """``check``: the check sum behind it; ``None``: the file ends before that."""

    kind: bytes
    payload: memoryview
    check: int | None

    @cached_property
    def sound(self) -> bool:
        return self.check == zlib.crc32(self.payload, zlib.crc32(self.kind))


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Up to IEND or the end of the file, which may cut the last one. What no four letters name is left out."""
    view, place = memoryview(data), len(SIGNATURE)
    number = 0
    while place + 8 <= len(data):
        number += 1
        if number > _MOST_CHUNKS:
            raise BadData("decode-failed", f"PNG: it has more than {_MOST_CHUNKS} chunks")
        size, kind = int.from_bytes(view[place : place + 4], "big"), bytes(view[place + 4 : place + 8])
        start, end = place + 8, place + 8 + size
        if size > _LONGEST:
            return
        check = int.from_bytes(view[end : end + 4], "big") if end + 4 <= len(data) else None
        if kind.isalpha():
            yield _Chunk(kind, view[start:end], check)
        if kind == b"IEND":
            return
        place = end + 4


@dataclass(frozen=True)
class _Frame:
    """The picture that is shown: where it lies on the canvas, and the compressed pixels of its chunks.

    Args:
        vouched: no check sum of these chunks is wrong.
    """

    place: tuple[int, int]
    size: tuple[int, int]
    parts: tuple[memoryview, ...]
    vouched: bool


class Png:
    """What the chunks of a PNG say. Pixels are decoded by ``image`` and ``deep`` alone.

    Raises:
        BadData: ``decode-failed``: no sound IHDR, or a critical chunk that is not known.
    """

    def __init__(self, data: bytes) -> None:
        chunks = list(_chunks(data))
        if not chunks or chunks[0].kind != b"IHDR" or len(chunks[0].payload) != 13 or not chunks[0].sound:
            raise BadData("decode-failed", "PNG: it does not begin with an IHDR whose check sum is right")
        self._header = bytes(chunks[0].payload)
        width, height, self._depth, self._colour, _, _, self._interlaced = _HEADER.unpack(self._header)
        self.size: tuple[int, int] = (width, height)
        if not width or not height or self._colour not in _CHANNELS:
            raise BadData("decode-failed", f"PNG: IHDR says {width}x{height} of colour type {self._colour}")
        self._chunks = chunks[1:]
        for chunk in self._chunks:
            if chunk.kind[:1].isupper() and chunk.kind not in _CRITICAL:
                raise BadData("decode-failed", f"PNG: its critical chunk {chunk.kind.decode()} is not known")
        kinds = [chunk.kind for chunk in self._chunks]
        self._pixels_from = kinds.index(b"IDAT") if b"IDAT" in kinds else len(kinds)
        self._kinds_before = kinds[: self._pixels_from]

    def _before(self, kind: bytes, *sizes: int) -> bytes | None:
        """The payload of the first chunk of this kind before the pixels, where it is sound and has one of the sizes."""
        if kind not in self._kinds_before:
            return None
        chunk = self._chunks[self._kinds_before.index(kind)]
        if not chunk.sound or (sizes and len(chunk.payload) not in sizes):
            return None
        return bytes(chunk.payload)

    # ------------------------------------------------------------ what ancillary chunks say

    @property
    def shallow(self) -> bool:
        """Whether a sample has 8 bits or fewer."""
        return self._depth <= 8

    @property
    def frames(self) -> int:
        """Of the animation, as acTL claims; 1 without one."""
        control = self._before(b"acTL", 8)
        return 1 if control is None else max(1, int.from_bytes(control[:4], "big"))

    @property
    def exif(self) -> bytes | None:
        """What eXIf holds."""
        return self._before(b"eXIf")

    @cached_property
    def cicp(self) -> tuple[int, int] | None:
        """Transfer characteristics and primaries of H.273. Those of YCbCr are no PNG's, and passed over."""
        found = self._before(b"cICP", 4)
        return None if found is None or found[2] != 0 else (found[1], found[0])

    @cached_property
    def profile(self) -> bytes | None:
        """The ICC profile, where nothing comes before it."""
        name, _, rest = (self._before(b"iCCP") or b"").partition(b"\0")
        if self.cicp is not None or not name or rest[:1] != b"\0":
            return None
        inflater = zlib.decompressobj()
        try:
            profile = inflater.decompress(rest[1:], MAX_PROFILE)
        except zlib.error:
            return None
        return None if inflater.unconsumed_tail or not profile else profile

    @property
    def gamma(self) -> float | None:
        """The exponent by which samples were made of light (0.45455: of most files; 1: they are light)."""
        found = self._before(b"gAMA", 4)
        if found is None or self.cicp or self.profile or self._before(b"sRGB", 1) is not None:
            return None
        exponent = int.from_bytes(found, "big") / 100_000
        return exponent if 0.01 <= exponent <= 100 else None

    @property
    def chromaticities(self) -> tuple[float, ...] | None:
        """x and y of white, red, green and blue: eight numbers."""
        found = self._before(b"cHRM", 32)
        return None if found is None else tuple(value / 100_000 for value in struct.unpack(">8I", found))

    @property
    def harmless(self) -> bool:
        """Whether any reader of PNG opens it; an answer of no means only that it has to be tried."""
        return all(
            chunk.sound
            and (
                chunk.kind in (b"PLTE", b"IDAT", b"tRNS")
                or len(chunk.payload) == _HARMLESS.get(chunk.kind, -1)
                or (chunk.kind == b"tEXt" and len(chunk.payload) < _HARMLESS_TEXT)
            )
            for chunk in self._chunks
        )

    # ------------------------------------------------------------ pixels

    def image(self) -> Image.Image:
        """The first frame in one of the modes 1, L, LA, P, RGB, RGBA, I;16: transparency is in the alpha channel, or
        in that of the palette.

        Raises:
            BadData: ``decode-failed``: pixels or the palette are lost or changed. Whatever PIL raises.
        """
        frame = self._frame()
        stream = self._stream(frame)
        image = self._keyed(self._loaded(stream, frame), stream)
        if frame.size == self.size:
            return image
        canvas = Image.new("RGBA", self.size)
        canvas.paste(image.convert("RGBA"), frame.place)
        return canvas

    def deep(self) -> np.ndarray | None:
        """uint16 [H, W, 3] of all 16 bits, without alpha; ``None``: there are fewer, or they are not to be had.

        Raises:
            As ``image``, of an image that ``image`` gave.
        """
        frame = self._frame()
        if self.shallow or self._colour == _GREY_ALPHA or frame.size != self.size:
            return None
        stream = self._stream(frame)
        image = self._loaded(stream, frame)
        if self._colour == _GREY:
            return np.repeat(np.asarray(image).astype(np.uint16)[:, :, None], 3, axis=2)
        high, low = np.asarray(image)[:, :, :3], self._low_bytes(stream)[:, :, :3]
        return high.astype(np.uint16) << 8 | low

    def _frame(self) -> _Frame:
        parts = [chunk for chunk in self._chunks if chunk.kind == b"IDAT"]
        if not parts:
            raise BadData("decode-failed", "PNG: it has no pixels (IDAT)")
        shown = self._separate_first_frame() if self._before(b"acTL", 8) else None
        return shown or _Frame((0, 0), self.size, tuple(chunk.payload for chunk in parts), _vouched(parts))

    def _separate_first_frame(self) -> _Frame | None:
        """Of an animation that the picture in IDAT is no frame of; ``None``: it is, or the animation is damaged."""
        if b"fcTL" in self._kinds_before:
            return None
        chunks = iter(self._chunks[self._pixels_from :])
        control = next((chunk for chunk in chunks if chunk.kind == b"fcTL"), None)
        if control is None or not control.sound or len(control.payload) != 26:
            return None
        number, width, height, x, y = _PLACE.unpack(control.payload[: _PLACE.size])
        if number != 0 or not 0 < width <= self.size[0] - x or not 0 < height <= self.size[1] - y:
            return None
        parts: list[_Chunk] = []
        for chunk in chunks:
            if chunk.kind == b"fcTL":
                break
            if chunk.kind == b"fdAT":
                if int.from_bytes(chunk.payload[:4], "big") != len(parts) + 1:
                    return None
                parts.append(chunk)
        payloads = tuple(chunk.payload[4:] for chunk in parts)
        return _Frame((x, y), (width, height), payloads, _vouched(parts)) if parts else None

    def _stream(self, frame: _Frame, parts: Sequence[bytes | memoryview] | None = None) -> bytes:
        """A PNG of the frame with the chunks that decide its samples, and no others."""
        if not frame.vouched and not _inflates_to(frame.parts, self._raw_bytes(frame.size))[1]:
            raise BadData("decode-failed", "PNG: check sums of the pixels (IDAT) are wrong")
        header = _HEADER.pack(*frame.size, *self._header[8:])
        written = [SIGNATURE, *_written(b"IHDR", header)]
        if self._colour == _PALETTE:
            written += self._palette()
        for part in parts or frame.parts:
            written += _written(b"IDAT", part)
        return b"".join([*written, *_written(b"IEND", b"")])

    def _palette(self) -> list[bytes | memoryview]:
        palette = self._before(b"PLTE")
        if palette is None or len(palette) < 3:
            raise BadData("decode-failed", "PNG: it has no palette (PLTE) whose check sum is right")
        palette = palette[: min(len(palette) // 3, 256) * 3]
        written = _written(b"PLTE", palette)
        alpha = self._before(b"tRNS")
        # Before its palette it counts as misplaced.
        if alpha and self._kinds_before.index(b"PLTE") < self._kinds_before.index(b"tRNS"):
            written += _written(b"tRNS", alpha[: len(palette) // 3])
        return written

    def _loaded(self, stream: bytes, frame: _Frame) -> Image.Image:
        image = _opened(stream)
        try:
            image.load()
        except OSError:
            # Its own check sum is wrong, though those of the chunks are right: the writer's mistake.
            raw = _inflated(frame.parts, self._raw_bytes(frame.size))
            if raw is None or not frame.vouched:
                raise
            image = _opened(self._stream(frame, [zlib.compress(raw, 1)]))
            image.load()
        # PIL leaves black what a whole zlib stream has no rows for. Then the last row is black, or a later pass.
        last = image.crop((0, frame.size[1] - 1, *frame.size))
        if (self._interlaced or not any(last.tobytes())) and not self._holds_all(frame):
            raise BadData("decode-failed", "PNG: the pixels (IDAT) end before the last row")
        return image

    def _holds_all(self, frame: _Frame) -> bool:
        return _inflates_to(frame.parts, self._raw_bytes(frame.size))[0] >= self._raw_bytes(frame.size)

    def _low_bytes(self, stream: bytes) -> np.ndarray:
        """uint8 [H, W, C] of the lower bytes of 16-bit RGB or RGBA, of which PIL gives the higher ones."""
        image = _opened(stream)
        # Samples are read as if the first byte were the lower one.
        image.tile = [tile._replace(args=f"{image.mode};16L") for tile in image.tile]
        return np.asarray(image)

    def _keyed(self, image: Image.Image, stream: bytes) -> Image.Image:
        """With an alpha channel where tRNS names a grey value or a colour, which is compared at the file's depth."""
        count = {_GREY: 1, _RGB: 3}.get(self._colour)
        found = None if count is None else self._before(b"tRNS", 2 * count)
        if found is None:
            return image
        mask = (1 << self._depth) - 1
        key = [value & mask for value in struct.unpack(f">{count}H", found)]
        if self._colour == _GREY and self._depth == 16:
            clear = np.asarray(image) == key[0]
            image = Image.fromarray(np.rint(np.asarray(image) / np.float32(257)).astype(np.uint8))
        elif self._colour == _GREY:
            image = image.convert("L")
            clear = np.asarray(image) == key[0] * 255 // mask
        elif self._depth == 16:
            high = np.asarray(image) == np.array([value >> 8 for value in key], np.uint8)
            low = self._low_bytes(stream) == np.array([value & 255 for value in key], np.uint8)
            clear = (high & low).all(axis=2)
        else:
            clear = (np.asarray(image) == np.array(key, np.uint8)).all(axis=2)
        image = image.copy()
        image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        return image

    def _raw_bytes(self, size: tuple[int, int]) -> int:
        """Of the pixels with the filter byte of each row, before compression."""
        bits = self._depth * _CHANNELS[self._colour]
        passes = _PASSES if self._interlaced else (((0, 0), (1, 1)),)
        total = 0
        for (x, y), (step_x, step_y) in passes:
            columns, rows = -(-(size[0] - x) // step_x), -(-(size[1] - y) // step_y)
            if columns > 0 and rows > 0:
                total += rows * (1 + -(-columns * bits // 8))
        return total


def opens_elsewhere(data: bytes) -> bool:
    """Whether PIL, and with it most other programs, reads a PNG as it lies."""
    if Png(data).harmless:
        return True
    try:
        with decoding():
            _opened(data).load()
    except BadData:
        return False
    return True


def _opened(stream: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(stream), formats=("PNG",))


def _vouched(chunks: Sequence[_Chunk]) -> bool:
    return all(chunk.check is None or chunk.sound for chunk in chunks)


def _written(kind: bytes, payload: bytes | memoryview) -> list[bytes | memoryview]:
    check = zlib.crc32(payload, zlib.crc32(kind))
    return [struct.pack(">I", len(payload)) + kind, payload, struct.pack(">I", check)]


def _inflates_to(parts: Sequence[memoryview], most: int) -> tuple[int, bool]:
    """(bytes, whether the check sum behind them is right) of a zlib stream, no further than beyond ``most`` bytes.

    Never holds more than a piece of them.
    """
    inflater, total = zlib.decompressobj(), 0
    try:
        for part in parts:
            rest: bytes | memoryview = part
            while len(rest) and not inflater.eof:
                total += len(inflater.decompress(rest, _PIECE))
                rest = inflater.unconsumed_tail
                if total > most:
                    return total, False
        total += len(inflater.flush())
    except zlib.error:
        return total, False
    return total, inflater.eof


def _inflated(parts: Sequence[memoryview], size: int) -> bytes | None:
    """So many bytes of a zlib stream, whose check sum is not looked at; ``None``: it does not hold that many."""
    try:
        raw = zlib.decompressobj(wbits=-15).decompress(b"".join(parts)[2:], size)
    except zlib.error:
        return None
    return raw if len(raw) == size else None
