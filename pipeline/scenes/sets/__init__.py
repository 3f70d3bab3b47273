"""One module a task: ``write(splits, sink, step)`` writes the task's folder in its official format.

``splits``: the scenes and how many of them, by split; ``step()`` is called after each image, video or statement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.scenes.request import Request, Task
from pipeline.scenes.sink import Sink
from sharding.errors import UserError
from sharding.scenes.captions import Caption
from sharding.scenes.config import Split
from sharding.scenes.generator import Scenes
from sharding.scenes.scene import Scene

# With so many numbers tried for each scene wanted, there are no more different ones.
_TRIES = 50


@dataclass(frozen=True)
class Part:
    """``count`` scenes of one split."""

    split: Split
    scenes: Scenes
    count: int


class Writer(Protocol):
    """What each module's ``write`` is."""

    def __call__(self, parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None: ...


def writer_of(task: Task) -> Writer:
    """The ``write`` of the task's module."""
    from pipeline.scenes.sets import alignment, classification, nlvr2, retrieval, video, vqa

    writers: dict[Task, Writer] = {
        "retrieval": retrieval.write,
        "video": video.write,
        "vqa": vqa.write,
        "nlvr2": nlvr2.write,
        "classification": classification.write,
        "alignment": alignment.write,
    }
    return writers[task]


def different(
    part: Part, make: Callable[[int], Scene], apart: Callable[[str], str] = str
) -> Iterator[tuple[Scene, list[Caption]]]:
    """The first ``part.count`` scenes of which no two have the same full caption, with their captions.

    Retrieval asks for the one image that a caption belongs to: it must not fit another as well.

    Args:
        apart: of a full caption what must differ.

    Raises:
        UserError: there are not as many.
    """
    seen: set[str] = set()
    for number in range(_TRIES * part.count):
        scene = make(number)
        found = part.scenes.captions(scene)
        text = apart(found[0].text)
        if text in seen:
            continue
        seen.add(text)
        yield scene, found
        if len(seen) == part.count:
            return
    raise UserError(
        f"only {len(seen)} of the {part.count} scenes of split {part.split} that were asked for are different: "
        "ask for fewer, or take more objects"
    )
