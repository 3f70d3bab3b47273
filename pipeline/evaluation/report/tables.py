"""The page's tables: checkpoints, failures, and the numbers of one task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report.headlines import Headline, baseline_of, kind_of
from pipeline.evaluation.report.history import History
from pipeline.evaluation.report.numbers import bounds, number, plain
from sharding.html_page import shown_text

_ROWS = 100  # checkpoints in the table of a task
_COLUMNS = 12  # checkpoints in a table of all metrics
_CAUSE = 600  # characters


def failures(tasks: Sequence[History]) -> str:
    """Every evaluation that was given up, with its cause; those of a task with the same cause together."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for history in tasks:
        for outcome in history.failed:
            found.setdefault((history.name, outcome.cause or ""), []).append(outcome)
    items = []
    for (name, cause), outcomes in found.items():
        steps = ", ".join(f"{outcome.step:,}" for outcome in outcomes)
        attempts = max(outcome.attempt for outcome in outcomes)
        tried = "one attempt" if attempts == 1 else f"{attempts} attempts"
        items.append(
            f"<li><b>{shown_text(name)}</b> step{'s' * (len(outcomes) > 1)} {steps}, given up after {tried}"
            f"<br/><bdi class='failed'>{shown_text(cause, _CAUSE)}</bdi></li>"
        )
    return f"<ul class='failures'>{''.join(items)}</ul>" if items else ""


def checkpoints_table(tasks: Sequence[History]) -> str:
    """One row a checkpoint; of each task the metric that stands for it, with its interval."""
    rows: dict[str, dict[int, Outcome]] = {}
    for place, history in enumerate(tasks):
        for outcome in history.steps:
            rows.setdefault(outcome.checkpoint["digest"], {})[place] = outcome
    if not rows:
        return ""
    head = "".join(
        f"<th class='n'>{shown_text(history.name)}<br/><i>{_name_of(history)}</i></th>" for history in tasks
    )
    ordered = sorted(rows.values(), key=lambda found: next(iter(found.values())).step)
    body = []
    for found in ordered:
        cells = "".join(_main_cell(history, found.get(place)) for place, history in enumerate(tasks))
        body.append(f"<tr>{_checkpoint(next(iter(found.values())))}{cells}</tr>")
    note = (
        "<p>With 95 % intervals; the best value of each task is in bold. The baseline is what chance, or a model that "
        "knows nothing, scores.</p>"
    )
    return note + _table(
        [_CHECKPOINT + head],
        body,
        foot=_baseline_row("baseline", [_main_baseline(history) for history in tasks]),
    )


def headline_table(history: History) -> str:
    """One row a checkpoint, all headlines of the task with their intervals; the baseline in the last.

    Of very many checkpoints the newest and the best.
    """
    columns = history.headlines
    best = {column.metric: history.best(column.metric) for column in columns}
    rows = []
    newest = history.steps[-_ROWS:]
    kept = [one for one in history.steps[:-_ROWS] if any(one is found for found in best.values())]
    for outcome in [*kept, *newest]:
        if outcome.cause is not None:
            cells = (
                f"<td colspan='{max(1, len(columns))}' class='cause'>failed: "
                f"<bdi>{shown_text(outcome.cause, _CAUSE)}</bdi></td>"
            )
            rows.append(f"<tr class='failed'>{_checkpoint(outcome)}{cells}</tr>")
        else:
            cells = "".join(_cell(outcome, column, outcome is best[column.metric]) for column in columns)
            rows.append(f"<tr>{_checkpoint(outcome)}{cells}</tr>")
    heads = [_CHECKPOINT + "".join(f"<th class='n'>{shown_text(column.label)}</th>" for column in columns)]
    if any(column.group for column in columns):
        heads.insert(0, "<th colspan='3'></th>" + "".join(_group_heads(columns)))
    table = _table(
        heads,
        rows,
        foot=_baseline_row(
            kind_of(history.kind).baseline, [_baseline(history, column) for column in columns]
        ),
    )
    more = len(history.steps) - len(rows)
    note = f"<p>The newest and the best of {len(history.steps):,} checkpoints.</p>" if more else ""
    return note + table


