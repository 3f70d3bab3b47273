"""What a user writes about filters: the blocks of a dataset's ``filters`` list, told apart by ``kind``.

    filters:
      - {kind: size, min: 64}
      - {kind: caption, min_words: 2, max_words: 60}
      - {kind: duplicates, by: pixels}
      - {kind: near_duplicates, distance: 4}

They are asked level by level, and within a level in the order of the list: single captions first, then the
header of the media, what is stored of them, their score, and last the whole corpus. A sample counts as
dropped by the first that objects. An empty caption never passes, and what does not decode is never kept.

Each block names its ``causes``, the slugs under which its drops are counted. All of them are a choice among good
samples (``chosen``), so they do not count against ``bad_limit``.

Light to import: no Arrow, no Ray, no decoder.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sharding.errors import UserError
from sharding.given_path import GivenPath
from sharding.storage import normalise_url

Level = Literal["caption", "header", "stored", "scored", "corpus"]

LEVELS_OF_CUSTOM = ("caption", "header", "stored")

_CUSTOM_CAUSE = "custom-"

#: Of a copy whose first caption, or number of captions, no equal sample before it has.
OTHER_CAPTION = "duplicate-other-caption"

# Causes of the choices that other blocks of a dataset make (``max_source_mb``, ``max_pixels``, ``max_mb``, ``opt_out``,
# ``robots``; a dataset of clips takes no stills).
_OTHER_CHOICES = (
    "clip-too-large", "opted-out", "robots-txt", "still-image", "too-many-bytes", "too-many-pixels",
)  # fmt: skip


class FilterBlock(BaseModel):
    """What all blocks share. ``level``: when it is asked. ``causes``: under what it counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: ClassVar[Level]
    causes: ClassVar[tuple[str, ...]]
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")


def _needs_one(block: FilterBlock, *names: str) -> None:
    if all(getattr(block, name) is None for name in names):
        raise ValueError(f"give at least one of {', '.join(names)}")


def _ordered(block: FilterBlock, low: str, high: str) -> None:
    least, most = getattr(block, low), getattr(block, high)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{low} {least:g} is above {high} {most:g}: nothing would pass")


class SizeFilter(FilterBlock):
    """Sides of the source in pixels."""

    level: ClassVar[Level] = "header"
    causes: ClassVar[tuple[str, ...]] = ("too-small", "too-large")

    kind: Literal["size"]
    min: int | None = Field(default=None, ge=1, description="of the shorter side")
    max: int | None = Field(default=None, ge=1, description="of the longer side")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _needs_one(self, "min", "max")
        _ordered(self, "min", "max")
        return self


class AspectFilter(FilterBlock):
    """Longer side of the source over its shorter side."""

    level: ClassVar[Level] = "header"
    causes: ClassVar[tuple[str, ...]] = ("aspect",)

    kind: Literal["aspect"]
    max: float = Field(ge=1, allow_inf_nan=False)


class PixelsFilter(FilterBlock):
    """Width x height of (a frame of) the source, known before any pixel is decoded.

    The hard limit against decompression bombs is ``image.max_pixels`` or ``video.max_pixels``; this one chooses
    below it.
    """

    level: ClassVar[Level] = "header"
    causes: ClassVar[tuple[str, ...]] = ("too-few-pixels", "too-many-pixels")

    kind: Literal["pixels"]
    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _needs_one(self, "min", "max")
        _ordered(self, "min", "max")
        return self


class AnimatedFilter(FilterBlock):
    """Animated images (GIF, WebP, PNG) of an image dataset, which stores their first frame."""

    level: ClassVar[Level] = "header"
    causes: ClassVar[tuple[str, ...]] = ("animated", "not-animated")
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    kind: Literal["animated"]
    images: Literal["keep", "drop", "only"] = Field(
        default="drop", description="drop animated ones, keep them, or keep only them"
    )


class DurationFilter(FilterBlock):
    """Seconds of a clip as stored. To drop long videos rather than cut them (``clips: first``), set ``max`` below
    ``video.clip_s``.
    """

    level: ClassVar[Level] = "stored"
    causes: ClassVar[tuple[str, ...]] = ("clip-too-short", "clip-too-long")
    modalities: ClassVar[tuple[str, ...]] = ("video",)

    kind: Literal["duration"]
    min: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _needs_one(self, "min", "max")
        _ordered(self, "min", "max")
        return self


class FramesFilter(FilterBlock):
    """Frames of a clip as stored."""

    level: ClassVar[Level] = "stored"
    causes: ClassVar[tuple[str, ...]] = ("too-few-frames", "too-many-frames")
    modalities: ClassVar[tuple[str, ...]] = ("video",)

    kind: Literal["frames"]
    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _needs_one(self, "min", "max")
        _ordered(self, "min", "max")
        return self


