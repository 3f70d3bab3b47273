"""Curves over training steps as SVG: a line and a marker of its own for each series, its interval as a band.

Nothing is told by colour alone, and every point says its numbers when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.evaluation.report.numbers import Interval, bounds, number
from sharding.html_page import shown_text

_WIDTH, _HEIGHT = 380, 216  # units of the drawing, about a pixel each
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 10, 36
_COLOURS = ("#1d4ed8", "#b45309", "#047857", "#7e22ce", "#be123c", "#0e7490")
_GREY = "#6b7280"
_MARKERS = 40  # of one line; where there are more points, the line is drawn through all of them
_TICKS = 5


@dataclass(frozen=True)
class Point:
    """A value at a step, with its interval where there is one."""

    step: int
    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """A line: ``points`` by step, and a dashed one at the ``baseline``."""

    label: str
    points: Sequence[Point]
    baseline: float | None = None


def chart(title: str, series: Sequence[Series], *, percent: bool, baseline: str) -> str:
    """One chart with its legend; nothing where there is no point.

    Args:
        title: what the lines have in common; may be empty.
        percent: whether values are shares, shown as percentages.
        baseline: what the dashed lines are.
    """
    series = [_finite(one) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return ""
    frame = _Frame(series, percent)
    drawn = [*frame.grid(), *_baselines(series, frame)]
    for place, one in enumerate(series):
        drawn += _band(one, _colour(place), frame)
    for place, one in enumerate(series):
        drawn += _line(one, place, frame)
    legend = "".join(_entry(one, place, percent, baseline) for place, one in enumerate(series))
    head = f"<h4>{shown_text(title)}</h4>" if title else ""
    spoken = "; ".join(f"{one.label} {number(one.points[-1].value, percent=percent)}" for one in series)
    label = shown_text(f"{title} over steps, last: {spoken}".strip(), 400)
    return (
        f"<div class='chart'>{head}<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{label}'>"
        f"{''.join(drawn)}</svg><ul class='legend'>{legend}</ul></div>"
    )


class _Frame:
    """Where steps and values lie in the drawing."""

    def __init__(self, series: Sequence[Series], percent: bool) -> None:
        self.percent = percent
        self._last = max(point.step for one in series for point in one.points)
        self._steps = _ticks(0, max(1, self._last))
        self._steps = [step for step in self._steps if step == int(step) and step <= self._last]
        low, high = _extent(series)
        self._values = _ticks(low, min(high, 1.0) if percent else high)
        self._low, self._high = self._values[0], self._values[-1]

    def x(self, step: float) -> float:
        """Of a step."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(1, self._last)

    def y(self, value: float) -> float:
        """Of a value; one outside the frame lies on its edge."""
        share = (min(max(value, self._low), self._high) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share

    def grid(self) -> Iterator[str]:
        """Lines and labels of both axes."""
        decimals = _decimals(self._values, 100 if self.percent else 1)
        for value in self._values:
            y = f"{self.y(value):.1f}"
            shown = f"{value * (100 if self.percent else 1):.{decimals}f}{' %' if self.percent else ''}"
            yield f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y}' y2='{y}'/>"
            yield f"<text x='{_LEFT - 6}' y='{float(y) + 4:.1f}' text-anchor='end'>{shown}</text>"
        for step in self._steps:
            x = self.x(step)
            anchor = "end" if x > _WIDTH - _RIGHT - 12 else "middle"
            yield f"<text x='{x:.1f}' y='{_HEIGHT - _BOTTOM + 15}' text-anchor='{anchor}'>{step:,.0f}</text>"
        yield f"<text x='{_WIDTH - _RIGHT}' y='{_HEIGHT - 4}' text-anchor='end'>step</text>"


def _finite(one: Series) -> Series:
    points = [point for point in one.points if math.isfinite(point.value)]
    return Series(one.label, sorted(points, key=lambda point: point.step), one.baseline)


