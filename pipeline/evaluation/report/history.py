"""Outcomes sorted for showing: the history of each task over the checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report.headlines import KINDS, Headline, headlines_of
from pipeline.evaluation.result import lower_is_better


@dataclass(frozen=True)
class History:
    """One task in one version: ``done`` and ``failed`` evaluations by step, and what stands for it."""

    name: str
    kind: str
    done: list[Outcome]
    failed: list[Outcome]
    headlines: list[Headline]

    @property
    def steps(self) -> list[Outcome]:
        """All evaluations by step."""
        return sorted([*self.done, *self.failed], key=lambda one: one.step)

    def best(self, metric: str) -> Outcome | None:
        """The finished evaluation with the best value; the earliest of equals, None where it was never measured."""
        sign = -1.0 if lower_is_better(metric) else 1.0
        found = [one for one in self.done if math.isfinite(one.metrics.get(metric, math.nan))]
        return max(found, key=lambda one: sign * one.metrics[metric], default=None)


def histories(outcomes: Iterable[Outcome]) -> list[History]:
    """One of each task: kinds in the order of the table of kinds, then by name."""
    known = list(KINDS)
    of_task: defaultdict[tuple[int, str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        place = known.index(outcome.kind) if outcome.kind in known else len(known)
        of_task[place, outcome.kind, outcome.task, outcome.version].append(outcome)
    names = [task for *_, task, _ in of_task]
    return [
        _history(task if names.count(task) == 1 else f"{task} v{version}", of_task[key])
        for key in sorted(of_task)
        for *_, task, version in [key]
    ]


def by_kind(found: Sequence[History]) -> list[list[History]]:
    """Neighbours of the same kind together."""
    groups: list[list[History]] = []
    for history in found:
        if groups and groups[-1][0].kind == history.kind:
            groups[-1].append(history)
        else:
            groups.append([history])
    return groups


def _history(name: str, outcomes: Sequence[Outcome]) -> History:
    ordered = sorted(outcomes, key=lambda one: one.step)
    done = [one for one in ordered if one.cause is None]
    kind = ordered[0].kind
    return History(
        name, kind, done, [one for one in ordered if one.cause is not None], headlines_of(kind, done)
    )