class FpsFilter(FilterBlock):
    """Frames a second of a clip as stored (slide shows have few)."""

    level: ClassVar[Level] = "stored"
    causes: ClassVar[tuple[str, ...]] = ("fps-too-low", "fps-too-high")
    modalities: ClassVar[tuple[str, ...]] = ("video",)

    kind: Literal["fps"]
    min: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _needs_one(self, "min", "max")
        _ordered(self, "min", "max")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class CaptionFilter(FilterBlock):
    """Length and characters of each caption. A caption that fails is left out; a sample without captions left is
    dropped. Shares are of the characters that are no spaces, or of the words.

    ``min_letters`` counts the letters of any alphabet, with their marks; ``max_repeated_characters`` those equal to the
    one before ("!!!!!"), ``max_repeated_words`` the words that the caption had before ("buy buy buy").
    """

    level: ClassVar[Level] = "caption"
    causes: ClassVar[tuple[str, ...]] = (
        "caption-too-short",
        "caption-too-long",
        "caption-characters",
        "caption-repetitive",
    )

    kind: Literal["caption"]
    min_characters: int | None = Field(default=None, ge=1)
    max_characters: int | None = Field(default=None, ge=1)
    min_words: int | None = Field(default=None, ge=1)
    max_words: int | None = Field(default=None, ge=1)
    min_letters: Share | None = Field(default=None, description="share of letters")
    max_non_ascii: Share | None = Field(default=None, description="share of characters beyond ASCII")
    max_repeated_characters: Share | None = None
    max_repeated_words: Share | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _needs_one(self, *(name for name in type(self).model_fields if name != "kind"))
        _ordered(self, "min_characters", "max_characters")
        _ordered(self, "min_words", "max_words")
        return self


class LanguageFilter(FilterBlock):
    """The language of each caption, by py3langid's model of ISO 639-1 codes (``en``, ``de``, ``zh``, ...).

    A caption stays when its most probable language is one of ``keep`` and has at least ``min_probability``.
    Probabilities are over all languages and sum to 1. Captions of two or three words are often taken for another
    language: ask for a ``min_probability`` only where captions are sentences.
    """

    level: ClassVar[Level] = "caption"
    causes: ClassVar[tuple[str, ...]] = ("language",)

    kind: Literal["language"]
    keep: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = Field(min_length=1)
    min_probability: Share = 0.0

    @field_validator("keep")
    @classmethod
    def _known(cls, keep: list[str]) -> list[str]:
        from sharding.filters.language import languages

        unknown = sorted(set(keep) - languages())
        if unknown:
            raise ValueError(f"no language {', '.join(unknown)}; there are {', '.join(sorted(languages()))}")
        return keep


class BlockedWordsFilter(FilterBlock):
    """Captions with certain words. Whole words only, whatever their case and compatibility form (NFKC).

    An entry may be a phrase. In scripts without spaces (Chinese, Japanese, Thai...) any place in the text counts.
    ``path`` is a text file, one entry a line (blank lines and lines that begin with # are passed over), read
    once before work starts; the entries are part of the dataset's digest, the place of the file is not.
    """

    level: ClassVar[Level] = "caption"
    causes: ClassVar[tuple[str, ...]] = ("blocked-words",)

    kind: Literal["blocked_words"]
    words: list[str] = Field(default_factory=list)
    path: GivenPath | None = Field(
        default=None, description="path, file:// or s3:// url; a relative path is that of the command"
    )
    what: Literal["caption", "sample"] = Field(
        default="caption", description="what a hit drops: this caption, or the whole sample"
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else normalise_url(path)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if bool(self.words) == (self.path is not None):
            raise ValueError("give either words or path")
        if not all(word.strip() for word in self.words):
            raise ValueError("words holds an empty entry")
        return self


class DuplicatesFilter(FilterBlock):
    """Media equal to those of an earlier sample: equal files (``bytes``), or equal pixels as they are stored
    (``pixels``: other file formats and metadata do not matter). The first in input order stays.

    Captions do not matter, but what is dropped with a caption that no equal sample before it has counts apart
    (``duplicate-other-caption``): a corpus with a row for each caption loses them so, and wants ``group_by``.
    """

    level: ClassVar[Level] = "corpus"
    causes: ClassVar[tuple[str, ...]] = ("duplicate", "duplicate-pixels", OTHER_CAPTION)

    kind: Literal["duplicates"]
    by: Literal["bytes", "pixels"] = "bytes"


class NearDuplicatesFilter(FilterBlock):
    """Media that look like those of an earlier sample: their 64-bit perceptual hashes (``sharding.fingerprint``)
    differ in at most ``distance`` bits.

    A sample is dropped if it is that near to *any* earlier sample in input order, dropped or kept: of a chain of
    neighbours only the first stays. Distances above 10 meet unrelated images in large corpora, and cost much.
    """

    level: ClassVar[Level] = "corpus"
    causes: ClassVar[tuple[str, ...]] = ("near-duplicate",)

    kind: Literal["near_duplicates"]
    distance: int = Field(default=4, ge=0, le=16)


class ScoreFilter(FilterBlock):
    """The image-text score of a sample, by a scorer that is handed to ``prepare``; recorded in the index.

    Of a sample with several captions the best one decides. With neither ``min`` nor ``max`` scores are recorded
    only. ``weights`` is filled in before work starts and is part of the dataset's digest, where ``model`` (an
    address) is not: the same weights elsewhere make the same dataset. Give it to insist on certain weights.
    """

    level: ClassVar[Level] = "scored"
    causes: ClassVar[tuple[str, ...]] = ("score-too-low", "score-too-high")

    kind: Literal["score"]
    scorer: str = Field(default="itc", description="name of the scorer; itc: similarity by a GLSCL model")
    model: GivenPath | None = Field(default=None, description="what the scorer loads: an address")
    weights: str | None = Field(default=None, description="digest of what the scorer loads")
    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)
    batch: int = Field(default=32, ge=1, le=4096, description="samples scored at once")
    frames: int = Field(default=4, ge=1, le=64, description="of a clip that the scorer sees")

    @field_validator("model")
    @classmethod
    def _absolute(cls, model: str | None) -> str | None:
        return None if model is None else normalise_url(model)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        _ordered(self, "min", "max")
        return self


