"""GIF as browsers show it: frames composed on a transparent canvas.

The blocks of the file are read here, and PIL decodes each frame as a GIF of its own. PIL's own composition fills what
no frame covers, and what a frame leaves behind, with a colour of the palette; browsers show what lies below.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from sharding.errors import BadData
from sharding.media.untrusted import refuse_large

_SCREEN = struct.Struct("<6sHHBBB")  # signature, width, height, flags, background, shape of a pixel
_PLACE = struct.Struct("<HHHHB")  # x, y, width, height, flags
_EXTENSION, _PICTURE, _END, _CONTROL = 0x21, 0x2C, 0x3B, 0xF9
_HAS_PALETTE, _INTERLACED = 0x80, 0x40
_NO_CONTROL = bytes(4)
_TO_BACKGROUND, _TO_PREVIOUS = 2, 3


@dataclass(frozen=True)
class _Frame:
    """A frame, and where in the file its parts lie: slices of the colours, and of the compressed pixels.

    Args:
        place: (left, top, right, bottom) on the canvas.
        flags: of the picture, but those of the palette that is its own or the file's.
        control: four bytes: flags with the disposal, two of the time it is shown, the transparent index.
    """

    place: tuple[int, int, int, int]
    flags: int
    colours: slice
    pixels: slice
    control: bytes

    @property
    def disposal(self) -> int:
        return self.control[0] >> 2 & 7

    @property
    def milliseconds(self) -> int:
        return 10 * int.from_bytes(self.control[1:3], "little")


class Gif:
    """The frames of a GIF; none is decoded yet. The file may end early, within the last of them.

    Raises:
        BadData: ``decode-failed``: there is no frame; ``too-many-pixels``.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data = data
        self._frames = list(_frames(data))
        if not self._frames:
            raise BadData("decode-failed", "GIF: it has no picture")
        width, height = _SCREEN.unpack_from(data)[1:3]
        first = self._frames[0].place
        self.size: tuple[int, int] = (max(width, first[2]), max(height, first[3]))
        for left, top, right, bottom in ((0, 0, *self.size), *(frame.place for frame in self._frames)):
            refuse_large(right - left, bottom - top, max_pixels)

    def __len__(self) -> int:
        return len(self._frames)

    def first(self) -> Image.Image:
        """RGBA; RGB where nothing of it can be transparent."""
        frame = self._frames[0]
        picture = self._decoded(frame)
        if frame.place == (0, 0, *self.size):
            return picture
        canvas = Image.new("RGBA", self.size)
        canvas.paste(picture, frame.place[:2])
        return canvas

    def shown(self) -> Iterator[tuple[Image.Image, int]]:
        """(RGBA, milliseconds as the file has them) of each frame, as the canvas is while it is shown."""
        canvas = Image.new("RGBA", self.size)
        for frame in self._frames:
            before, canvas = canvas, canvas.copy()
            picture = self._decoded(frame).convert("RGBA")
            canvas.paste(picture, frame.place[:2], picture)
            yield canvas, frame.milliseconds
            if frame.disposal == _TO_PREVIOUS:
                canvas = before
            elif frame.disposal == _TO_BACKGROUND:
                canvas = canvas.copy()
                canvas.paste((0, 0, 0, 0), frame.place)

    def _decoded(self, frame: _Frame) -> Image.Image:
        left, top, right, bottom = frame.place
        colours, shape = self._data[frame.colours], (right - left, bottom - top)
        alone = b"".join((
            _SCREEN.pack(b"GIF89a", *shape, frame.flags & 7 | (_HAS_PALETTE if colours else 0), 0, 0),
            colours,
            bytes((_EXTENSION, _CONTROL, 4, frame.control[0] & 1)), frame.control[1:], b"\0",
            bytes((_PICTURE,)), _PLACE.pack(0, 0, *shape, frame.flags & _INTERLACED),
            self._data[frame.pixels],
        ))  # fmt: skip
        with Image.open(io.BytesIO(alone), formats=("GIF",)) as image:
            return image.convert("RGBA" if "transparency" in image.info else "RGB")


def _frames(data: bytes) -> Iterator[_Frame]:
    if len(data) < _SCREEN.size:
        return
    flags = _SCREEN.unpack_from(data)[3]
    place = _SCREEN.size + _palette_bytes(flags)
    palette, control = slice(_SCREEN.size, place), _NO_CONTROL
    while place < len(data) and data[place] != _END:
        if data[place] == _EXTENSION:
            block = data[place + 1 : place + 7]  # of this kind: label, length, four bytes
            if len(block) == 6 and block[0] == _CONTROL and block[1] >= 4:
                control = block[2:]
            place = _behind_blocks(data, place + 2)
        elif data[place] == _PICTURE and place + 1 + _PLACE.size <= len(data):
            left, top, width, height, own = _PLACE.unpack_from(data, place + 1)
            start = place + 1 + _PLACE.size
            colours = slice(start, start + _palette_bytes(own)) if own & _HAS_PALETTE else palette
            start += _palette_bytes(own)
            place = _behind_blocks(data, start + 1)
            if width and height:
                shape = own & _INTERLACED | (own if own & _HAS_PALETTE else flags) & 7
                extent = (left, top, left + width, top + height)
                yield _Frame(extent, shape, colours, slice(start, place), control)
            control = _NO_CONTROL
        else:
            place += 1  # a stray byte between blocks


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & _HAS_PALETTE else 0


def _behind_blocks(data: bytes, place: int) -> int:
    """Behind a row of blocks (a length, and as many bytes) that one of length 0 ends; beyond the file if it is cut."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1
