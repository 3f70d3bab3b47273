"""What evaluation sets are asked for. Equal requests give equal bytes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sharding.scenes.config import SceneRules, Split

Task = Literal["retrieval", "video", "vqa", "nlvr2", "classification", "alignment"]
TASKS: tuple[Task, ...] = ("retrieval", "video", "vqa", "nlvr2", "classification", "alignment")


class Request(BaseModel):
    """Sets of these tasks.

    Args:
        splits: how many images each split has in each task (videos; statements).
        rules: of the scenes; ``rules.split`` does not count.
        dissent: probability that an annotator of a VQA question says something else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objects: str
    splits: dict[Split, int]
    tasks: tuple[Task, ...] = TASKS
    rules: SceneRules = SceneRules()
    dissent: float = Field(default=0.05, ge=0, le=0.3)
