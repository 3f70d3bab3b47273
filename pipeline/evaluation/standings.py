"""How the checkpoints of a run stand to each other: the best so far by every metric, and where a metric has fallen."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.evaluation.config import Regression
from pipeline.evaluation.ledger import EvaluationKey, Ledger, Outcome, beats
from pipeline.evaluation.result import lower_is_better
from pipeline.evaluation.statistics import Difference, compare_families
from sharding.errors import BadData

log = logging.getLogger("pipeline.evaluation")


@dataclass(frozen=True)
class Fall:
    """A checkpoint that is worse than the best before it, by more than a rule allows and more than chance explains."""

    rule: Regression
    best: Outcome
    outcome: Outcome
    difference: Difference

    def __str__(self) -> str:
        low, high = self.difference.interval
        return (
            f"{self.rule.metric} fell from {self.difference.a:.4g} at step {self.best.step} to "
            f"{self.difference.b:.4g} at step {self.outcome.step}: {self.difference.difference:+.4g}, "
            f"95 % interval {low:+.4g} to {high:+.4g}; {self.rule.drop:g} are allowed"
        )


class Standings:
    """Keeps the outcomes of the present versions, as they come in whatever order.

    Args:
        rules: which falls are told.
        ledger: has the items of the outcomes.
        seed: of the run.
    """

    def __init__(self, rules: Iterable[Regression], ledger: Ledger, seed: int) -> None:
        self._rules, self._ledger, self._seed = list(rules), ledger, seed
        self._outcomes: dict[str, dict[EvaluationKey, Outcome]] = {}  # by task
        self._best: dict[str, Outcome] = {}
        self._told: set[tuple[str, EvaluationKey]] = set()
        self._unknown: set[str] = set()

    def add(self, outcome: Outcome) -> dict[str, Outcome]:
        """Takes an outcome in; returns it by each ``TASK/METRIC`` by which it is now the best.

        Only metrics that are measured on items can be best, not facts such as the number of candidates.
        """
        self._outcomes.setdefault(outcome.task, {})[outcome.key] = outcome
        better = {}
        for name in outcome.intervals:
            metric = f"{outcome.task}/{name}"
            if beats(outcome, self._best.get(metric), name):
                self._best[metric] = better[metric] = outcome
        return better

    def falls(self) -> list[Fall]:
        """What the rules say of the newest evaluated checkpoint, each fall once.

        Only of the newest: whatever older ones did, this is how the training is doing.
        """
        found = []
        for rule in self._rules:
            fall = self._fall(rule)
            if fall is not None and (rule.metric, fall.outcome.key) not in self._told:
                self._told.add((rule.metric, fall.outcome.key))
                found.append(fall)
        return found

    def _fall(self, rule: Regression) -> Fall | None:
        measured = [one for one in self._outcomes.get(rule.task, {}).values() if one.cause is None]
        outcomes = sorted((one for one in measured if rule.name in one.intervals), key=lambda one: one.step)
        if measured and not outcomes and rule.metric not in self._unknown:
            self._unknown.add(rule.metric)
            known = ", ".join(sorted(measured[0].intervals))
            log.error("evaluate.regression: task %s measures no %s; it has %s", rule.task, rule.name, known)
        if not outcomes:
            return None
        newest, best = outcomes[-1], None
        for one in outcomes[:-1]:
            if one.step < newest.step and beats(one, best, rule.name):
                best = one
        if best is None:
            return None
        sign = -1.0 if lower_is_better(rule.name) else 1.0
        if not sign * (best.metrics[rule.name] - newest.metrics[rule.name]) > rule.drop:
            return None
        return self._shown(rule, best, newest)

    def _shown(self, rule: Regression, best: Outcome, newest: Outcome) -> Fall | None:
        try:
            differences = compare_families(
                self._ledger.items(best),
                self._ledger.items(newest),
                seed=self._seed,
                task=rule.task,
                only=rule.name,
            )
        except BadData as error:
            log.error("%s cannot be compared with that of step %d: %s", rule.metric, best.step, error)
            return None
        worse = [one for one in differences if one.verdict == "worse"]
        return Fall(rule, best, newest, worse[0]) if worse else None
