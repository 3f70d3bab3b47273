"""What a user writes about one dataset: the pydantic models of the YAML's ``datasets`` blocks.

Light to import (no Arrow, no Ray), since the command line validates a job before it starts anything.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sharding.filters.config import (
    DuplicatesFilter,
    DurationFilter,
    FilterConfig,
    FramesFilter,
    NearDuplicatesFilter,
    ScoreFilter,
    corpus_cause,
)
from sharding.manifest import Modality, canonical_digest
from sharding.media.config import ImageConfig, VideoConfig
from sharding.sources.config import FetchConfig, SourceConfig

# Raised when the way samples are made changes, so that shards of two versions of this program never mix.
FORMAT_VERSION = 4


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrepareConfig(_Block):
    """One dataset: where its samples come from, which are kept and how they are stored."""

    source: SourceConfig
    modality: Modality
    image: ImageConfig | None = Field(default=None, description="modality image only")
    video: VideoConfig | None = Field(default=None, description="modality video only")
    filters: list[FilterConfig] = Field(
        default=[DuplicatesFilter(kind="duplicates")], description="which samples are kept"
    )
    fetch: FetchConfig = FetchConfig()
    samples_per_shard: int = Field(
        default=1000, ge=1, le=1_000_000, description="inputs a task, samples at most"
    )
    max_source_mb: float = Field(default=256, gt=0, description="larger media files are dropped unread")
    bad_limit: float = Field(
        default=0.1, ge=0, le=1, description="share of inputs that may be broken or missing; above: abort"
    )
    decode_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="CPU time for one image, frame or clip; four times as long by the clock; default: "
        "30 for images, 600 for videos",
    )
    decode_memory_mb: float = Field(
        default=4096, ge=256, description="of the process that decodes, besides its libraries"
    )
    task_retries: int = Field(default=3, ge=0, description="of a task whose process crashed")

    @model_validator(mode="after")
    def _one_modality(self) -> PrepareConfig:
        other = "video" if self.modality == "image" else "image"
        if getattr(self, other) is not None:
            raise ValueError(f"the block {other} does not belong to a dataset of modality {self.modality}")
        for block in self.filters:
            if self.modality not in block.modalities:
                raise ValueError(
                    f"filter {block.kind} does not belong to a dataset of modality {self.modality}"
                )
            least = block.min if isinstance(block, DurationFilter | FramesFilter) else None
            most = self.clip.clip_s if isinstance(block, DurationFilter) else self.clip.max_frames
            if least is not None and least > most:
                raise ValueError(
                    f"filter {block.kind} asks for longer clips than video.clip_s / max_frames lets pass"
                )
        if sum(isinstance(block, ScoreFilter) for block in self.filters) > 1:
            raise ValueError("filters: one score only (it is a column of the index)")
        corpus = [corpus_cause(block) for block in self.corpus_filters]
        if len(set(corpus)) < len(corpus):
            raise ValueError("filters: the same kind of duplicates twice")
        return self

    @property
    def corpus_filters(self) -> list[DuplicatesFilter | NearDuplicatesFilter]:
        """The filters that compare a sample with all others, in order."""
        return [b for b in self.filters if isinstance(b, DuplicatesFilter | NearDuplicatesFilter)]

    @property
    def score_filter(self) -> ScoreFilter | None:
        """The filter by image-text score, if there is one."""
        return next((block for block in self.filters if isinstance(block, ScoreFilter)), None)

    @property
    def picture(self) -> ImageConfig:
        """How images are stored (the defaults where nothing is said)."""
        return self.image or ImageConfig()

    @property
    def clip(self) -> VideoConfig:
        """How clips are stored (the defaults where nothing is said)."""
        return self.video or VideoConfig()

    @property
    def input_modality(self) -> Modality:
        """What the source holds: videos, where images are taken from them."""
        return "video" if self.modality == "image" and self.picture.frames is not None else self.modality

    @property
    def gives_parts(self) -> bool:
        """Whether an input may give several samples (clips or frames of one video)."""
        return self.clip.clips == "all" if self.modality == "video" else self.input_modality == "video"

    @property
    def decode_timeout(self) -> float:
        """CPU seconds for one header, image, frame or clip."""
        default = 30.0 if self.input_modality == "image" else 600.0
        return default if self.decode_timeout_s is None else self.decode_timeout_s

    def identity(self) -> dict[str, Any]:
        """The JSON value of all that decides what the dataset holds; the manifest records it."""
        aside = {
            "fetch",
            "bad_limit",
            "task_retries",
            "decode_timeout_s",
            "decode_memory_mb",
            "image",
            "video",
        }
        value = self.model_dump(mode="json", exclude=aside)
        encoding = self.picture if self.modality == "image" else self.clip
        value |= {self.modality: encoding.model_dump(mode="json"), "fetch": self.fetch.identity()}
        return value | {"format_version": FORMAT_VERSION}

    @property
    def digest(self) -> str:
        """sha256 (64 hex digits) of ``identity``."""
        return canonical_digest(self.identity())
