"""Attention maps laid over a picture: a panel for the picture, one for the whole caption and one for each word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from model import WordMaps
from pipeline.alignment.lettering import fitted, wrapped

#: Every sixteenth colour of matplotlib's viridis (CC0): equal steps of a value look equally large.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141)),
        *((44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115)),
        *((94, 201, 98), (132, 212, 75), (173, 220, 48), (216, 226, 25), (253, 231, 37)),
    ],
    dtype=np.float64,
)
_SHARE = 0.6  # of the colour in an overlay; the rest is the picture in grey
_DARKEST, _CONTRAST = 15.0, 0.68  # of that grey: a white background would wash the colours out

_PANEL, _GAP, _MARGIN = 200, 18, 28  # pixels, as all lengths here
_TITLE_SIZE, _WORD_SIZE, _NOTE_SIZE, _LEAST = 22, 19, 13, 11
_HEAD = 48  # a panel's word and note
_LINE, _NOTE_LINE = 30, 20
_PAPER, _INK, _GREY, _FRAME = "#ffffff", "#1f2933", "#6b7280", "#d97706"
_SHAPE = 1.5  # width by height that the grid comes close to
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class _Panel:
    """``frames`` below each other, each _PANEL x _PANEL."""

    word: str
    note: str
    ink: str
    frames: Sequence[Image.Image]


def draw_alignment(frames: np.ndarray, maps: WordMaps, caption: str) -> Image.Image:
    """The picture, RGB, of ``maps`` over ``frames`` uint8 [F, height, width, 3]; a clip's frames in rows.

    Each panel's colours reach from the lowest to the highest attention within it.
    """
    panels = [_original(frames), *_overlays(frames, maps)]
    columns = _columns(len(panels), len(frames))
    width = 2 * _MARGIN + columns * (_PANEL + _GAP) - _GAP
    title = wrapped(f"“{caption.strip()}”", width - 2 * _MARGIN, _TITLE_SIZE, lines=3)
    notes = _notes(maps)
    top = _MARGIN + len(title) * _LINE + _GAP
    height_of_row = _HEAD + len(frames) * (_PANEL + 2) - 2 + _GAP
    rows = math.ceil(len(panels) / columns)
    bottom = top + rows * height_of_row
    canvas = Image.new("RGB", (width, bottom + _LINE + len(notes) * _NOTE_LINE + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(title):
        line.draw(pen, _MARGIN, _MARGIN + number * _LINE + 22, _INK)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        _place(canvas, panel, _MARGIN + column * (_PANEL + _GAP), top + row * height_of_row)
    _legend(canvas, _MARGIN, bottom)
    for number, note in enumerate(notes):
        line = fitted(note, width - 2 * _MARGIN, _NOTE_SIZE, _NOTE_SIZE)
        line.draw(pen, _MARGIN, bottom + _LINE + number * _NOTE_LINE + 14, _GREY)
    return canvas


def draw_region(picture: np.ndarray, values: np.ndarray, region: np.ndarray) -> Image.Image:
    """One map over one picture with the outline of a region.

    Args:
        picture: uint8 [S, S, 3], what the model sees.
        values: [gh, gw], attention.
        region: bool [height, width] over the whole of the picture; the drawing has its shape.
    """
    height, width = region.shape
    drawn = _overlay(_greyed(picture), _stretched(values))
    scale = _PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawn = drawn.resize(size, Image.Resampling.LANCZOS)
    inside = Image.fromarray(region).convert("L").resize(size, Image.Resampling.NEAREST)
    inner = inside.filter(ImageFilter.MinFilter(3))
    outline = Image.fromarray((np.asarray(inside) > 0) & (np.asarray(inner) == 0))
    drawn.paste(_FRAME, mask=outline)
    return drawn


def _stretched(values: np.ndarray) -> np.ndarray:
    """From the lowest value at 0 to the highest at 1."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _columns(panels: int, frames: int) -> int:
    def shape(columns: int) -> float:
        rows = math.ceil(panels / columns)
        return columns * (_PANEL + _GAP) / (rows * (_HEAD + frames * _PANEL + _GAP))

    choices = range(min(3, panels), min(panels, _MOST_COLUMNS) + 1)
    return min(choices, key=lambda columns: abs(math.log(shape(columns) / _SHAPE)))


