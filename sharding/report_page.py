"""The closing report of a preparation: one HTML page beside the manifest, for a browser and nothing else.

It needs no script and no other file, and says nothing that differs between two runs (no times), so that it is the
same bytes whenever and however often a run was killed. All text of the corpus is escaped; the page forbids itself
to load or run anything. At most 2 MB: the number of pictures is bounded, and so are their bytes.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharding.contact import Picture
from sharding.filters.config import chosen
from sharding.html_page import shown_text, whole_page
from sharding.manifest import Manifest
from sharding.statistics import QUANTITIES, ROW_HEAD, Distribution, bin_edges, short_number
from sharding.summary import Summary

_PICTURE_BYTES = 1_200_000  # of all pictures; as text they are a third more
_CAUSES = 40
_BARS = 40
_WIDTH, _HEIGHT, _BOTTOM = 320, 120, 18


def report_page(manifest: Manifest, summary: Summary) -> str:
    """The page as text; to be stored at ``REPORT_PATH``."""
    budget = _Budget(_PICTURE_BYTES)
    title = f"{manifest.name} — {manifest.modality} dataset"
    parts = [
        f"<h1>{shown_text(manifest.name)}</h1><p>{shown_text(manifest.modality)} dataset made of "
        f"<bdi>{shown_text(str(manifest.source.get('url', '')))}</bdi></p>",
        _tiles(manifest, summary),
        _section("What was dropped, and why", _dropped_table(manifest, summary)),
        _section("Captions left out of kept samples", _captions_table(manifest)),
        _section("Files of the source that are no inputs", _skipped_table(manifest)),
        _section("Distributions of the kept samples", _distributions(summary)),
        _section("Kept samples", _sheet(summary.sheet.kept, budget)),
        _section("Dropped inputs", "".join(_dropped_sheets(manifest, summary, budget))),
        _section("How it was made", _configuration(manifest)),
    ]
    return whole_page(title, _STYLE, "\n".join(part for part in parts if part))


class _Budget:
    """Bytes of pictures that the page may still hold."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True


def _section(title: str, body: str) -> str:
    return f"<section><h2>{shown_text(title)}</h2>{body}</section>" if body else ""


def _tiles(manifest: Manifest, summary: Summary) -> str:
    counts, statistics = manifest.counts, summary.statistics
    inputs = int(manifest.source.get("inputs", counts.read))
    tiles = {
        "inputs": f"{inputs:,}",
        "samples kept": f"{counts.kept:,}",
        "dropped": f"{sum(counts.dropped.values()):,}",
        "captions": f"{statistics.captions:,}",
        "shards": f"{statistics.shards:,}",
        "in all": _size(statistics.shard_bytes),
    }
    if counts.read != inputs:
        tiles["samples read"] = f"{counts.read:,}"
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    return f"<div class='tiles'>{cells}</div>"


