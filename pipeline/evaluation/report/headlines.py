"""Which numbers of a task stand for it: in the tables, in the charts and at the top of the page.

Kinds that are not named here are shown too, by the first metrics that were measured on items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.ledger import Outcome

_OTHERS = 4  # headlines of a kind that is not named here


@dataclass(frozen=True)
class Headline:
    """One metric.

    Args:
        metric: its name in the outcome.
        label: for people; short, it stands over a column.
        group: what it shares with its neighbours (a direction); metrics of a group share a chart.
        percent: whether it is a share, shown as a percentage.
        baseline: name of the fact that says what a model that knows nothing scores.
    """

    metric: str
    label: str
    group: str = ""
    percent: bool = True
    baseline: str | None = None


@dataclass(frozen=True)
class Kind:
    """How tasks of a kind are shown. The first of ``headlines`` stands for the task where there is room for one.

    Args:
        title: over the table of all tasks of the kind.
        note: explains the labels.
        baseline: what the model that knows nothing does.
        counts: facts and labels of what the task was measured on, e.g. candidates.
    """

    title: str
    headlines: tuple[Headline, ...]
    note: str = ""
    baseline: str = "chance"
    counts: tuple[tuple[str, str], ...] = ()


def _retrieval() -> tuple[Headline, ...]:
    found = []
    for way, group in (("t2i", "text → vision"), ("i2t", "vision → text")):
        found += [Headline(f"{way}_R{k}", f"R@{k}", group, baseline=f"{way}_chance_R{k}") for k in (1, 10)]
        found.append(Headline(f"{way}_rerank_R1", "ITM R@1", group, baseline=f"{way}_chance_R1"))
    return tuple(found)


KINDS: Mapping[str, Kind] = {
    "retrieval": Kind(
        "retrieval",
        _retrieval(),
        note="ITM: ranked again by the matching head",
        counts=(("candidates_images", "pictures or clips"), ("candidates_texts", "captions")),
    ),
    "classification": Kind(
        "zero-shot classification",
        tuple(Headline(f"top{k}", f"top {k}", baseline=f"chance_top{k}") for k in (1, 5)),
        counts=(("images", "images"), ("classes", "classes")),
    ),
    "vqa": Kind(
        "visual question answering",
        (
            Headline("accuracy", "overall", baseline="best_constant"),
            *(
                Headline(f"accuracy_{name}", label)
                for name, label in (("yes_no", "yes/no"), ("number", "number"), ("other", "other"))
            ),
        ),
        baseline="one answer",
        note="one answer: the best one to give to every question",
        counts=(("questions", "questions"), ("answers", "answers in the vocabulary")),
    ),
    "nlvr2": Kind(
        "NLVR2",
        (
            Headline("accuracy", "accuracy", baseline="best_constant"),
            Headline("consistency", "consistency"),
        ),
        baseline="one answer",
        note="one answer: always the same; consistency: of sentences, with all their pairs",
        counts=(("statements", "statements"),),
    ),
    "alignment": Kind(
        "ALIGN-BENCH",
        tuple(
            Headline(f"{level}_{region}", region, level, baseline=f"chance_{level}_{region}")
            for level in ("global", "local")
            for region in ("box", "pixel")
        ),
        baseline="uniform",
        note="uniform: attention to all patches alike",
        counts=(("images", "images"), ("phrases", "phrases")),
    ),
}


def kind_of(name: str) -> Kind:
    """How to show tasks of a kind; of an unknown one, the name is all there is to say."""
    return KINDS.get(name, Kind(name or "other tasks", ()))


def headlines_of(kind: str, outcomes: Sequence[Outcome]) -> list[Headline]:
    """Those of the kind that any of its finished ``outcomes`` has; of an unknown kind the first measured ones."""
    measured = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    if kind in KINDS:
        return [headline for headline in KINDS[kind].headlines if headline.metric in measured]
    certain = [name for name in measured if any(name in outcome.intervals for outcome in outcomes)]
    return [
        Headline(name, name.replace("_", " "), percent=False, baseline=f"chance_{name}")
        for name in (certain or measured)[:_OTHERS]
    ]


def baseline_of(headline: Headline, outcomes: Sequence[Outcome]) -> float | None:
    """What a model that knows nothing scores, as the newest of ``outcomes`` says."""
    if headline.baseline is None:
        return None
    for outcome in sorted(outcomes, key=lambda one: -one.step):
        if headline.baseline in outcome.metrics:
            return outcome.metrics[headline.baseline]
    return None
