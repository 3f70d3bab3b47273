"""The section of one task: what it was measured on, its numbers, and examples to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.attachments import FILES
from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report.examples import Room, cards
from pipeline.evaluation.report.headlines import kind_of
from pipeline.evaluation.report.history import History
from pipeline.evaluation.report.numbers import plain
from pipeline.evaluation.report.tables import all_metrics_table, headline_table
from pipeline.evaluation.result import Example
from sharding.html_page import shown_text


@dataclass(frozen=True)
class Shown:
    """Examples of an outcome, and ``why`` it was chosen: ``"newest"`` or ``"best"``."""

    outcome: Outcome
    why: str
    examples: Sequence[Example]


def best_by_headline(history: History) -> Outcome | None:
    """The best evaluation by the metric that stands for the task."""
    return history.best(history.headlines[0].metric) if history.headlines else None


def task_section(
    history: History, place: str, shown: Sequence[Shown], room: Room, address: Callable[[Outcome, str], str]
) -> str:
    """The section; ``place`` is its anchor, ``address`` finds files beside outcomes."""
    metrics = all_metrics_table(history)
    details = f"<details><summary>All metrics</summary>{metrics}</details>" if metrics else ""
    return (
        f"<section id='{place}'><h2>{shown_text(history.name)} <span>{shown_text(kind_of(history.kind).title)}"
        f"</span></h2>{_facts(history)}{headline_table(history)}{details}"
        f"{_files(history, address)}"
        f"{''.join(_examples(history, one, room) for one in shown)}</section>"
    )


def _facts(history: History) -> str:
    newest = history.steps[-1]
    facts = [f"{newest.dataset['name']} ({newest.dataset['digest'][:12]})", f"version {newest.version}"]
    kind = kind_of(history.kind)
    metrics = history.done[-1].metrics if history.done else {}
    facts += [f"{plain(metrics[name])} {label}" for name, label in kind.counts if name in metrics]
    facts += [f"{plain(metrics['skipped'])} unreadable samples left out"] if metrics.get("skipped") else []
    facts += [kind.note] if kind.note else []
    return f"<p>{' · '.join(shown_text(fact) for fact in facts)}</p>"


def _files(history: History, address: Callable[[Outcome, str], str]) -> str:
    """Where a task's own files of the newest checkpoint are, e.g. for a test server."""
    if not history.done:
        return ""
    newest = history.done[-1]
    names = sorted(name for name in newest.files if name.startswith(f"{FILES}/"))
    places = "".join(f"<li><code>{shown_text(address(newest, name), 400)}</code></li>" for name in names)
    return (
        f"<h3>Files <span>step {newest.step:,}</span></h3><ul class='files'>{places}</ul>" if places else ""
    )


def _examples(history: History, shown: Shown, room: Room) -> str:
    step = f"step {shown.outcome.step:,}"
    if shown.why == "newest":
        return f"<h3>Examples <span>{step}, the newest</span></h3>{cards(shown.examples, room)}"
    by = f"the best by {history.headlines[0].label}"
    return f"<details><summary>Examples of {step}, {shown_text(by)}</summary>{cards(shown.examples, room)}</details>"
