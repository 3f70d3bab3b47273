"""What a user writes about how media are stored: the ``image`` and ``video`` blocks of a dataset.

Light to import (no PIL, no PyAV), since the command line validates a job before it starts anything.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FramesConfig(_Block):
    """Images taken from videos: one from the middle of each of N equal stretches of a video.

    N is the largest number for which a stretch lasts at least ``every_s``, from 1 to ``max``::

        every_s: 2, max: 16     7 s -> N = 3, frames at 1.17, 3.5 and 5.83 s;  2 min -> N = 16, every 7.5 s
    """

    every_s: float = Field(default=2.0, gt=0, description="seconds between two frames, at least")
    max: int = Field(default=16, ge=1, le=10_000, description="frames of one video")


class ImageConfig(_Block):
    """How images are stored. 8-bit sRGB, upright, first frame of an animation; no metadata.

    ``format: keep``: JPEG, PNG and WebP files that need no change (no resizing, orientation, alpha work or
    conversion to sRGB) are stored byte for byte, *with* their metadata, after every pixel was decoded once; those
    that need one are encoded again in their own format. Other formats become WebP.
    """

    resize: int | None = Field(
        default=None, ge=1, description="shorter side in pixels, never enlarged; null: as it is"
    )
    format: Literal["webp", "jpg", "png", "keep"] = "webp"
    quality: int = Field(default=85, ge=1, le=100, description="of JPEG and WebP")
    subsampling: Literal["auto", 420, 444] = Field(
        default="auto",
        description="chroma of JPEG; auto: 420 (a quarter of the chroma) below quality 90, 444 from there on",
    )
    alpha: str = Field(
        default="white",
        pattern=r"^(white|keep|#[0-9a-fA-F]{6})$",
        description='white or "#rrggbb": composited on that colour; keep: stored, where there is any',
    )
    frames: FramesConfig | None = Field(
        default=None, description="the source holds videos, of which frames are taken; each is a sample"
    )
    max_pixels: int = Field(default=89_478_485, ge=1, description="larger images are dropped undecoded")

    @model_validator(mode="after")
    def _formats(self) -> ImageConfig:
        if self.alpha == "keep" and self.format == "jpg":
            raise ValueError("alpha: keep needs format webp or png, since jpg has no alpha")
        if self.frames is not None and self.format == "keep":
            raise ValueError("format: keep needs images; frames of videos are stored as webp, jpg or png")
        return self

    @property
    def chroma(self) -> Literal["420", "444"]:
        """How JPEG stores colour: 4:2:0 or 4:4:4."""
        if self.subsampling == "auto":
            return "420" if self.quality < 90 else "444"
        return "420" if self.subsampling == 420 else "444"


class VideoConfig(_Block):
    """How clips are stored: H.264 in mp4, no sound, upright, square pixels.

    A video is cut, from its beginning, into clips of ``clip_s``, or of ``max_frames`` where that is shorter.
    ``clips: first`` stores the first of them, ``all`` each, up to ``max_clips``; of what is left at the end a clip
    is made if it lasts at least ``min_clip_s``, or if there is no other.
    """

    resize: int | None = Field(default=None, ge=2, description="shorter side in pixels; never enlarged")
    fps: float | None = Field(default=None, gt=0, le=240, description="at most; default: as it is")
    clip_s: float = Field(default=60, gt=0, description="length of a clip in seconds, at most")
    max_frames: int = Field(default=900, ge=1, description="of a clip")
    clips: Literal["first", "all"] = Field(default="first", description="which clips of a video are stored")
    min_clip_s: float = Field(
        default=1.0, ge=0, description="a shorter rest of a video is left out (clips: all)"
    )
    max_clips: int = Field(default=60, ge=1, le=10_000, description="of one video")
    keyframe_interval: int = Field(default=8, ge=1, description="frames; short makes random access cheap")
    crf: int = Field(default=23, ge=0, le=51, description="x264's quality: 18 is fine, 28 is coarse")
    max_mb: float = Field(default=32, gt=0, description="larger stored clips are dropped")
    max_pixels: int = Field(
        default=89_478_485, ge=4, description="of one frame; larger are dropped undecoded"
    )

    @property
    def max_bytes(self) -> int:
        """Of a stored clip."""
        return int(self.max_mb * 2**20)
