"""Alignment as ALIGN-BENCH has it: ``alignment/SPLIT.pkl`` and the images it names in ``alignment/images/``.

The pickle (protocol 4) holds builtins and NumPy arrays only: a list of::

    {"image": "test_000012.jpg",
     "caption": "A small cat to the left of two dogs on a blue background.",
     "phrases": [{"phrase": "A small cat", "span": [0, 11],          # characters of the caption
                  "boxes": [[x1, y1, x2, y2]],                       # float pixels, one for each object
                  "mask": uint8 [H, W]}]}                            # 1 where an object of the phrase is
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from pipeline.scenes.request import Request
from pipeline.scenes.sets import Part
from pipeline.scenes.sink import Sink
from sharding.scenes.captions import Caption
from sharding.scenes.scene import Scene


def write(parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None:
    """The fullest caption of each scene. The pickle of a split is built in memory: a mask a phrase."""
    for part in parts:
        rows = []
        for number in range(part.count):
            scene = part.scenes.scene(number)
            name = f"{part.split}_{number:06d}.jpg"
            sink.write_jpeg(f"alignment/images/{name}", scene.image())
            rows.append(_row(name, scene, part.scenes.captions(scene)[0]))
            step()
        sink.write(f"alignment/{part.split}.pkl", pickle.dumps(rows, protocol=4))


def _row(name: str, scene: Scene, caption: Caption) -> dict[str, Any]:
    return {
        "image": name,
        "caption": caption.text,
        "phrases": [
            {
                "phrase": caption.text[phrase.start : phrase.end],
                "span": [phrase.start, phrase.end],
                "boxes": [[float(side) for side in box] for box in scene.boxes(phrase.group)],
                "mask": scene.mask(phrase.group),
            }
            for phrase in caption.phrases
        ],
    }
