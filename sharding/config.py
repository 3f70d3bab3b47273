"""What a user writes about one dataset: the pydantic models of the YAML's ``datasets`` blocks.

Light to import (no Arrow, no Ray), since the command line validates a job before it starts anything.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
from sharding.storage import normalise_url

# Raised when the way samples are made changes, so that shards of two versions of this program never mix.
FORMAT_VERSION = 2

Scalar = str | int | float | bool


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Located(_Block):
    path: str = Field(
        description="folder, file, file:// or s3:// url; a relative path is that of the command"
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return normalise_url(path)


class FolderSource(_Located):
    """A folder (or S3 prefix) of media, each with its captions in a file of the same name beside it.

    ``.txt``: one caption a line. ``.json``: ``{"caption": text}`` or ``{"captions": [texts]}``.
    """

    kind: Literal["folder"]
    captions: Literal[".txt", ".json"] = ".txt"


class TableSource(_Located):
    """A table, or a folder of tables of one kind: ``.jsonl``, ``.parquet`` or ``.csv``; a row is a sample.

    ``path_column`` holds paths relative to the table's folder, absolute paths or urls; ``url_column`` only
    urls (s3://, http://, https://). A caption cell is a text or a list of texts.
    """

    kind: Literal["table"]
    path_column: str | None = None
    url_column: str | None = None
    caption_column: str | list[str]
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="column: value, or list of values; rows with others are left out"
    )

    @property
    def media_column(self) -> str:
        return self.path_column or self.url_column or ""

    @property
    def caption_columns(self) -> list[str]:
        return [self.caption_column] if isinstance(self.caption_column, str) else self.caption_column

    @model_validator(mode="after")
    def _one_address(self) -> TableSource:
        if (self.path_column is None) == (self.url_column is None):
            raise ValueError("give either path_column or url_column")
        if not self.caption_columns:
            raise ValueError("caption_column names no column")
        return self


SourceConfig = Annotated[FolderSource | TableSource, Field(discriminator="kind")]


class ImageConfig(_Block):
    """How images are stored."""

    resize: int | None = Field(default=None, ge=1, description="shorter side in pixels; never enlarged")
    format: Literal["webp", "jpg", "png"] = "webp"
    quality: int = Field(default=85, ge=1, le=100)
    alpha: Literal["white", "keep"] = "white"
    max_pixels: int = Field(default=89_478_485, ge=1, description="larger images are dropped undecoded")

    @model_validator(mode="after")
    def _alpha_format(self) -> ImageConfig:
        if self.alpha == "keep" and self.format == "jpg":
            raise ValueError("alpha: keep needs format webp or png, since jpg has no alpha")
        return self


class VideoConfig(_Block):
    """How clips are stored: H.264 in mp4. Longer clips are cut to their beginning."""

    resize: int | None = Field(default=None, ge=2, description="shorter side in pixels; never enlarged")
    fps: float | None = Field(default=None, gt=0, le=240, description="at most; default: as it is")
    max_frames: int = Field(default=900, ge=1)
    max_duration_s: float = Field(default=60, gt=0)
    keyframe_interval: int = Field(default=8, ge=1, description="frames; short makes random access cheap")
    crf: int = Field(default=23, ge=0, le=51, description="x264's quality: 18 is fine, 28 is coarse")
    max_mb: float = Field(default=32, gt=0, description="larger stored clips are dropped")
    max_pixels: int = Field(
        default=89_478_485, ge=4, description="of one frame; larger are dropped undecoded"
    )


class FetchConfig(_Block):
    """How media are read. Does not change the dataset, so it is not part of its digest."""

    threads: int = Field(default=8, ge=1, le=256, description="reads at once in one task")
    timeout_s: float = Field(
        default=20, gt=0, description="http(s): longest silence, and a third of the whole"
    )
    attempts: int = Field(default=2, ge=1, description="http(s): tries of one address")


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
            most = self.clip.max_duration_s if isinstance(block, DurationFilter) else self.clip.max_frames
            if least is not None and least > most:
                raise ValueError(
                    f"filter {block.kind} asks for longer clips than video.max_duration_s / max_frames lets pass"
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

    def identity(self) -> dict[str, Any]:
        """The JSON value of all that decides what the dataset holds; the manifest records it."""
        value = self.model_dump(mode="json", exclude={"fetch", "bad_limit", "task_retries", "image", "video"})
        encoding = self.picture if self.modality == "image" else self.clip
        return value | {self.modality: encoding.model_dump(mode="json"), "format_version": FORMAT_VERSION}

    @property
    def digest(self) -> str:
        """sha256 (64 hex digits) of ``identity``."""
        return canonical_digest(self.identity())
