"""``glscl compare``: are two checkpoints, of one run or of two, different by more than chance?

Works on the ledgers alone: the items' values that the evaluations left, not the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import did_you_mean
from pipeline.evaluation.ledger import Ledger, Outcome, best_outcome
from pipeline.evaluation.statistics import Difference, compare_families
from pipeline.export.source import split_address
from pipeline.runs import RECORD, read_record
from sharding.errors import UserError
from sharding.storage import Storage, open_storage

#: Settings that decide what was asked, not only how: results that differ in them cannot be compared.
_SAME = ("limit",)


@dataclass(frozen=True)
class Side:
    """A checkpoint and the evaluations of it that were finished, all versions, the latest last."""

    run: Storage
    step: int
    digest: str
    outcomes: list[Outcome]

    @property
    def label(self) -> str:
        """The run's name and the step."""
        return f"{PurePosixPath(self.run.url).name}, step {self.step}"

    def of(self, task: str) -> list[Outcome]:
        """The evaluations by one task."""
        return [outcome for outcome in self.outcomes if outcome.task == task]


@dataclass(frozen=True)
class TaskComparison:
    """What one task says of two checkpoints. ``notes``: settings in which the two evaluations differ."""

    a: Outcome
    b: Outcome
    differences: list[Difference]
    notes: list[str]


def compare(
    first: str,
    second: str,
    console: Console,
    *,
    tasks: Collection[str] = (),
    best: str | None = None,
    as_json: bool = False,
) -> None:
    """Prints how B differs from A, by every metric that both have.

    Args:
        first, second: addresses of A and B: runs, of which the newest evaluated checkpoint is taken, or checkpoints,
            which may be deleted by now.
        tasks: only these; none named: all that both have.
        best: ``TASK/METRIC`` by which the checkpoints of runs are chosen instead.

    Raises:
        UserError: nothing to compare; measured on different data.
        BadData: the items of an evaluation are damaged.
    """
    if best is not None and all(split_address(address)[1] for address in (first, second)):
        raise UserError("--best chooses among the checkpoints of a run, but A and B are single ones")
    a, b = (find_side(address, tasks=tasks, best=best) for address in (first, second))
    found = [_compare_task(a, b, name) for name in _common(a, b, tasks)]
    if as_json:
        print(json.dumps(_as_json(a, b, found), indent=2, sort_keys=True))
    else:
        _print(a, b, found, console)


def find_side(address: str, *, tasks: Collection[str] = (), best: str | None = None) -> Side:
    """The evaluated checkpoint at an address.

    Raises:
        UserError: there is no run, or no finished evaluation.
    """
    url, folder = split_address(address)
    run = open_storage(url)
    run.check(write=False)
    if read_record(run) is None:
        raise UserError(f"{run.url} is no run: it has no {RECORD}")
    finished = [one for one in Ledger(run).outcomes() if one.cause is None]
    wanted = [one for one in finished if not tasks or one.task in tasks]
    if folder is not None:
        wanted = [one for one in wanted if PurePosixPath(one.checkpoint["path"]).name == folder]
    if not wanted:
        what = f" by {', '.join(sorted(tasks))}" if tasks else ""
        known = ", ".join(sorted({f"{one.task} at step {one.step}" for one in finished})[-8:])
        raise UserError(
            f"{address} has no finished evaluation{what} to compare; "
            f"{run.url} has {known or 'none'} (glscl evaluate)"
        )
    chosen = max(wanted, key=lambda one: (one.step, one.finished))
    if folder is None and best is not None:
        chosen = _best(finished, best, run)
    digest = chosen.checkpoint["digest"]
    mine = sorted(
        (one for one in finished if one.checkpoint["digest"] == digest), key=lambda one: one.finished
    )
    return Side(run, chosen.step, digest, mine)


def _best(outcomes: list[Outcome], metric: str, run: Storage) -> Outcome:
    found = best_outcome(outcomes, metric)
    if found is None:
        known = sorted({f"{one.task}/{name}" for one in outcomes for name in one.intervals})
        hint = did_you_mean(metric, known)
        raise UserError(f"--best {metric}: {run.url} has nothing evaluated under this name{hint}")
    return found