def all_metrics_table(history: History) -> str:
    """Every metric and fact of the newest checkpoints, as MLflow has them."""
    shown = history.done[-_COLUMNS:]
    names = list(dict.fromkeys(name for outcome in shown for name in outcome.metrics))
    if not names:
        return ""
    head = "<th>step</th>" + "".join(f"<th class='n'>{outcome.step:,}</th>" for outcome in shown)
    rows = [
        f"<tr><td>{shown_text(name)}</td>"
        + "".join(_plain_cell(outcome, name) for outcome in shown)
        + "</tr>"
        for name in names
    ]
    more = len(history.done) - len(shown)
    note = f"<p>The newest {len(shown)} of {len(history.done)} checkpoints.</p>" if more else ""
    return note + _table([head], rows)


_CHECKPOINT = "<th class='n'>step</th><th class='n'>stage</th><th>checkpoint</th>"


def _checkpoint(outcome: Outcome) -> str:
    record: dict[str, Any] = outcome.checkpoint
    return (
        f"<td class='n'>{outcome.step:,}</td><td class='n'>{shown_text(str(record['stage']))}</td>"
        f"<td><code title='{shown_text(str(record['path']))}'>{shown_text(str(record['digest'])[:8])}</code></td>"
    )


def _name_of(history: History) -> str:
    if not history.headlines:
        return ""
    first = history.headlines[0]
    unit = ", %" if first.percent else ""
    return shown_text(f"{first.group} {first.label}".strip() + unit)


def _main_cell(history: History, outcome: Outcome | None) -> str:
    if outcome is None:
        return "<td class='n'>–</td>"
    if outcome.cause is not None:
        return f"<td class='n failed' title='{shown_text(outcome.cause)}'>failed</td>"
    if not history.headlines:
        return "<td class='n'>done</td>"
    first = history.headlines[0]
    return _cell(outcome, first, outcome is history.best(first.metric))


def _cell(outcome: Outcome, column: Headline, best: bool) -> str:
    value = number(outcome.metrics.get(column.metric), percent=column.percent)
    interval = bounds(outcome.intervals.get(column.metric), percent=column.percent)
    shown = f"<b>{value}</b>" if best else value
    return f"<td class='n'>{shown} <i>{interval}</i></td>"


def _plain_cell(outcome: Outcome, name: str) -> str:
    if name not in outcome.metrics:
        return "<td class='n'>–</td>"
    interval = outcome.intervals.get(name)
    between = "" if interval is None else f" <i>[{plain(interval[0])}, {plain(interval[1])}]</i>"
    return f"<td class='n'>{plain(outcome.metrics[name])}{between}</td>"


def _main_baseline(history: History) -> str:
    return _baseline(history, history.headlines[0]) if history.headlines else ""


def _baseline(history: History, column: Headline) -> str:
    value = baseline_of(column, history.done)
    return "" if value is None else number(value, percent=column.percent)


def _baseline_row(name: str, cells: Sequence[str]) -> str:
    if not any(cells):
        return ""
    return (
        f"<tr><td colspan='3'>{name}</td>" + "".join(f"<td class='n'>{cell}</td>" for cell in cells) + "</tr>"
    )


def _group_heads(columns: Sequence[Headline]) -> Iterable[str]:
    for group, found in groupby(columns, key=lambda column: column.group):
        yield f"<th class='group' colspan='{len(list(found))}'>{shown_text(group)}</th>"


def _table(heads: Sequence[str], rows: Sequence[str], foot: str = "") -> str:
    head = "".join(f"<tr>{row}</tr>" for row in heads)
    last = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f"<div class='scroll' tabindex='0'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody>{last}"
        "</table></div>"
    )
