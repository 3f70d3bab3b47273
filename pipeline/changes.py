"""What of a running job's configuration may change when it goes on: a table of rules, and a pure function over it.

The rule behind the table: whatever was trained so far must stay what the configuration says. So the weights' beginning,
the order of data and whatever a begun stage was trained by stay; stages to come are free, and so is all that changes
cost alone. Learning rates are functions of the step, hence those of steps to come may change with the number of
steps: the change tells by how much.

::

    compare(job before, job now, steps done) -> Changes(allowed, refused)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from pipeline.training.schedule import stages_begun

Verdict = Literal["free", "never", "once-begun", "by-stage"]


@dataclass(frozen=True)
class Rule:
    """Which fields (``*`` spans dots) it is for, and whether they may change.

    Attributes:
        verdict: ``free``: at any time; ``never``; ``once-begun``: until the first step is kept;
            ``by-stage``: a default that stages may override: as long as no begun stage goes by it.
        instead: what to do instead, for the person who is refused; ``{step}`` is the number of steps done.
    """

    pattern: str
    verdict: Verdict
    instead: str = "give the job another name, or undo the change to go on"


_NEW_STAGE = (
    "undo it; from step {step} on it may differ in a stage of its own: end the begun stage there "
    "(its steps) and go on in a new one"
)

#: The first rule whose pattern fits decides. Fields below ``train.stages`` are judged stage by stage.
RULES: tuple[Rule, ...] = (
    Rule("seed", "never"),
    Rule("model.*", "never"),
    *(
        Rule(f"train.{name}", "free")
        for name in (
            *("workers", "loader_processes", "cache_mb", "max_failures", "bad_sample_limit"),
            *("micro_batch", "activation_checkpointing", "compile"),  # the same gradient up to rounding
            *("deepspeed.aio.*", "deepspeed.log_level"),
            *("deepspeed.wall_clock_breakdown", "deepspeed.memory_breakdown", "deepspeed.dump_state"),
            *("deepspeed.flops_profiler.*", "deepspeed.comms_logger.*", "deepspeed.steps_per_print"),
            *("deepspeed.disable_python_gc", "deepspeed.timers.*", "deepspeed"),  # the last: an empty block
        )
    ),
    Rule("train.deepspeed.zero_optimization.zero_quantized*", "once-begun"),
    Rule("train.deepspeed.zero_optimization*", "free"),
    *(
        Rule(f"train.{name}", "by-stage", _NEW_STAGE)
        for name in ("global_batch", "accumulation", "learning_rate")
    ),
    Rule("train.schedule.*", "by-stage", _NEW_STAGE),
    Rule("train.*", "once-begun"),
    Rule("*", "free"),  # datasets, checkpoints, evaluate, tracking, cluster
)

#: Fields of a begun stage that may change: they do not touch what it was trained on, or by.
_FREE_OF_A_STAGE = {"checkpoint_every"}


@dataclass(frozen=True)
class Change:
    """One field that differs. ``instead``: what to do, where it is refused; None: it is allowed."""

    field: str
    was: Any
    now: Any
    instead: str | None = None

    def __str__(self) -> str:
        return f"{self.field} was {self.was!r}, now {self.now!r}"


@dataclass(frozen=True)
class Changes:
    """What differs between two configurations of a job, after ``step`` steps that are kept."""

    step: int
    allowed: list[Change] = field(default_factory=list)
    refused: list[Change] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.allowed or self.refused)

    @property
    def refusal(self) -> str:
        """One line: the first field that is refused, what to do, and which others are."""
        first, *others = self.refused
        more = f" (refused too: {'; '.join(map(str, others[:3]))}{', ...' if len(others) > 3 else ''})"
        return f"after {self.step} steps {first}: {first.instead}{more if others else ''}"

    def as_record(self) -> dict[str, Any]:
        """As plain data, for the run's record and for MLflow: what was refused alone, where anything was."""
        shown = self.refused or self.allowed
        return {
            "step": self.step,
            "allowed": not self.refused,
            "changed": {one.field: {"was": one.was, "now": one.now} for one in shown},
        }


def compare(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> Changes:
    """Judge every field that differs.

    Args:
        before, now: the job as plain data, with all defaults filled in (``pipeline.runs.plain_job``).
        step: optimizer steps whose result is kept: those of the newest checkpoint.
    """
    changes = Changes(step)
    was, is_ = dict(leaves(before)), dict(leaves(now))
    begun = stages_begun([stage["steps"] for stage in before["train"]["stages"]], step)
    for name in sorted({*was, *is_}):
        if was.get(name) == is_.get(name):
            continue
        instead = _instead(name, before, now, step, begun)
        change = Change(name, was.get(name), is_.get(name), instead)
        (changes.allowed if instead is None else changes.refused).append(change)
    return changes


def rule_of(name: str) -> Rule:
    """The rule for a field outside ``train.stages``."""
    return next(rule for rule in RULES if fnmatchcase(name, rule.pattern))


def _instead(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], step: int, begun: int
) -> str | None:
    """None where the field may change, else what to do."""
    if name.startswith("train.stages"):
        allowed, instead = _stage_field_may_change(name, before, now, step, begun)
    else:
        rule = rule_of(name)
        instead = rule.instead.format(step=step)
        if rule.verdict == "by-stage":
            key = name.split(".")[1]
            stages = [*before["train"]["stages"][:begun], *now["train"]["stages"][:begun]]
            allowed = all(stage.get(key) is not None for stage in stages)
        else:
            allowed = rule.verdict == "free" or (rule.verdict == "once-begun" and step == 0)
    return None if allowed else instead


def _stage_field_may_change(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], step: int, begun: int
) -> tuple[bool, str]:
    """Whether a field of a stage may change, and what to do where it may not."""
    number, _, key = name.removeprefix("train.stages.").partition(".")
    index = int(number)
    if index >= begun or key in _FREE_OF_A_STAGE:
        return True, ""
    stages = before["train"]["stages"]
    if index >= len(now["train"]["stages"]):
        return False, f"put stage '{stages[index]['name']}' back: it was trained"
    last = index == begun - 1
    if key != "steps":
        instead = _NEW_STAGE if last else "undo it: the stage is finished; stages to come may differ"
        return False, instead.format(step=step)
    if not last:
        return False, "undo it: the stage is finished; add steps to a stage to come, or a new stage"
    done = step - sum(stage["steps"] for stage in stages[:index])
    return int(now["train"]["stages"][index]["steps"]) >= done, f"choose {done} or more: so many are trained"


def trained_datasets(train: Mapping[str, Any], step: int) -> set[str]:
    """Names of the datasets of the stages that have begun after ``step`` steps.

    Args:
        train: the ``train`` block as plain data.
    """
    stages = train["stages"]
    begun = stages_begun([stage["steps"] for stage in stages], step)
    return {name for stage in stages[:begun] for name in stage["mixture"]}


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is no mapping or list, and of empty ones."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, value
