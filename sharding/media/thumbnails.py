"""Small pictures of images and clips, for people to look at. Runs in a decoding process (``sharding.guard``)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

from PIL import Image

from sharding.media.images import decode_image
from sharding.media.video import decode_video

_SIDE = 128  # pixels of the longer side
_QUALITY = 70
# A larger image that was dropped is not worth the memory of decoding it again.
_MAX_PIXELS = 25_000_000


class Thumbnailer:
    """A ``sharding.guarded.Decoder``: one part, a JPEG of at most 128 pixels a side (a clip's middle frame)."""

    def __init__(self, modality: Literal["image", "video"]) -> None:
        self._modality = modality

    def header(self, data: bytes) -> dict[str, Any]:
        return {}

    def parts(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        if self._modality == "image":
            pixels = decode_image(data, _MAX_PIXELS)
        else:
            pixels = decode_video(data, 1, max_pixels=_MAX_PIXELS)[0]
        image = Image.fromarray(pixels)
        image.thumbnail((_SIDE, _SIDE))
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=_QUALITY)
        yield {"width": image.width, "height": image.height}, sink.getvalue()
