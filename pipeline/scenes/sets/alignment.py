"""Alignment: images, a caption each, and the regions of its phrases, in two layouts of the same.

As ALIGN-BENCH is published: ``alignment/SPLIT/images/NAME.jpg``, ``alignment/SPLIT/pkls/NAME.pkl``, each a pickle of::

    {"caption": "A small cat to the left of two dogs on a blue background.",
     "annotation": {"A small cat": [{"bbox_mask": (x1, y1, x2, y2), "pixel_mask": uint8 [H, W]}],   # one an object
                    "two dogs": [{...}, {...}]}}

All of a split in one, ``alignment/SPLIT.pkl``, which says also where each phrase stands: a list of::

    {"image": "NAME.jpg", "caption": "...",
     "phrases": [{"phrase": "A small cat", "span": [0, 11],            # characters of the caption
                  "boxes": [[x1, y1, x2, y2]],                         # float pixels, one for each object
                  "mask": uint8 [H, W]}]}                              # 1 where any of them is

Pickles are of protocol 4 and hold builtins and NumPy arrays only.
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
        folder = f"alignment/{part.split}"
        for number in range(part.count):
            scene = part.scenes.scene(number)
            name = f"{part.split}_{number:06d}"
            caption = part.scenes.captions(scene)[0]
            sink.write_jpeg(f"{folder}/images/{name}.jpg", scene.image())
            sink.write(f"{folder}/pkls/{name}.pkl", pickle.dumps(_published(scene, caption), protocol=4))
            rows.append(
                {"image": f"{name}.jpg", "caption": caption.text, "phrases": _phrases(scene, caption)}
            )
            step()
        sink.write(f"{folder}.pkl", pickle.dumps(rows, protocol=4))


def _published(scene: Scene, caption: Caption) -> dict[str, Any]:
    annotation = {
        caption.text[phrase.start : phrase.end]: [
            {"bbox_mask": box, "pixel_mask": mask}
            for box, mask in zip(scene.boxes(phrase.group), scene.masks(phrase.group), strict=True)
        ]
        for phrase in caption.phrases
    }
    return {"caption": caption.text, "annotation": annotation}


def _phrases(scene: Scene, caption: Caption) -> list[dict[str, Any]]:
    return [
        {
            "phrase": caption.text[phrase.start : phrase.end],
            "span": [phrase.start, phrase.end],
            "boxes": [[float(side) for side in box] for box in scene.boxes(phrase.group)],
            "mask": scene.mask(phrase.group),
        }
        for phrase in caption.phrases
    ]