def _original(frames: np.ndarray) -> _Panel:
    """The whole picture, what the model sees of it framed where that is not all."""
    height, width = frames.shape[1:3]
    scale = _PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    corner = ((_PANEL - size[0]) // 2, (_PANEL - size[1]) // 2)
    shown = []
    for frame in frames:
        panel = Image.new("RGB", (_PANEL, _PANEL), "#f3f4f6")
        panel.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), corner)
        if size[0] != size[1]:
            side = min(size)
            left, top = (_PANEL - side) // 2, (_PANEL - side) // 2
            ImageDraw.Draw(panel).rectangle(
                (left, top, left + side - 1, top + side - 1), outline=_FRAME, width=2
            )
        shown.append(panel)
    note = "framed: what the model sees" if size[0] != size[1] else ""
    return _Panel("picture" if len(frames) == 1 else f"{len(frames)} frames", note, _GREY, shown)


def _overlays(frames: np.ndarray, maps: WordMaps) -> list[_Panel]:
    seen = [_greyed(frame) for frame in frames]
    grid = maps.global_map.shape[-2:]
    values = [("whole caption", _GREY, maps.global_map)]
    values += [(word, _INK, one) for word, one in zip(maps.words, maps.maps, strict=True)]
    panels = []
    for word, ink, tensor in values:
        one = tensor.double().numpy().reshape(len(frames), *grid)
        mean, high = one.mean(), one.max()
        note = f"peak {high / mean:.1f} x mean" if mean > 0 else "no attention"
        drawn = [_overlay(grey, values) for grey, values in zip(seen, _stretched(one), strict=True)]
        panels.append(_Panel(word, note, ink, drawn))
    return panels


def _greyed(frame: np.ndarray) -> np.ndarray:
    """What the model sees of a frame, in grey and in few contrasts: [_PANEL, _PANEL, 1] within 0..255."""
    height, width = frame.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    crop = Image.fromarray(frame[top : top + side, left : left + side]).convert("L")
    grey = np.asarray(crop.resize((_PANEL, _PANEL), Image.Resampling.LANCZOS), dtype=np.float64)
    return (_DARKEST + _CONTRAST * grey)[:, :, None]


def _overlay(grey: np.ndarray, values: np.ndarray) -> Image.Image:
    """``values`` [gh, gw] within 0..1, smoothed between the patches' centres, in colour over ``grey``."""
    fine = Image.fromarray(values.astype(np.float32)).resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    colour = colours(np.asarray(fine, dtype=np.float64).clip(0, 1))
    mixed = _SHARE * colour + (1 - _SHARE) * grey
    return Image.fromarray(mixed.round().astype(np.uint8))


def colours(values: np.ndarray) -> np.ndarray:
    """Viridis of values within 0..1: [..., 3] within 0..255."""
    places = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(values, places, channel) for channel in _VIRIDIS.T], axis=-1)


def _place(canvas: Image.Image, panel: _Panel, left: int, top: int) -> None:
    pen = ImageDraw.Draw(canvas)
    fitted(panel.word, _PANEL, _WORD_SIZE, _LEAST).draw(pen, left, top + 22, panel.ink)
    fitted(panel.note, _PANEL, _NOTE_SIZE, _NOTE_SIZE).draw(pen, left, top + 40, _GREY)
    for number, frame in enumerate(panel.frames):
        canvas.paste(frame, (left, top + _HEAD + number * (_PANEL + 2)))


def _legend(canvas: Image.Image, left: int, top: int) -> None:
    bar = np.broadcast_to(colours(np.linspace(0, 1, _PANEL // 2)), (12, _PANEL // 2, 3))
    canvas.paste(Image.fromarray(bar.round().astype(np.uint8)), (left, top + 4))
    room = canvas.width - 2 * _MARGIN - _PANEL // 2 - 10
    line = fitted("lowest to highest attention of each panel", room, _NOTE_SIZE, _LEAST)
    line.draw(ImageDraw.Draw(canvas), left + _PANEL // 2 + 10, top + 14, _GREY)


def _notes(maps: WordMaps) -> list[str]:
    rows, columns = maps.global_map.shape[-2:]
    notes = [f"last fusion layer, words onto {rows} x {columns} patches, maximum over heads"]
    if maps.unread:
        notes.append(f"not read, the caption is too long: {maps.unread}")
    return notes