def _extent(series: Sequence[Series]) -> tuple[float, float]:
    """From zero, unless all values lie far above it."""
    values = [one.baseline for one in series if one.baseline is not None]
    for one in series:
        for point in one.points:
            values += [point.value, *(bound for bound in point.interval or () if math.isfinite(bound))]
    low, high = min(values), max(values)
    if high <= low:
        return min(low, 0.0), max(high, 0.0) or 0.1
    far = low > 0.5 * high
    return (low if far or low < 0 else 0.0), high


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose both, about :data:`_TICKS` of them."""
    raw = (high - low) / (_TICKS - 1)
    power = 10 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(place * size, 12) for place in range(first, last + 1)]


def _decimals(values: Sequence[float], factor: int) -> int:
    """The fewest digits behind the point that tell the values apart exactly."""
    return next(
        (n for n in range(6) if all(abs(v * factor - round(v * factor, n)) < 1e-9 for v in values)), 6
    )


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _baselines(series: Sequence[Series], frame: _Frame) -> Iterator[str]:
    """A dashed line for each value, grey where all series share it."""
    known = {one.baseline for one in series}
    for place, one in enumerate(series):
        if one.baseline is None or one.baseline in {before.baseline for before in series[:place]}:
            continue
        colour = _GREY if len(known) == 1 else _colour(place)
        y = f"{frame.y(one.baseline):.1f}"
        yield (
            f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y}' y2='{y}' stroke='{colour}' "
            "stroke-width='1.3' stroke-dasharray='6 5'/>"
        )


def _band(one: Series, colour: str, frame: _Frame) -> Iterator[str]:
    """The intervals: a band between neighbours, a bar where a point has none."""
    known = [
        (frame.x(point.step), *(frame.y(bound) for bound in point.interval))
        for point in one.points
        if point.interval is not None and all(math.isfinite(bound) for bound in point.interval)
    ]
    if len(known) == 1:
        x, low, high = known[0]
        yield f"<path d='M{x:.1f} {low:.1f}V{high:.1f}' stroke='{colour}' stroke-width='5' opacity='.25'/>"
    elif known:
        outline = [f"{x:.1f} {high:.1f}" for x, _, high in known]
        outline += [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(known)]
        yield f"<path d='M{'L'.join(outline)}Z' fill='{colour}' opacity='.13'/>"


def _line(one: Series, place: int, frame: _Frame) -> Iterator[str]:
    colour = _colour(place)
    where = [(frame.x(point.step), frame.y(point.value)) for point in one.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
    yield f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
    every = math.ceil(len(where) / _MARKERS)
    for n, (point, (x, y)) in enumerate(zip(one.points, where, strict=True)):
        if (len(where) - 1 - n) % every == 0:  # the last always
            shown = _said(point, percent=frame.percent)
            note = shown_text(f"{one.label}, step {point.step:,}: {shown}")
            yield f"{_marker(place, x, y, colour)[:-2]}><title>{note}</title></path>"


def _marker(place: int, x: float, y: float, colour: str) -> str:
    """A small shape: disc, square, triangle, diamond."""
    shape = (
        f"M{x - 3.2:.1f} {y:.1f}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4.2:.1f}l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    )[place % 4]
    return f"<path d='{shape}' fill='{colour}'/>"


def _said(point: Point, *, percent: bool) -> str:
    unit = " %" if percent else ""
    return f"{number(point.value, percent=percent)}{unit} {bounds(point.interval, percent=percent)}".strip()


def _entry(one: Series, place: int, percent: bool, baseline: str) -> str:
    last = one.points[-1]
    colour = _colour(place)
    dashed = "" if one.baseline is None else f"<i>{baseline} {number(one.baseline, percent=percent)}</i>"
    return (
        "<li><svg viewBox='0 0 26 10' aria-hidden='true'>"
        f"<path d='M0 5H26' stroke='{colour}' stroke-width='2'/>{_marker(place, 13, 5, colour)}</svg>"
        f"<span>{shown_text(one.label)}</span> <b>{number(last.value, percent=percent)}</b> "
        f"<i>{bounds(last.interval, percent=percent)}</i> {dashed}</li>"
    )
