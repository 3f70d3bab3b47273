"""Numbers as people read them."""

from __future__ import annotations

import math

Interval = tuple[float, float]


def number(value: float | None, *, percent: bool) -> str:
    """``61.2`` of a share as a percentage, else ``0.6120``; a dash for what is not there."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{100 * value:.1f}" if percent else plain(value)


def plain(value: float) -> str:
    """Whole numbers as such, others with four digits behind the point, or four that count."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and (abs(value) >= 2 or value == 0):
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def bounds(interval: Interval | None, *, percent: bool) -> str:
    """``[58.1, 64.0]``; nothing where there is none."""
    if interval is None:
        return ""
    low, high = (number(bound, percent=percent) for bound in interval)
    return f"[{low}, {high}]"


def half_width(interval: Interval | None, *, percent: bool) -> str:
    """``±3.0``: half of the interval, which need not lie evenly around the value; nothing where there is none."""
    if interval is None:
        return ""
    half = (interval[1] - interval[0]) / 2
    return f"±{100 * half:.1f}" if percent else f"±{half:.4f}" if math.isfinite(half) else f"±{half}"
