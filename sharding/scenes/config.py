"""What a user writes about scenes. Light to import, since the command line validates a job before it starts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "val", "test"]


class SceneRules(BaseModel):
    """What scenes are like. Scenes of equal rules and objects are equal, pixel by pixel.

    Two objects that ``val`` or ``test`` shows together are never shown together by another split, whatever its
    ``seed``: the pairs are drawn by ``split_seed`` and ``held_out`` alone, so those must agree between splits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, description="of everything that is drawn but the split")
    split: Split = Field(default="train", description="train, or the pairs held out for val or for test")
    split_seed: int = Field(default=0, description="which pairs are held out, and which objects are drawn")
    held_out: float = Field(
        default=0.15, gt=0, le=0.4, description="share of all pairs of objects for val, and the same for test"
    )
    vocabulary: int | None = Field(
        default=None, ge=4, description="so many of the table's objects, drawn by split_seed; default: all"
    )
    width: int = Field(default=224, ge=64, le=4096, multiple_of=2, description="pixels")
    height: int = Field(default=224, ge=64, le=4096, multiple_of=2, description="pixels")
    most_kinds: int = Field(default=3, ge=1, le=3, description="different objects in one scene, at most")
    most_alike: int = Field(default=5, ge=1, le=6, description="objects of one kind in one scene, at most")
    recolored: float = Field(default=0.3, ge=0, le=1, description="share of objects of one colour in another")
    frames: int = Field(default=16, ge=2, le=900, description="of a clip")
    fps: float = Field(default=8, gt=0, le=240, description="of a clip")

    @model_validator(mode="after")
    def _pairs_to_hold_out(self) -> SceneRules:
        if self.split != "train" and self.most_kinds == 1:
            raise ValueError(f"split {self.split} shows held-out pairs: most_kinds must be 2 or 3")
        return self