def _size(size: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(len(units) - 1, int(math.log(max(1.0, size), 1024)))
    return f"{size / 1024**power:,.{1 if power else 0}f} {units[power]}"


def _ranked(numbers: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(numbers.items(), key=lambda item: (-item[1], item[0]))


def _dropped_table(manifest: Manifest, summary: Summary) -> str:
    counts = manifest.counts
    ranked = _ranked(counts.dropped)
    if not ranked:
        return "<p>Nothing was dropped.</p>"
    rows = []
    for cause, number in ranked[:_CAUSES]:
        kind = "filtered" if chosen(cause) else "bad"
        share = number / max(1, counts.read)
        found = summary.examples.get(cause) or [
            f"{picture.title}: {picture.detail}" for picture in summary.sheet.dropped.get(cause, [])[:3]
        ]
        examples = "".join(f"<li><bdi>{shown_text(example)}</bdi></li>" for example in found[:3])
        rows.append(
            f"<tr><td class='cause'>{shown_text(cause)}</td><td><span class='{kind}'>{kind}</span></td>"
            f"<td class='n'>{number:,}</td><td class='n'>{share:.2%}</td><td><ul>{examples}</ul></td></tr>"
        )
    if len(ranked) > _CAUSES:
        rest = sum(number for _, number in ranked[_CAUSES:])
        rows.append(
            f"<tr><td>{len(ranked) - _CAUSES} more causes</td><td></td><td class='n'>{rest:,}</td><td></td>"
            "<td></td></tr>"
        )
    head = "<th>cause</th><th></th><th class='n'>samples</th><th class='n'>of those read</th><th>for example</th>"
    return (
        "<p>“filtered” is what the configuration chose to leave out, “bad” what could not be used.</p>"
        + _table(head, rows)
    )


def _captions_table(manifest: Manifest) -> str:
    ranked = _ranked(manifest.counts.captions_dropped)[:_CAUSES]
    rows = [f"<tr><td>{shown_text(cause)}</td><td class='n'>{number:,}</td></tr>" for cause, number in ranked]
    return _table("<th>cause</th><th class='n'>captions</th>", rows) if rows else ""


def _skipped_table(manifest: Manifest) -> str:
    rows = [
        f"<tr><td>{shown_text(reason)}</td><td class='n'>{number:,}</td></tr>"
        for reason, number in _ranked(manifest.skipped)[:_CAUSES]
    ]
    return _table("<th>reason, or suffix</th><th class='n'>files</th>", rows) if rows else ""


def _table(head: str, rows: Sequence[str]) -> str:
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _distributions(summary: Summary) -> str:
    spread = summary.statistics.distributions
    charts = "".join(_chart(name, found) for name, found in spread.items() if found.smallest < found.largest)
    head = "".join(f"<th class='{'n' if number else ''}'>{name}</th>" for number, name in enumerate(ROW_HEAD))
    rows = [
        f"<tr><td>{shown_text(label)}</td>"
        + "".join(f"<td class='n'>{cell}</td>" for cell in cells)
        + "</tr>"
        for label, *cells in summary.statistics.rows()
    ]
    formats = ", ".join(
        f"{number:,} {shown_text(name)}" for name, number in _ranked(summary.statistics.extensions)
    )
    note = f"<p>Stored as {formats}.</p>" if formats else ""
    return f"{note}<div class='charts'>{charts}</div>{_table(head, rows)}" if rows else ""


def _chart(name: str, found: Distribution) -> str:
    quantity = QUANTITIES[name]
    label = f"{quantity.label}, {quantity.unit}" if quantity.unit else quantity.label
    bars = _bars(found)
    highest = max(count for *_, count in bars)
    step = _WIDTH / len(bars)
    top = _HEIGHT - _BOTTOM
    drawn = []
    for place, (low, high, count) in enumerate(bars):
        height = (top - 4) * count / highest
        where = _range(low, high)
        drawn.append(
            f"<rect x='{place * step + step * 0.06:.1f}' y='{top - height:.1f}' width='{step * 0.88:.1f}' "
            f"height='{height:.1f}'><title>{where}: {count:,}</title></rect>"
        )
    labels = []
    places = sorted({0, len(bars) // 3, 2 * len(bars) // 3, len(bars) - 1})
    for place in places:
        x, anchor = (place + 0.5) * step, "middle"
        if place == 0:
            x, anchor = 0, "start"
        elif place == len(bars) - 1:
            x, anchor = _WIDTH, "end"
        low, high, _ = bars[place]
        shown = high if place == len(bars) - 1 and low != high else low
        labels.append(
            f"<text x='{x:.1f}' y='{_HEIGHT - 4}' text-anchor='{anchor}'>{short_number(shown)}</text>"
        )
    return (
        f"<figure><figcaption>{shown_text(label)}</figcaption><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"aria-label='histogram of {shown_text(label)}'><line x1='0' x2='{_WIDTH}' y1='{top}' y2='{top}'/>"
        f"{''.join(drawn)}{''.join(labels)}</svg></figure>"
    )


def _range(low: float, high: float) -> str:
    return short_number(low) if low == high else f"{short_number(low)} – {short_number(high)}"


def _bars(found: Distribution) -> list[tuple[float, float, int]]:
    """(from, to, values): a bar a number where they are few whole ones, else a bar a bin or several bins."""
    edges = {number: bin_edges(number, linear=found.linear) for number in found.bins}
    whole = not found.linear and all(low == int(low) for low, _ in edges.values())
    if whole and found.largest <= 16:  # up to there a bin holds one whole number
        counts = {int(edges[number][0]): count for number, count in found.bins.items()}
        return [(value, value, counts.get(value, 0)) for value in range(min(counts), max(counts) + 1)]
    zeros = [(low, high, found.bins[number]) for number, (low, high) in edges.items() if low == high]
    numbers = sorted(number for number, (low, high) in edges.items() if low != high)
    if not numbers:
        return zeros
    together = -(-(numbers[-1] - numbers[0] + 1) // _BARS)
    bars = []
    for start in range(numbers[0], numbers[-1] + 1, together):
        count = sum(found.bins.get(number, 0) for number in range(start, start + together))
        low = bin_edges(start, linear=found.linear)[0]
        high = bin_edges(start + together - 1, linear=found.linear)[1]
        bars.append((low, high, count))
    return zeros + bars


def _sheet(pictures: Sequence[Picture], budget: _Budget) -> str:
    return f"<div class='sheet'>{''.join(_card(item, budget) for item in pictures)}</div>" if pictures else ""


def _card(picture: Picture, budget: _Budget) -> str:
    image = "<div class='none'>no picture</div>"
    if picture.thumbnail and budget.take(len(picture.thumbnail)):
        data = base64.b64encode(picture.thumbnail).decode()
        image = f"<img alt='' src='data:image/jpeg;base64,{data}'>"
    return (
        f"<div class='card'>{image}<p><bdi>{shown_text(picture.title, 140)}</bdi></p>"
        f"<small><bdi>{shown_text(picture.detail, 140)}</bdi></small></div>"
    )


def _dropped_sheets(manifest: Manifest, summary: Summary, budget: _Budget) -> Iterator[str]:
    for cause, number in _ranked(manifest.counts.dropped)[:_CAUSES]:
        found = summary.sheet.dropped.get(cause, [])
        if found:
            yield f"<h3>{shown_text(cause)} <span>{len(found)} of {number:,}</span></h3>{_sheet(found, budget)}"


def _configuration(manifest: Manifest) -> str:
    facts = {
        "configuration": manifest.configuration_digest,
        "source listing": str(manifest.source.get("digest", "")),
        "dataset digest": manifest.digest,
    }
    rows = [
        f"<tr><td>{name}</td><td><code>{shown_text(value)}</code></td></tr>" for name, value in facts.items()
    ]
    settings = [
        f"<tr><td>{shown_text(name)}</td><td><code>{shown_text(value)}</code></td></tr>"
        for name, value in _leaves("", manifest.configuration)
    ]
    return _table("<th>digest</th><th>sha256</th>", rows) + (
        "<details><summary>Configuration</summary>"
        + _table("<th>field</th><th>value</th>", settings)
        + "</details>"
    )


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(f"{prefix}.{name}" if prefix else str(name), item)
    elif isinstance(value, list) and value and len(value) <= 20:
        for number, item in enumerate(value):
            yield from _leaves(f"{prefix}.{number}", item)
    else:
        yield prefix, json.dumps(value, ensure_ascii=False, sort_keys=True)


_STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:12px;margin-bottom:16px}
svg text{font-size:10px;fill:#52606d}
svg rect{fill:#2563eb}
svg line{stroke:#d5d5d0}
.cause{white-space:nowrap}
ul{margin:0;padding:0;list-style:none;font-size:13px;color:#52606d;overflow-wrap:anywhere}
.bad,.filtered{font-size:12px;border-radius:9px;padding:1px 9px;background:#fdecea;color:#b42318}
.filtered{background:#e8eefc;color:#1d4ed8}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.card{background:#fff;border:1px solid #e4e4e0;border-radius:10px;padding:10px;overflow:hidden}
.card img,.none{width:128px;height:128px;object-fit:contain;display:block;margin:0 auto 8px;background:#f3f3f1;
border-radius:6px}
.none{color:#9aa5b1;font-size:12px;line-height:128px;text-align:center}
.card p{margin:0 0 2px;font-size:13px;line-height:1.35;color:#1f2933}
.card small{display:block;font-size:11px;line-height:1.35;color:#616e7c;overflow-wrap:anywhere}
"""
