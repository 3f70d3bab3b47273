"""What the decoding process does with an input: reads its header, and makes of it what a shard stores."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from PIL import Image

from sharding.errors import BadData
from sharding.media.config import ImageConfig, VideoConfig
from sharding.media.frames import frames_of
from sharding.media.images import encode_image, probe_image
from sharding.media.info import Encoded, MediaInfo
from sharding.media.single_frame import refuse_still
from sharding.media.transcode import cut_video
from sharding.media.video import probe_video


class MediaDecoder:
    """A ``sharding.guard.Decoder`` of one dataset's ``image`` or ``video`` block (the other is ``None``)."""

    def __init__(self, image: dict[str, Any] | None, video: dict[str, Any] | None) -> None:
        self._image = None if image is None else ImageConfig.model_validate(image)
        self._video = None if video is None else VideoConfig.model_validate(video)
        Image.MAX_IMAGE_PIXELS = None  # max_pixels of the configuration is asked instead, and may be larger
        if self._reads_videos or (self._image is not None and self._image.resize is not None):
            import_module("av")  # now, rather than within the time and the memory of the first input

    def header(self, data: bytes) -> dict[str, Any]:
        """The facts of a ``MediaInfo``, as the input's header claims them."""
        return self._header(data).facts()

    @property
    def _reads_videos(self) -> bool:
        return self._image is None or self._image.frames is not None

    @property
    def _max_pixels(self) -> int:
        block = self._video or self._image
        assert block is not None
        return block.max_pixels

    def _header(self, data: bytes) -> MediaInfo:
        if self._reads_videos:
            refuse_still(data, self._max_pixels)
        if self._video is not None:
            return probe_video(data, self._video.max_pixels)
        assert self._image is not None
        if self._image.frames is not None:
            return probe_video(data, self._image.max_pixels)
        return probe_image(data, self._image.max_pixels)

    def parts(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The facts and data of each ``Encoded``; of a part that cannot be stored, its cause and detail."""
        for part in self._parts(data):
            if isinstance(part, BadData):
                yield {"cause": part.cause, "detail": part.detail}, b""
            else:
                yield part.facts(), part.data

    def _parts(self, data: bytes) -> Iterator[Encoded | BadData]:
        if self._reads_videos:
            refuse_still(data, self._max_pixels)
        if self._video is not None:
            return cut_video(data, self._video)
        assert self._image is not None
        if self._image.frames is not None:
            return iter(frames_of(data, self._image))
        return iter([encode_image(data, self._image)])
