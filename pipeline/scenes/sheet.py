"""A picture of a few scenes for people: images with regions, captions and questions, a clip, a statement.

python -m pipeline.scenes.sheet docs/scenes.png [--objects URL] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.scenes.command import BUNDLED
from sharding.errors import UserError
from sharding.scenes.config import SceneRules
from sharding.scenes.generator import Scenes, open_scenes
from sharding.scenes.scene import Scene
from sharding.storage import normalise_url, open_storage

_SIDE, _GAP, _COLUMNS, _ROWS = 168, 14, 5, 2
_LINE, _LINES = 14, 9
_MARKS = ((230, 30, 30), (30, 70, 230), (20, 140, 40))
_INK, _FAINT = (20, 20, 20), (110, 110, 110)


class _Sheet:
    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(12)

    def picture(self, pixels: np.ndarray, x: int, y: int) -> None:
        self.image.paste(Image.fromarray(pixels), (x, y))

    def text(self, text: str, x: int, y: int, width: int, color: tuple[int, int, int] = _INK) -> int:
        """Writes lines of at most ``width`` pixels; returns the y below."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if self._draw.textlength(longer, self._font) > width:
                self._draw.text((x, y), line, color, self._font)
                line, y = word, y + _LINE
            else:
                line = longer
        self._draw.text((x, y), line, color, self._font)
        return y + _LINE

    def regions(self, scene: Scene, x: int, y: int) -> None:
        """Boxes and the rims of masks over a picture that stands at (x, y)."""
        for group in range(len(scene.groups)):
            mask = scene.mask(group).astype(bool)
            inner = mask.copy()
            for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                inner &= np.roll(mask, step, axis)
            rows, columns = np.nonzero(mask & ~inner)
            for row, column in zip(rows, columns, strict=True):
                self.image.putpixel((x + int(column), y + int(row)), _MARKS[group])
            for x1, y1, x2, y2 in scene.boxes(group):
                self._draw.rectangle((x + x1, y + y1, x + x2 - 1, y + y2 - 1), outline=_MARKS[group])


def contact_sheet(scenes: Scenes, first: int = 0) -> Image.Image:
    """Images of two rows, two clips, and two statements with their pairs, from scene ``first`` on."""
    cell = _SIDE + _GAP
    below = _LINES * _LINE + _GAP
    width = _COLUMNS * cell + _GAP
    sheet = _Sheet(width, _ROWS * (_SIDE + below) + 2 * (_SIDE + 3 * _LINE + _GAP) + 2 * _GAP)
    y = _GAP
    for row in range(_ROWS):
        for column in range(_COLUMNS):
            x, scene = _GAP + column * cell, scenes.scene(first + row * _COLUMNS + column)
            sheet.picture(scene.image(), x, y)
            sheet.regions(scene, x, y)
            at = sheet.text(scenes.captions(scene)[0].text, x, y + _SIDE + 2, _SIDE)
            for question in scenes.questions(scene)[:2]:
                at = sheet.text(f"{question.text} {question.answer}", x, at + 2, _SIDE, _FAINT)
        y += _SIDE + below
    clip = scenes.clip(first)
    for column in range(_COLUMNS):
        frame = round(column * (clip.frames - 1) / (_COLUMNS - 1))
        sheet.picture(clip.image(frame), _GAP + column * cell, y)
    sheet.text(f"A clip: {scenes.captions(clip)[0].text}", _GAP, y + _SIDE + 2, width)
    y += _SIDE + 2 * _LINE + _GAP
    statement = scenes.statement(first)
    for place, (pair, label) in enumerate(zip(statement.pairs, statement.labels, strict=True)):
        for side, scene in enumerate(pair):
            sheet.picture(scene.image(), _GAP + (2 * place + side) * cell, y)
        sheet.text(f"{statement.text} {label}", _GAP + 2 * place * cell, y + _SIDE + 2, 2 * cell - _GAP)
    return sheet.image


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.scenes.sheet", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument(
        "--objects", default=str(BUNDLED), help="table of cut-outs (default: the bundled emoji)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first scene")
    chosen = parser.parse_args()
    rules = SceneRules(width=_SIDE, height=_SIDE, seed=chosen.seed)
    try:
        scenes = open_scenes(rules, normalise_url(chosen.objects), open_storage("."))
        # Few colours are enough for a look, and make a small file.
        contact_sheet(scenes, chosen.first).quantize(200).save(chosen.out, optimize=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
