"""Files of pieces: stretches of flattened parameters, whoever owned them, found again by name and place.

::

    "fusion.0.attention.query.weight", 96 x 96 = 9216 numbers

    worker 0, ZeRO 2:   [0 ........ 5000)                 two pieces, in two files
    worker 1, ZeRO 2:                  [5000 ..... 9216)
    read by 3 workers:  [0 ... 3072) [3072 ... 6144) [6144 ... 9216)

A file is plain safetensors. Its tensors are 1-D fp32, named ``KIND/PARAMETER@START``; the kinds are ``weight`` and
what the optimizer keeps for each number (AdamW: ``exp_avg``, ``exp_avg_sq``). The header's metadata holds, for each
piece, how many updates the optimizer has counted.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sharding.errors import BadData

if TYPE_CHECKING:
    from types import TracebackType

WEIGHT = "weight"


@dataclass(frozen=True, order=True)
class Stretch:
    """Numbers ``start`` to ``start + length`` of a flattened parameter."""

    parameter: str
    start: int
    length: int

    @property
    def label(self) -> str:
        return f"{self.parameter}@{self.start}"


def write_pieces(
    path: Path, values: Mapping[Stretch, Mapping[str, torch.Tensor]], updates: Mapping[Stretch, int]
) -> None:
    """Write one worker's pieces.

    Args:
        values: of each stretch its kinds, fp32 [length] on the CPU.
        updates: how many updates the optimizer has counted.
    """
    tensors = {
        f"{kind}/{stretch.label}": tensor
        for stretch, kinds in values.items()
        for kind, tensor in kinds.items()
    }
    counted = {stretch.label: updates[stretch] for stretch in values}
    save_file(tensors, path, metadata={"updates": json.dumps(counted, sort_keys=True)})


@dataclass(frozen=True)
class _Place:
    stretch: Stretch
    file: Any  # of safetensors, open
    updates: int


class Pieces:
    """The pieces of several files, to be read as if they were whole parameters.

    Args:
        paths: files of :func:`write_pieces`, their bytes verified. They stay mapped until ``close``.

    Raises:
        BadData: a file is not one of these.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._open = ExitStack()
        self._places: dict[str, list[_Place]] = {}
        for path in paths:
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                self._add(file)
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                self._open.close()
                raise BadData("not-pieces", f"{path.name}: {error}") from None
        for places in self._places.values():
            places.sort(key=lambda place: place.stretch.start)

    def __enter__(self) -> Pieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _add(self, file: Any) -> None:
        updates = json.loads(file.metadata()["updates"])
        for name in file.keys():  # noqa: SIM118 - not a mapping
            kind, _, label = name.partition("/")
            if kind != WEIGHT:
                continue
            parameter, _, start = label.rpartition("@")
            stretch = Stretch(parameter, int(start), int(file.get_slice(name).get_shape()[0]))
            self._places.setdefault(parameter, []).append(_Place(stretch, file, int(updates[label])))

    def missing(self, wanted: Iterable[Stretch]) -> list[Stretch]:
        """Those of ``wanted`` that are not here from end to end."""
        return [stretch for stretch in wanted if sum(n for *_, n in self._cuts(stretch)) != stretch.length]

    def read(self, wanted: Stretch, kind: str) -> torch.Tensor:
        """fp32 [wanted.length].

        Raises:
            BadData: it is not here.
        """
        values = torch.empty(wanted.length)
        filled = 0
        for place, inside, at, count in self._cuts(wanted):
            name = f"{kind}/{place.stretch.label}"
            try:
                values[at : at + count] = place.file.get_slice(name)[inside : inside + count]
            except SafetensorError as error:
                raise BadData("missing-piece", f"{name}: {error}") from None
            filled += count
        if filled != wanted.length:
            raise BadData("missing-piece", f"{wanted.length - filled} numbers of {wanted} are in no file")
        return values

    def updates(self, wanted: Stretch) -> int:
        """How many updates the optimizer has counted."""
        return max((place.updates for place, *_ in self._cuts(wanted)), default=0)

    def parameters(self) -> dict[str, int]:
        """Numbers that are here of each parameter."""
        return {name: sum(p.stretch.length for p in places) for name, places in sorted(self._places.items())}

    def _cuts(self, wanted: Stretch) -> Iterator[tuple[_Place, int, int, int]]:
        """The pieces that ``wanted`` lies in: (piece, start in it, start in ``wanted``, count); none twice."""
        places = self._places.get(wanted.parameter, [])
        end, at = wanted.start + wanted.length, wanted.start
        first = bisect_right(places, wanted.start, key=lambda place: place.stretch.start) - 1
        for place in places[max(0, first) :]:
            stretch = place.stretch
            if stretch.start >= end:
                break
            stop = min(end, stretch.start + stretch.length)
            if stretch.start <= at < stop:
                yield place, at - stretch.start, at - wanted.start, stop - at
                at = stop
