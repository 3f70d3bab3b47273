"""From the blocks of a configuration to the rules that a task asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sharding.errors import BadData
from sharding.filters.captions import CaptionRule, Characters, Length, NotEmpty
from sharding.filters.config import (
    AnimatedFilter,
    AspectFilter,
    BlockedWordsFilter,
    CaptionFilter,
    CustomFilter,
    DurationFilter,
    FilterConfig,
    FpsFilter,
    FramesFilter,
    LanguageFilter,
    PixelsFilter,
    SizeFilter,
    load_class,
)
from sharding.filters.language import Language
from sharding.filters.media import (
    Animated,
    Aspect,
    Duration,
    Fps,
    Frames,
    HeaderRule,
    Pixels,
    Size,
    StoredRule,
)
from sharding.filters.words import BlockedWords
from sharding.media import Encoded, MediaInfo


@dataclass
class Filters:
    """The rules of one dataset, each list in the order in which it is asked.

    ``captions`` object to single captions, ``samples`` by a single caption to the whole sample, ``header`` to the
    source before it is decoded, ``stored`` to what would be stored of it.
    """

    captions: list[CaptionRule] = field(default_factory=lambda: [NotEmpty()])
    samples: list[CaptionRule] = field(default_factory=list)
    header: list[HeaderRule] = field(default_factory=list)
    stored: list[StoredRule] = field(default_factory=list)

    def check_texts(self, captions: Sequence[str]) -> None:
        """Ask all captions, those that will be left out too, whether the sample may stay.

        Raises:
            BadData: it may not.
        """
        for rule in self.samples:
            for caption in captions:
                _raise(rule.objection(caption), caption[:100])

    def objection(self, caption: str) -> str | None:
        """The cause under which a caption is left out; None where it stays."""
        found = (rule.objection(caption) for rule in self.captions)
        return next((cause for cause in found if cause is not None), None)

    def check_header(self, info: MediaInfo) -> None:
        """Raises BadData where a header rule objects."""
        for rule in self.header:
            _raise(rule.objection(info), f"{info.width}x{info.height}")

    def check_stored(self, media: Encoded, captions: list[str]) -> None:
        """Raises BadData where a rule objects to what would be stored."""
        info = media.info
        for rule in self.stored:
            detail = f"{info.width}x{info.height}, {info.frames} frames, {info.duration:.2f} s"
            _raise(rule.objection(media, captions), detail)


def _raise(cause: str | None, detail: str) -> None:
    if cause is not None:
        raise BadData(cause, detail)


@dataclass(frozen=True)
class _Custom:
    """A user's filter as a rule of its level."""

    keeps: Any
    cause: str

    def objection(self, *sample: Any) -> str | None:
        return None if self.keeps(*sample) else self.cause


def build_filters(blocks: Sequence[FilterConfig]) -> Filters:
    """The rules that the blocks ask for. Those of scores and of the whole corpus are not asked of single inputs.

    Raises:
        UserError: a custom filter cannot be imported here.
    """
    filters = Filters()
    for block in blocks:
        if isinstance(block, SizeFilter):
            filters.header.append(Size(block.min, block.max))
        elif isinstance(block, AspectFilter):
            filters.header.append(Aspect(block.max))
        elif isinstance(block, PixelsFilter):
            filters.header.append(Pixels(block.min, block.max))
        elif isinstance(block, AnimatedFilter):
            filters.header.append(Animated(block.images))
        elif isinstance(block, DurationFilter):
            filters.stored.append(Duration(block.min, block.max))
        elif isinstance(block, FramesFilter):
            filters.stored.append(Frames(block.min, block.max))
        elif isinstance(block, FpsFilter):
            filters.stored.append(Fps(block.min, block.max))
        elif isinstance(block, CaptionFilter):
            filters.captions += [Length(block), Characters(block)]
        elif isinstance(block, LanguageFilter):
            filters.captions.append(Language(frozenset(block.keep), block.min_probability))
        elif isinstance(block, BlockedWordsFilter):
            (filters.samples if block.what == "sample" else filters.captions).append(
                BlockedWords(block.words)
            )
        elif isinstance(block, CustomFilter):
            _add_custom(filters, block)
    return filters


def _add_custom(filters: Filters, block: CustomFilter) -> None:
    made = load_class(block.filter)
    custom: Any = _Custom(made(**block.arguments).keeps, block.cause)
    levels: dict[str, list[Any]] = {
        "caption": filters.captions,
        "header": filters.header,
        "stored": filters.stored,
    }
    levels[getattr(made, "level")].append(custom)  # noqa: B009 - load_class saw to it
