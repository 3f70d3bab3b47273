"""NLVR2: ``nlvr2/train.json``, ``dev.json``, ``test1.json`` (JSON lines), and the pairs of images in a folder each.

Each sentence stands with two pairs, one of which it is true of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.scenes.request import Request
from pipeline.scenes.sets import Part
from pipeline.scenes.sink import Sink
from sharding.scenes.config import Split
from sharding.scenes.generator import encode_png

_SPLITS: dict[Split, str] = {"train": "train", "val": "dev", "test": "test1"}


def write(parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None:
    """``count`` statements (of an odd count one more); half of the labels are True."""
    for part in parts:
        split = _SPLITS[part.split]
        rows: list[dict[str, Any]] = []
        for number in range((part.count + 1) // 2):
            statement = part.scenes.statement(number)
            for place, (pair, label) in enumerate(zip(statement.pairs, statement.labels, strict=True)):
                name = f"{split}-{number}-{place}"
                for side, scene in enumerate(pair):
                    sink.write(f"nlvr2/{split}/{name}-img{side}.png", encode_png(scene.image()))
                rows.append({"sentence": statement.text, "identifier": f"{name}-0", "label": str(label)})
                if len(rows) <= part.count:
                    step()
        sink.write_lines(f"nlvr2/{split}.json", rows)
