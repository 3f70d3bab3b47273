"""Which samples are kept: small classes, each with the cause under which it counts what it drops."""

from __future__ import annotations

from dataclasses import dataclass

from sharding.config import PrepareConfig
from sharding.filters.captions import CaptionFilter, caption_filters
from sharding.filters.media import MediaFilter, MinimumDuration, MinimumFrames, source_filters

__all__ = ["CHOSEN", "CaptionFilter", "Filters", "MediaFilter", "build_filters"]

# Causes by which a configuration chooses among good samples. All others are bad data, and count against
# ``bad_limit``.
CHOSEN = frozenset(
    {
        "aspect",
        "caption-too-long",
        "caption-too-short",
        "clip-too-large",
        "clip-too-short",
        "duplicate",
        "opted-out",
        "robots-txt",
        "too-many-bytes",
        "too-many-pixels",
        "too-small",
    }
)


@dataclass(frozen=True)
class Filters:
    """The filters of one dataset, in the order in which they are asked.

    ``captions`` see each caption, ``source`` the media's header before it is decoded, ``stored`` what will be
    stored of it.
    """

    captions: list[CaptionFilter]
    source: list[MediaFilter]
    stored: list[MediaFilter]


def build_filters(config: PrepareConfig) -> Filters:
    """The filters that a configuration asks for."""
    chosen = config.filters
    stored: list[MediaFilter] = []
    if config.modality == "video":
        stored = [MinimumFrames(chosen.min_frames), MinimumDuration(chosen.min_duration_s)]
    return Filters(caption_filters(chosen), source_filters(chosen), stored)
