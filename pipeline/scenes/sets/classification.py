"""Zero-shot classification: ``classification/SPLIT/fire_truck/000003.jpg``, a folder for each class."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.scenes.request import Request
from pipeline.scenes.sets import Part
from pipeline.scenes.sink import Sink
from sharding.errors import UserError

# What would make a path of a class's name, or a hidden folder.
_ODD = str.maketrans({" ": "_", "/": "_", "\\": "_", "\0": "_"})


def write(parts: list[Part], sink: Sink, request: Request, step: Callable[[], None]) -> None:
    """One object in each image, all classes in turn; the class's name is the folder's, with _ for blanks."""
    for part in parts:
        kinds = part.scenes.vocabulary.kinds
        if part.count < len(kinds):
            kinds = kinds[: part.count]
        if len(kinds) < 2:
            raise UserError("classification needs two images at least: ask for more, or leave the task out")
        for number in range(part.count):
            turn, place = divmod(number, len(kinds))
            scene = part.scenes.portrait(kinds[place], turn)
            folder = scene.kinds[0].name.translate(_ODD).lstrip(".")
            sink.write_jpeg(f"classification/{part.split}/{folder}/{turn:06d}.jpg", scene.image())
            step()
