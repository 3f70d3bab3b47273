"""Image-text retrieval as Karpathy's splits of COCO and Flickr30k: ``retrieval/dataset_scenes.json``, ``images/``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pipeline.scenes.request import Request
from pipeline.scenes.sets import Part, different
from pipeline.scenes.sink import Sink

_WORD = re.compile(r"[a-z0-9'’ñ-]+")


def write(parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None:
    """Five captions an image, the first of which is the fullest; ``split`` is train, val or test."""
    images: list[dict[str, Any]] = []
    sentences = 0
    for part in parts:
        for scene, captions in different(part, part.scenes.scene):
            name = f"{part.split}_{scene.number:06d}.jpg"
            sink.write_jpeg(f"retrieval/images/{name}", scene.image())
            numbers = list(range(sentences, sentences + len(captions)))
            sentences += len(captions)
            images.append(
                {
                    "sentids": numbers,
                    "imgid": len(images),
                    "sentences": [
                        {
                            "tokens": _WORD.findall(caption.text.lower()),
                            "raw": caption.text,
                            "imgid": len(images),
                            "sentid": number,
                        }
                        for number, caption in zip(numbers, captions, strict=True)
                    ],
                    "split": part.split,
                    "filename": name,
                }
            )
            step()
    sink.write_json("retrieval/dataset_scenes.json", {"images": images, "dataset": "scenes"})
