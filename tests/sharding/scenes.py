"""Opening scenes of the bundled cut-outs, for the tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sharding.scenes.config import SceneRules
from sharding.scenes.generator import Scenes, open_scenes
from sharding.storage import open_storage
from tests.fixtures.corpora import CORPUS

OBJECTS = CORPUS / "objects.jsonl"


def bundled(**rules: Any) -> Scenes:
    """Scenes of 40 of the bundled objects, where ``rules`` ask for no other number."""
    given = SceneRules.model_validate({"vocabulary": 40, **rules})
    return open_scenes(given, OBJECTS.as_uri(), open_storage(CORPUS))


def write_objects(folder: Path, count: int = 12) -> Path:
    """A table of flat coloured squares, called "thing a", "thing b"... with different last words; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        pixels = np.zeros((40, 40, 4), np.uint8)
        pixels[4:36, 4:36] = (20 * number % 256, 90, 200, 255)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"path": f"{number}.png", "name": f"thing {'abcdefghijklmnopqrstuvwxyz'[number]}"})
    table = folder / "objects.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table
