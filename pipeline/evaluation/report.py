"""What the evaluations say, for people: a table on the terminal, plain text in logs, one HTML page for
MLflow.

The table has a row per checkpoint and, per task, recall at 10 both ways (as a multiple of chance too) from
the ITC embeddings, and recall at 1 before and after the matching head has re-ranked the shortlist.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.evaluation.ledger import Outcome

if TYPE_CHECKING:
    from rich.console import Console

_DIRECTIONS = (("t2i", "text → vision"), ("i2t", "vision → text"))
_HEAD = (
    "step",
    "stage",
    "task",
    *(f"{name} R@10" for _, name in _DIRECTIONS),
    "× chance",
    "R@1",
    "R@1 re-ranked",
    "candidates",
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 190, 44, 26, 12, 14


@dataclass(frozen=True)
class _Line:
    """One row as text: the numbers, or the cause of a failure in place of them."""

    cells: tuple[str, ...]
    failed: bool


def _lines(outcomes: Sequence[Outcome]) -> Iterator[_Line]:
    for outcome in sorted(outcomes, key=lambda o: (o.step, o.task)):
        start = (str(outcome.step), str(outcome.checkpoint["stage"]), outcome.task)
        if outcome.cause is not None:
            yield _Line((*start, f"failed: {outcome.cause}"), True)
            continue
        metrics = outcome.metrics
        recalls = tuple(_percent(metrics.get(f"{way}_R10")) for way, _ in _DIRECTIONS)
        first, reranked = (_both_ways(metrics, name) for name in ("R1", "rerank_R1"))
        counts = [metrics.get(f"candidates_{kind}") for kind in ("images", "texts")]
        candidates = " / ".join(f"{value:.0f}" for value in counts if value is not None)
        yield _Line((*start, *recalls, _multiples(outcome), first, reranked, candidates), False)


def _both_ways(metrics: Mapping[str, float], name: str) -> str:
    values = [metrics.get(f"{way}_{name}") for way, _ in _DIRECTIONS]
    if any(value is None for value in values):
        return "–"
    return " / ".join(f"{100 * value:.1f}" for value in values if value is not None) + " %"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _multiples(outcome: Outcome) -> str:
    values = [chance_multiple(outcome, way) for way, _ in _DIRECTIONS]
    return " / ".join("–" if value is None else f"{value:.1f}" for value in values)


def chance_multiple(outcome: Outcome, direction: str) -> float | None:
    """Recall at 10 over that of random ranks; ``direction`` is ``t2i`` or ``i2t``. None for other tasks."""
    value = outcome.metrics.get(f"{direction}_R10")
    chance = outcome.metrics.get(f"{direction}_chance_R10")
    return None if value is None or not chance else value / chance


def print_report(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        console.print(text_report(outcomes), highlight=False, markup=False, soft_wrap=True)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not outcomes:
        console.print("no evaluations")
        return
    table = Table(title="retrieval, held-out", box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(_HEAD):
        table.add_column(name, justify="left" if number == 2 else "right")
    failures = []
    for line in _lines(outcomes):
        cells = line.cells
        if line.failed:
            failures.append(f"step {cells[0]}, {cells[2]}: {cells[3]}")
            cells = (*cells[:3], "failed")
        table.add_row(*(Text(cell, style="red" if line.failed else "") for cell in cells))
    console.print(table)
    for failure in failures:
        console.print(failure, style="red", highlight=False, markup=False)


def text_report(outcomes: Sequence[Outcome]) -> str:
    """The same as lines of text, columns aligned."""
    lines = list(_lines(outcomes))
    if not lines:
        return "no evaluations\n"
    whole = [_HEAD, *(line.cells for line in lines if not line.failed)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(_HEAD))]
    widths[:3] = [max(width, *(len(line.cells[n]) for line in lines)) for n, width in enumerate(widths[:3])]

    def joined(cells: Sequence[str], failed: bool) -> str:
        parts = [
            cell if failed and n > 2 else cell.ljust(widths[n]) if n == 2 else cell.rjust(widths[n])
            for n, cell in enumerate(cells)
        ]
        return "  ".join(parts).rstrip() + "\n"

    body = "".join(joined(line.cells, line.failed) for line in lines)
    return "retrieval, held-out\n" + joined(_HEAD, False) + body


def html_report(outcomes: Sequence[Outcome], title: str) -> str:
    """One self-contained page: a curve per task over the steps, and all numbers per checkpoint."""
    tasks = sorted({outcome.task for outcome in outcomes})
    done = {task: [o for o in outcomes if o.task == task and o.cause is None] for task in tasks}
    charts = "".join(_chart(task, done[task]) for task in tasks)
    details = "".join(_details(task, done[task]) for task in tasks)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEAD)
    rows = "".join(_row(line) for line in _lines(outcomes))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>Recall at 10 on held-out pairs, per checkpoint. "
        "The dashed line is what random ranks give.</p>"
        f"<div class='charts'>{charts}</div>"
        "<h2>Checkpoints</h2><div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<h2>All metrics</h2>{details}</main></body></html>\n"
    )


def _row(line: _Line) -> str:
    cells = [html.escape(cell) for cell in line.cells]
    if line.failed:
        start = "".join(f"<td>{cell}</td>" for cell in cells[:3])
        return f"<tr class='failed'>{start}<td colspan='{len(_HEAD) - 3}'>{cells[3]}</td></tr>"
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _details(task: str, outcomes: Sequence[Outcome]) -> str:
    ordered = sorted(outcomes, key=lambda o: o.step)
    names = list(dict.fromkeys(name for outcome in ordered for name in outcome.metrics))
    if not names:
        return ""
    head = "".join(f"<th>{outcome.step}</th>" for outcome in ordered)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_number(outcome.metrics.get(name))}</td>" for outcome in ordered)
        + "</tr>"
        for name in names
    )
    return (
        f"<details><summary>{html.escape(task)}</summary><div class='scroll'><table>"
        f"<thead><tr><th>step</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value == int(value) and abs(value) >= 2 else f"{value:.4f}"


def _chart(task: str, outcomes: Sequence[Outcome]) -> str:
    ordered = sorted(outcomes, key=lambda o: o.step)
    series = [
        (name, colour, dash, [(o.step, o.metrics[key]) for o in ordered if key in o.metrics])
        for name, key, colour, dash in (
            ("text → vision", "t2i_R10", "#2563eb", ""),
            ("vision → text", "i2t_R10", "#d97706", ""),
            ("text → vision, re-ranked", "t2i_rerank_R10", "#2563eb", "2 3"),
            ("vision → text, re-ranked", "i2t_rerank_R10", "#d97706", "2 3"),
            ("chance", "t2i_chance_R10", "#6b7280", "7 5"),
        )
    ]
    points = [point for *_, line in series for point in line]
    if not points:
        return ""
    last = max(step for step, _ in points)
    top = max(0.1, max(value for _, value in points) * 1.1)
    top = min(1.0, top)

    def x(step: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(1, last)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * min(value, top) / top

    parts = []
    for part in range(5):
        value = top * part / 4
        parts.append(
            f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' "
            f"y1='{y(value):.1f}' y2='{y(value):.1f}'/>"
            f"<text x='{_LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{100 * value:.0f} %</text>"
        )
    for step in sorted({0, last // 2, last}):
        parts.append(f"<text x='{x(step):.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>{step}</text>")
    legend = []
    for name, colour, dash, line in series:
        if not line:
            continue
        stroke = f"stroke='{colour}' stroke-dasharray='{dash}'"
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        parts.append(f"<polyline points='{path}' fill='none' stroke-width='2' {stroke}/>")
        if name != "chance":
            parts.extend(
                f"<circle cx='{x(step):.1f}' cy='{y(value):.1f}' r='3' fill='{colour}'>"
                f"<title>step {step}: {100 * value:.1f} %</title></circle>"
                for step, value in line
            )
        legend.append(
            "<span><svg width='26' height='8' aria-hidden='true'>"
            f"<line x1='0' x2='26' y1='4' y2='4' stroke-width='2' {stroke}/></svg> {name}</span>"
        )
    return (
        f"<figure><figcaption>{html.escape(task)}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='recall at 10 over steps'>"
        f"{''.join(parts)}</svg><div class='legend'>{''.join(legend)}</div></figure>"
    )


_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#f7f7f5;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px;font-weight:650}
h2{font-size:18px;margin:36px 0 10px;font-weight:600}
p{margin:0 0 20px;color:#52606d}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px}
figure{margin:0;background:#fff;border:1px solid #e4e4e0;border-radius:10px;padding:14px 16px}
figcaption{font-weight:600;margin-bottom:6px}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:#6b7280}
.grid{stroke:#ececea}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:#52606d;margin-top:8px}
.legend svg{width:26px;height:8px;display:inline-block;vertical-align:middle}
.scroll{overflow-x:auto;background:#fff;border:1px solid #e4e4e0;border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid #f0f0ed}
th{font-weight:600;color:#52606d;font-size:13px;background:#fbfbfa}
tbody tr:last-child td{border-bottom:0}
td:nth-child(3),th:nth-child(3){text-align:left}
details td:first-child,details th:first-child{text-align:left}
details td:nth-child(3),details th:nth-child(3){text-align:right}
details{margin-bottom:10px}
summary{cursor:pointer;font-weight:600;padding:6px 0}
.failed td{color:#b42318}
.failed td:last-child{text-align:left;white-space:normal}
""".strip().replace("\n", "")
