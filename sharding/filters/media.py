"""Filters of media: by the header of the source, and by what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from sharding.media.info import Encoded, MediaInfo


class HeaderRule(Protocol):
    """Decides about a source that is not decoded yet."""

    def objection(self, info: MediaInfo) -> str | None:
        """The cause under which the source is dropped; None where it may stay."""
        ...


class StoredRule(Protocol):
    """Decides about what is to be stored."""

    def objection(self, media: Encoded, captions: list[str]) -> str | None:
        """The cause under which the sample is dropped; None where it may stay."""
        ...


def _outside(value: float, least: float | None, most: float | None, causes: tuple[str, str]) -> str | None:
    """Of the causes (below, above) the one that applies."""
    if least is not None and value < least:
        return causes[0]
    return causes[1] if most is not None and value > most else None


@dataclass(frozen=True)
class Size:
    """Shorter and longer side, in pixels."""

    least: int | None
    most: int | None

    def objection(self, info: MediaInfo) -> str | None:
        if self.least is not None and min(info.width, info.height) < self.least:
            return "too-small"
        return "too-large" if self.most is not None and max(info.width, info.height) > self.most else None


@dataclass(frozen=True)
class Aspect:
    """Longer side over shorter side."""

    most: float

    def objection(self, info: MediaInfo) -> str | None:
        passes = max(info.width, info.height) <= self.most * min(info.width, info.height)
        return None if passes else "aspect"


@dataclass(frozen=True)
class Pixels:
    """Width x height."""

    least: int | None
    most: int | None

    def objection(self, info: MediaInfo) -> str | None:
        return _outside(
            info.width * info.height, self.least, self.most, ("too-few-pixels", "too-many-pixels")
        )


@dataclass(frozen=True)
class Animated:
    """Images that move, or those that do not."""

    images: Literal["keep", "drop", "only"]

    def objection(self, info: MediaInfo) -> str | None:
        if self.images == "drop" and info.animated:
            return "animated"
        return "not-animated" if self.images == "only" and not info.animated else None


@dataclass(frozen=True)
class Duration:
    """Seconds."""

    least: float | None
    most: float | None

    def objection(self, media: Encoded, captions: list[str]) -> str | None:
        return _outside(media.info.duration, self.least, self.most, ("clip-too-short", "clip-too-long"))


@dataclass(frozen=True)
class Frames:
    """How many."""

    least: int | None
    most: int | None

    def objection(self, media: Encoded, captions: list[str]) -> str | None:
        return _outside(media.info.frames, self.least, self.most, ("too-few-frames", "too-many-frames"))


@dataclass(frozen=True)
class Fps:
    """Frames a second."""

    least: float | None
    most: float | None

    def objection(self, media: Encoded, captions: list[str]) -> str | None:
        # A clip's duration is a rounded number of ticks: a thousandth is no reason to drop it.
        fps = round(media.info.frames / media.info.duration, 3) if media.info.duration > 0 else 0.0
        return _outside(fps, self.least, self.most, ("fps-too-low", "fps-too-high"))