def _common(a: Side, b: Side, tasks: Collection[str]) -> list[str]:
    mine, theirs = ({one.task for one in side.outcomes} for side in (a, b))
    for name in tasks:
        for side, there in ((a, mine), (b, theirs)):
            if name not in there:
                raise UserError(f"--task {name}: {side.label} was evaluated by {', '.join(sorted(there))}")
    common = sorted(set(tasks) or mine & theirs)
    if not common:
        raise UserError(
            f"no task in common: {a.label} has {', '.join(sorted(mine))}; "
            f"{b.label} has {', '.join(sorted(theirs))}"
        )
    return common


def _compare_task(a: Side, b: Side, task: str) -> TaskComparison:
    mine, theirs = _pair(a.of(task), b.of(task))
    reason = _incomparable(mine, theirs)
    if reason:
        raise UserError(f"{task} cannot be compared: {reason} (--task NAME compares the others)")
    seed = min(mine.seed, theirs.seed)  # the same draws whichever is called A
    differences = compare_families(
        Ledger(a.run).items(mine), Ledger(b.run).items(theirs), seed=seed, task=task
    )
    if not differences:
        raise UserError(f"{task} cannot be compared: the two evaluations have no scored item in common")
    return TaskComparison(mine, theirs, differences, list(_notes(mine, theirs)))


def _pair(mine: list[Outcome], theirs: list[Outcome]) -> tuple[Outcome, Outcome]:
    """The latest of the same version, else the latest of each."""
    for one in reversed(mine):
        for other in reversed(theirs):
            if one.version == other.version:
                return one, other
    return mine[-1], theirs[-1]


def _incomparable(a: Outcome, b: Outcome) -> str:
    if a.dataset["digest"] != b.dataset["digest"]:
        names = (f"{one.dataset['name']} ({one.dataset['digest'][:12]})" for one in (a, b))
        return "measured on different data, {} and {}".format(*names)
    if a.kind != b.kind or a.version.partition("-")[0] != b.version.partition("-")[0]:
        kinds = (f"{one.kind}, version {one.version.partition('-')[0]}" for one in (a, b))
        return "measured in different ways, {} and {}".format(*kinds)
    for name in _SAME:
        if a.settings.get(name) != b.settings.get(name):
            return f"{name} is {a.settings.get(name)} and {b.settings.get(name)}"
    return ""


def _notes(a: Outcome, b: Outcome) -> Iterable[str]:
    for name in sorted({*a.settings, *b.settings}):
        mine, theirs = a.settings.get(name), b.settings.get(name)
        if mine != theirs and name != "dataset":
            yield f"{name}: A {mine}, B {theirs}"


def _as_json(a: Side, b: Side, found: list[TaskComparison]) -> dict[str, Any]:
    return {
        **{
            which: {"run": side.run.url, "step": side.step, "checkpoint": side.digest}
            for which, side in (("a", a), ("b", b))
        },
        "tasks": [
            {
                "task": one.a.task,
                "data": dict(one.a.dataset),
                "versions": [one.a.version, one.b.version],
                "notes": one.notes,
                "metrics": [asdict(difference) for difference in one.differences],
            }
            for one in found
        ],
    }


def _print(a: Side, b: Side, found: list[TaskComparison], console: Console) -> None:
    console.print(f"A  {a.label}  {a.digest[:12]}", highlight=False, markup=False)
    console.print(f"B  {b.label}  {b.digest[:12]}", highlight=False, markup=False)
    colours = {"better": "green", "worse": "red", "no difference shown": ""}
    for one in found:
        table = Table(title=f"{one.a.task}, on {one.a.dataset['name']}", title_justify="left")
        table.add_column("metric")
        for name in ("items", "A", "B", "B - A", "95 % interval"):
            table.add_column(name, justify="right")
        table.add_column("B is")
        for line in one.differences:
            low, high = line.interval
            table.add_row(
                line.metric,
                str(line.items),
                f"{line.a:.4g}",
                f"{line.b:.4g}",
                f"{line.difference:+.4g}",
                f"{low:+.4g} to {high:+.4g}",
                line.verdict,
                style=colours[line.verdict],
            )
        console.print(table)
        for note in one.notes:
            console.print(f"differs in {note}", highlight=False, markup=False)
    console.print(
        "Each interval is for its metric alone: of twenty metrics that do not differ, one is shown to by chance.",
        highlight=False,
        soft_wrap=True,
    )
