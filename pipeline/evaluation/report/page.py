"""The page: one HTML file without scripts, to be opened from a disk, from MLflow or from a bucket.

At the top what happened at all and the curves of every task, then a table of the checkpoints, then a section for
each task with its numbers and examples. Its size is bounded: pictures by :data:`_PICTURE_BYTES`, tables of all
metrics by the number of their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report.charts import Point, Series, chart
from pipeline.evaluation.report.examples import Room, fair_shares, needs
from pipeline.evaluation.report.headlines import Headline, baseline_of, kind_of
from pipeline.evaluation.report.history import History, histories
from pipeline.evaluation.report.section import Shown, best_by_headline, task_section
from pipeline.evaluation.report.style import STYLE
from pipeline.evaluation.report.tables import checkpoints_table, failures
from pipeline.evaluation.result import Example
from sharding.html_page import shown_text, whole_page

_PICTURE_BYTES = 2_800_000  # of all pictures; as text they are a third more

ExamplesOf = Callable[[Outcome], Sequence[Example]]
AddressOf = Callable[[Outcome, str], str]


def html_report(
    outcomes: Sequence[Outcome],
    title: str,
    *,
    examples: ExamplesOf = lambda outcome: (),
    address: AddressOf = lambda outcome, name: name,
    links: Mapping[str, str] | None = None,
    unfinished: int = 0,
) -> str:
    """The page of a run.

    Args:
        outcomes: all evaluations that are done or given up.
        title: the run's name.
        examples: what there is to look at of an outcome; asked for the newest and the best one of each task.
        address: of a file beside an outcome (see :class:`pipeline.evaluation.ledger.Ledger`), by its name there.
        links: where more is, by what is there: addresses of http(s) become links, others are shown as text.
        unfinished: evaluations of checkpoints that exist, which are running or waiting.
    """
    tasks = histories(outcomes)
    shown = [_examples_of(history, examples) for history in tasks]
    rooms = fair_shares([sum(needs(one.examples) for one in found) for found in shown], _PICTURE_BYTES)
    parts = [
        _head(outcomes, title, links or {}, unfinished),
        _contents(tasks),
        _tiles(outcomes, tasks, unfinished),
        _section("Failures", "failures", failures(tasks)),
        _section("Curves", "curves", _curves(tasks)),
        _section("Checkpoints", "checkpoints", checkpoints_table(tasks)),
        *(
            task_section(history, f"task-{number}", found, Room(room), address)
            for number, (history, found, room) in enumerate(zip(tasks, shown, rooms, strict=True))
        ),
    ]
    return whole_page(f"{title}: evaluations", STYLE, "\n".join(part for part in parts if part))


def _examples_of(history: History, examples: ExamplesOf) -> list[Shown]:
    """Of the newest checkpoint, and of the best one where that is another."""
    newest = history.done[-1:]
    best = best_by_headline(history)
    chosen = [*newest, *([best] if best is not None and best not in newest else [])]
    found = [
        Shown(outcome, "newest" if outcome in newest else "best", examples(outcome)) for outcome in chosen
    ]
    return [one for one in found if one.examples]


def _head(outcomes: Sequence[Outcome], title: str, links: Mapping[str, str], unfinished: int) -> str:
    moment = max((outcome.finished for outcome in outcomes), default=None)
    if moment is None:
        when = "No evaluation has finished yet"
    else:
        when = f"Evaluations up to {datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"
    if unfinished:
        when += f"; {unfinished:,} not finished yet"
    rows = "".join(
        f"<div><dt>{shown_text(what)}</dt><dd>{_address(where)}</dd></div>" for what, where in links.items()
    )
    return f"<h1>{shown_text(title)}</h1><p>{when}.</p>" + (f"<dl class='links'>{rows}</dl>" if rows else "")


def _address(address: str) -> str:
    shown = shown_text(address, 400)
    if address.startswith(("http://", "https://")):
        return f"<a href='{shown_text(address, 2000)}' rel='noreferrer'>{shown}</a>"
    return f"<code>{shown}</code>"


def _contents(tasks: Sequence[History]) -> str:
    if not tasks:
        return ""
    failed = any(history.failed for history in tasks)
    places = [("failures", "Failures")] if failed else []
    if any(history.done for history in tasks):
        places.append(("curves", "Curves"))
    places += [("checkpoints", "Checkpoints")]
    places += [(f"task-{number}", history.name) for number, history in enumerate(tasks)]
    links = "".join(f"<a href='#{place}'>{shown_text(name)}</a>" for place, name in places)
    return f"<nav aria-label='contents'>{links}</nav>"


def _tiles(outcomes: Sequence[Outcome], tasks: Sequence[History], unfinished: int) -> str:
    failed = sum(len(history.failed) for history in tasks)
    tiles = {
        "checkpoints": len({outcome.checkpoint["digest"] for outcome in outcomes}),
        "tasks": len(tasks),
        "evaluations done": len(outcomes) - failed,
        "failed": failed,
    }
    if unfinished:
        tiles["not finished yet"] = unfinished
    cells = "".join(f"<div><b>{value:,}</b><span>{name}</span></div>" for name, value in tiles.items())
    return f"<div class='tiles'>{cells}</div>"


def _section(title: str, place: str, body: str) -> str:
    return f"<section id='{place}'><h2>{shown_text(title)}</h2>{body}</section>" if body else ""


def _curves(tasks: Sequence[History]) -> str:
    figures = [_figure(history) for history in tasks]
    if not any(figures):
        return ""
    return (
        "<p>Held-out data, over training steps. Bands are 95 % intervals, dashed lines what chance, or a model that "
        "knows nothing, scores.</p>"
        f"<div class='curves'>{''.join(figures)}</div>"
    )


def _figure(history: History) -> str:
    groups = dict.fromkeys((headline.group, headline.percent) for headline in history.headlines)
    name = kind_of(history.kind).baseline
    charts = [
        drawn
        for group, percent in groups
        if (drawn := chart(group, _series(history, group, percent), percent=percent, baseline=name))
    ]
    if not charts:
        return ""
    wide = " class='wide'" if len(charts) > 1 else ""
    return (
        f"<figure{wide}><figcaption>{shown_text(history.name)} <span>{shown_text(kind_of(history.kind).title)}"
        f"</span></figcaption><div class='charts'>{''.join(charts)}</div></figure>"
    )


def _series(history: History, group: str, percent: bool) -> list[Series]:
    chosen = [one for one in history.headlines if (one.group, one.percent) == (group, percent)]
    return [
        Series(headline.label, _points(history, headline), baseline_of(headline, history.done))
        for headline in chosen
    ]


def _points(history: History, headline: Headline) -> list[Point]:
    name = headline.metric
    return [
        Point(outcome.step, outcome.metrics[name], outcome.intervals.get(name))
        for outcome in history.done
        if name in outcome.metrics
    ]
