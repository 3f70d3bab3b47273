"""Filters of media by what their header, or the stored clip, says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from sharding.config import FilterConfig
from sharding.media.info import MediaInfo


class MediaFilter(Protocol):
    """Decides about one image or clip."""

    @property
    def cause(self) -> str: ...

    def keeps(self, info: MediaInfo) -> bool: ...


@dataclass(frozen=True)
class MinimumSize:
    """Shorter side, in pixels."""

    limit: int
    cause: ClassVar[str] = "too-small"

    def keeps(self, info: MediaInfo) -> bool:
        return min(info.width, info.height) >= self.limit


@dataclass(frozen=True)
class MaximumAspect:
    """Longer side over shorter side."""

    limit: float
    cause: ClassVar[str] = "aspect"

    def keeps(self, info: MediaInfo) -> bool:
        return max(info.width, info.height) <= self.limit * min(info.width, info.height)


@dataclass(frozen=True)
class MinimumFrames:
    limit: int
    cause: ClassVar[str] = "clip-too-short"

    def keeps(self, info: MediaInfo) -> bool:
        return info.frames >= self.limit


@dataclass(frozen=True)
class MinimumDuration:
    """Seconds."""

    limit: float
    cause: ClassVar[str] = "clip-too-short"

    def keeps(self, info: MediaInfo) -> bool:
        return info.duration >= self.limit


def source_filters(config: FilterConfig) -> list[MediaFilter]:
    """Those the configuration asks for, over the header of the source."""
    filters: list[MediaFilter] = [MinimumSize(config.min_size)]
    if config.max_aspect is not None:
        filters.append(MaximumAspect(config.max_aspect))
    return filters
