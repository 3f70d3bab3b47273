"""Filters of single captions. They see text with single spaces and no space at its ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from sharding.config import FilterConfig


class CaptionFilter(Protocol):
    """Decides about one caption."""

    @property
    def cause(self) -> str: ...

    def keeps(self, caption: str) -> bool: ...


@dataclass(frozen=True)
class NotEmpty:
    cause: ClassVar[str] = "caption-empty"

    def keeps(self, caption: str) -> bool:
        return any(letter.isprintable() and not letter.isspace() for letter in caption)


@dataclass(frozen=True)
class MinimumCharacters:
    limit: int
    cause: ClassVar[str] = "caption-too-short"

    def keeps(self, caption: str) -> bool:
        return len(caption) >= self.limit


@dataclass(frozen=True)
class MaximumCharacters:
    limit: int
    cause: ClassVar[str] = "caption-too-long"

    def keeps(self, caption: str) -> bool:
        return len(caption) <= self.limit


@dataclass(frozen=True)
class MinimumWords:
    limit: int
    cause: ClassVar[str] = "caption-too-short"

    def keeps(self, caption: str) -> bool:
        return len(caption.split()) >= self.limit


@dataclass(frozen=True)
class MaximumWords:
    limit: int
    cause: ClassVar[str] = "caption-too-long"

    def keeps(self, caption: str) -> bool:
        return len(caption.split()) <= self.limit


def caption_filters(config: FilterConfig) -> list[CaptionFilter]:
    """Those the configuration asks for; an empty caption never passes."""
    filters: list[CaptionFilter] = [NotEmpty()]
    filters += [MinimumCharacters(config.min_characters), MinimumWords(config.min_words)]
    if config.max_characters is not None:
        filters.append(MaximumCharacters(config.max_characters))
    if config.max_words is not None:
        filters.append(MaximumWords(config.max_words))
    return filters
