"""From a file's tensors to a model's parameters: the whole plan is checked before anything is copied.

A family of weights (CLIP, RoBERTa, released checkpoints) describes itself as a :class:`Blueprint`: for each
parameter of ours the names it is made of and how, and which of the remaining names have no place here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.configuration import GLSCLConfig
from model.importers.errors import WeightImportError
from model.importers.files import Weights


class Misfit(Exception):
    """A tensor from which a parameter cannot be made; the message says why."""


class Adapted(NamedTuple):
    """A tensor that had to be changed to fit, and how."""

    tensor: Tensor
    how: str


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made: ``build`` of the tensors called ``sources``."""

    sources: tuple[str, ...]
    build: Callable[..., Tensor | Adapted]


@dataclass(frozen=True)
class Frame:
    """What a family plans for.

    Args:
        config: of the model.
        root: prefix of the backbone's parameters (``glscl.``, or nothing for a bare backbone).
        parameters: names of all parameters of the model.
        names: names of all tensors of the file.
    """

    config: GLSCLConfig
    root: str
    parameters: tuple[str, ...]
    names: frozenset[str]


@dataclass
class Blueprint:
    """What a family of weights is made of.

    Args:
        recipes: by parameter of the model.
        ignored: names of the file that have no place in the model, with the reason.
        untouched: parameters that the file has nothing for, rightly, with the reason.
        problems: what does not fit before any tensor is looked at.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    untouched: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take_in(self, other: Blueprint) -> None:
        """Add all that ``other`` has."""
        self.recipes |= other.recipes
        self.ignored |= other.ignored
        self.untouched |= other.untouched
        self.problems += other.problems

    def ignore(self, names: Iterable[str], reasons: Mapping[str, str]) -> None:
        """Ignore the names that a regular expression of ``reasons`` matches from the start to the end."""
        for name in names:
            for pattern, reason in reasons.items():
                if re.fullmatch(pattern, name):
                    self.ignored.setdefault(name, reason)


@dataclass(frozen=True)
class ImportReport:
    """What was done; ``str`` of it is for people.

    Args:
        kind: family of the weights.
        source: the file, or ``the mapping``.
        loaded: parameters of the model that were overwritten.
        missing: names the file should have had; only with ``strict=False``.
        unexpected: names of the file that nothing is known of; only with ``strict=False``.
        ignored: names of the file that have no place in the model, with the reason.
        adapted: parameters whose tensor was interpolated, cut, repeated or shifted, with how.
        untouched: parameters that were left as they were, with the reason.
    """

    kind: str
    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: dict[str, str]
    adapted: dict[str, str]
    untouched: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.kind} weights of {self.source}: {len(self.loaded)} parameters loaded"]
        lines += [f"  adapted {name}: {how}" for name, how in self.adapted.items()]
        for title, reasons in (("ignored", self.ignored), ("untouched", self.untouched)):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, own in reasons.items() if own == reason]
                lines.append(f"  {title} {_some(names)}: {reason}")
        for title, left in (("missing", self.missing), ("unexpected", self.unexpected)):
            if left:
                lines.append(f"  {title} {', '.join(left)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """A plan that fits: the values by parameter, and the report of what :meth:`apply` does."""

    values: dict[str, Tensor]
    report: ImportReport

    def apply(self, model: nn.Module) -> None:
        """Overwrite the parameters of ``model``, converted to their type and device."""
        parameters = dict(model.named_parameters())
        empty = [name for name, value in self.values.items() if value.is_meta or parameters[name].is_meta]
        if empty:
            raise WeightImportError(
                f"{self.report.source}: model or weights lie on the meta device and have no values",
                problems=[f"{len(empty)} parameters, {empty[0]} the first"],
            )
        with torch.no_grad():
            for name, value in self.values.items():
                parameters[name].copy_(value)


def draw_plan(
    model: nn.Module, blueprint: Blueprint, weights: Weights, kind: str, source: str, strict: bool
) -> Plan:
    """Make every tensor and compare it with the parameter it is for.

    Raises:
        WeightImportError: shapes or counts that do not fit, and with ``strict`` any missing or unexpected
            name; all of them are named at once.
    """
    parameters = dict(model.named_parameters())
    problems, missing = list(blueprint.problems), []
    values: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}
    untouched = dict(blueprint.untouched)
    for target, recipe in blueprint.recipes.items():
        absent = [name for name in recipe.sources if name not in weights.tensors]
        if absent:
            missing += absent
            untouched[target] = "the file lacks it"
            continue
        made = _make(recipe, weights, target, parameters[target], problems)
        if isinstance(made, Adapted):
            adapted[target] = made.how
            made = made.tensor
        if made is not None:
            values[target] = made
    used = {name for recipe in blueprint.recipes.values() for name in recipe.sources}
    ignored = {name: reason for name, reason in sorted(blueprint.ignored.items()) if name not in used}
    unexpected = sorted(set(weights.tensors) - used - set(ignored))
    ignored |= {name: f"no tensor but {what}" for name, what in weights.others.items()}
    missing = sorted(set(missing))
    for name in parameters:
        if name not in blueprint.recipes:
            untouched.setdefault(name, f"no part of {kind} weights")
    if problems or (strict and (missing or unexpected)):
        raise WeightImportError(
            f"{source} does not fit the model as {kind} weights; nothing was loaded",
            problems,
            missing,
            unexpected,
        )
    report = ImportReport(
        kind, source, tuple(values), tuple(missing), tuple(unexpected), ignored, adapted, untouched
    )
    return Plan(values, report)


def _make(
    recipe: Recipe, weights: Weights, target: str, parameter: Tensor, problems: list[str]
) -> Tensor | Adapted | None:
    """The tensor for ``target``; None, with a line in ``problems``, where there is none."""
    origin = " + ".join(recipe.sources)
    pieces = [weights.tensors[name] for name in recipe.sources]
    integers = [p.dtype for p in pieces if not p.is_floating_point()]
    if integers:
        problems.append(f"{origin} is of {integers[0]}, not floating point")
        return None
    try:
        made = recipe.build(*pieces)
    except Misfit as misfit:
        problems.append(f"{origin}: {misfit}")
        return None
    shape = (made.tensor if isinstance(made, Adapted) else made).shape
    wanted = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves an empty tensor, and its shape
    if shape != wanted:
        problems.append(f"{origin} gives {list(shape)}, but {target} is {list(wanted)}")
        return None
    return made


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def flat(tensor: Tensor) -> Tensor:
    """One vector, whatever leading dimensions of size one it came with."""
    return tensor.reshape(-1)


def stacked(*tensors: Tensor) -> Tensor:
    """Rows of all, one below the other."""
    if len({tensor.shape for tensor in tensors}) > 1:
        raise Misfit(f"shapes differ: {', '.join(str(list(tensor.shape)) for tensor in tensors)}")
    return torch.cat(tensors)


def rows_at_most(rows: int, field_name: str) -> Callable[[Tensor], Tensor | Adapted]:
    """Builder: the first ``rows`` rows, as the configuration's ``field_name`` says; fewer do not fit."""

    def build(tensor: Tensor) -> Tensor | Adapted:
        have = tensor.shape[0] if tensor.ndim else 0
        if have < rows:
            raise Misfit(f"{have} rows, but {field_name} is {rows}")
        return tensor if have == rows else Adapted(tensor[:rows], f"the first {rows} of {have} rows")

    return build


def module_recipes(ours: str, *theirs: str) -> dict[str, Recipe]:
    """Recipes for weight and bias of ``ours``; in ``theirs`` ``{}`` stands for the word weight or bias.

    Of several names the rows are stacked.
    """
    return {
        f"{ours}.{part}": Recipe(tuple(name.format(part) for name in theirs), stacked)
        for part in ("weight", "bias")
    }


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """One more than the highest number N in names that begin with ``prefix`` and ``N.``."""
    numbers = [int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ... {names[-1]} ({len(names)} in all)"