class CustomFilter(FilterBlock):
    """A class of the user's, by its dotted path, e.g. ``my_filters.NotShouting``.

    The class has an attribute ``level`` and a method ``keeps``, which returns True for what stays::

        level = "caption"   keeps(caption: str)                              single spaces, none at its ends
        level = "header"    keeps(info: sharding.media.MediaInfo)            of the source, undecoded
        level = "stored"    keeps(media: sharding.media.Encoded, captions: list[str])

    It is made once a task with ``arguments``, in the tasks' processes: its module lies in the working directory
    (which is shipped to the cluster) or is installed there. It must answer alike for alike input, whatever came
    before. Drops count as ``custom-NAME``, NAME being ``name`` or the class's in kebab-case. Path, arguments and
    name are part of the dataset's digest; the code is not, so give changed code another name.
    """

    level: ClassVar[Level] = "stored"
    causes: ClassVar[tuple[str, ...]] = ()

    kind: Literal["custom"]
    filter: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", description="dotted path of the class")
    arguments: dict[str, Any] = Field(default_factory=dict)
    name: str | None = Field(default=None, pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")

    @property
    def cause(self) -> str:
        plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", "-", self.filter.rpartition(".")[2]).strip("-").lower()
        return _CUSTOM_CAUSE + (self.name or plain)

    @model_validator(mode="after")
    def _importable(self) -> Self:
        made = load_class(self.filter)
        try:
            inspect.signature(made).bind(**self.arguments)
        except TypeError as error:
            raise ValueError(f"{self.filter} does not take these arguments: {error}") from None
        return self


#: Variable with the folder that the command was called in, for processes that run in others.
COMMAND_FOLDER = "GLSCL_FOLDER"


def load_class(path: str) -> type:
    """The filter class at a dotted path: of a module that is installed, or lies in the command's folder.

    Raises:
        UserError: it cannot be imported, or is none; names the path and what is wrong.
    """
    module, _, name = path.rpartition(".")
    # Last on the path: nothing else is to be imported from there. Workers may run in another folder than the command.
    here = os.environ.get(COMMAND_FOLDER) or os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, name, None)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"filter {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        where = getattr(imported, "__file__", None) or "part of Python"
        raise UserError(f"filter {path}: {module} has no class {name} ({where})")
    if getattr(found, "level", None) not in LEVELS_OF_CUSTOM or not callable(getattr(found, "keeps", None)):
        raise UserError(
            f"filter {path}: the class needs level = {' | '.join(LEVELS_OF_CUSTOM)} and a method keeps"
        )
    return found


FilterConfig = Annotated[
    SizeFilter
    | AspectFilter
    | PixelsFilter
    | AnimatedFilter
    | DurationFilter
    | FramesFilter
    | FpsFilter
    | CaptionFilter
    | LanguageFilter
    | BlockedWordsFilter
    | DuplicatesFilter
    | NearDuplicatesFilter
    | ScoreFilter
    | CustomFilter,
    Field(discriminator="kind"),
]

CorpusFilter = DuplicatesFilter | NearDuplicatesFilter


def corpus_cause(block: CorpusFilter) -> str:
    """The cause of a filter over the whole corpus (of exact copies with other captions: ``OTHER_CAPTION``)."""
    if isinstance(block, NearDuplicatesFilter):
        return "near-duplicate"
    return "duplicate" if block.by == "bytes" else "duplicate-pixels"


_CHOSEN = frozenset(_OTHER_CHOICES).union(*(kind.causes for kind in FilterBlock.__subclasses__()))


def chosen(cause: str) -> bool:
    """Whether what counts under ``cause`` was dropped by choice; all else is bad data."""
    return cause in _CHOSEN or cause.startswith(_CUSTOM_CAUSE)
