"""What a dataset holds, in numbers: distributions of its samples' sizes, lengths and scores, from the indexes.

A ``Statistics`` of any number of samples takes the same few kilobytes, and two of them add up (``plus``) to what
all samples together would have given; so tasks, shards and threads may each make their own. Media are not read.
Counts, bounds and means are exact (means to rounding); quantiles are as fine as the bins, 6 to 12 % of the value.

    statistics = dataset_statistics(storage.at(path), load_manifest(storage.at(path)))
    for row in statistics.rows():          # the labels of ROW_HEAD, as text
        print(*row)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.index import load_index
from sharding.manifest import Manifest, ShardRecord
from sharding.overlay import Dropped
from sharding.storage import Storage

ROW_HEAD = ("", "smallest", "5 %", "median", "mean", "95 %", "largest")

# Bins per doubling: neighbouring edges differ by 6 to 12 %.
_PER_DOUBLING = 8
_LINEAR_STEP = 0.02
# Below the bin of every float, so that zeros (which have no logarithm) come first.
_ZERO_BIN = -100_000
_READERS = 8
_SHARDS_AT_ONCE = 64


@dataclass(frozen=True)
class Quantity:
    """A number that each sample has: ``label`` and ``unit`` for people; ``linear`` bins where it may be negative.

    ``whole``: always a whole number, and so are its quantiles.
    """

    label: str
    unit: str = ""
    linear: bool = False
    whole: bool = True


#: By the name under which ``Statistics.distributions`` has them, in the order in which they are shown.
QUANTITIES: Mapping[str, Quantity] = {
    "width": Quantity("width", "px"),
    "height": Quantity("height", "px"),
    "aspect": Quantity("aspect (width / height)", whole=False),
    "frames": Quantity("frames"),
    "duration": Quantity("duration", "s", whole=False),
    "caption_length": Quantity("caption", "characters"),
    "caption_words": Quantity("caption", "words"),
    "captions": Quantity("captions a sample"),
    "media_size": Quantity("media", "bytes"),
    "score": Quantity("score", linear=True, whole=False),
}


@dataclass(frozen=True)
class Distribution:
    """How the values of one quantity spread. ``bins``: number of values by bin (see ``bin_edges``)."""

    count: int = 0
    total: float = 0.0
    smallest: float = math.inf
    largest: float = -math.inf
    bins: Mapping[int, int] = field(default_factory=dict)
    linear: bool = False

    @classmethod
    def of(cls, values: np.ndarray, *, linear: bool = False) -> Distribution:
        """Of finite float64 values [N]; not negative, unless ``linear``. Others (NaN, infinite) are left out."""
        values = values[np.isfinite(values)]
        if not linear:
            values = values[values >= 0]
        if not len(values):
            return cls(linear=linear)
        numbers, counts = np.unique(_bin_numbers(values, linear), return_counts=True)
        return cls(
            count=len(values),
            total=math.fsum(values.tolist()),
            smallest=float(values.min()),
            largest=float(values.max()),
            bins=dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
            linear=linear,
        )

    def plus(self, other: Distribution) -> Distribution:
        """Of the values of both."""
        assert self.linear == other.linear
        bins = {b: self.bins.get(b, 0) + other.bins.get(b, 0) for b in sorted({*self.bins, *other.bins})}
        return Distribution(
            count=self.count + other.count,
            total=self.total + other.total,
            smallest=min(self.smallest, other.smallest),
            largest=max(self.largest, other.largest),
            bins=bins,
            linear=self.linear,
        )

    @property
    def mean(self) -> float:
        """NaN where there is no value."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the values lie, to within its bin; NaN where there is none."""
        if not self.count:
            return math.nan
        wanted, below = share * self.count, 0
        for number in sorted(self.bins):
            inside = self.bins[number]
            if below + inside >= wanted:
                low, high = bin_edges(number, linear=self.linear)
                low, high = max(low, self.smallest), min(high, self.largest)
                return low + (high - low) * max(0.0, wanted - below) / inside
            below += inside
        return self.largest

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``from_json`` makes the same distribution of it."""
        bounds = [self.smallest, self.largest] if self.count else None
        bins = [[number, self.bins[number]] for number in sorted(self.bins)]
        return {"total": self.total, "bounds": bounds, "bins": bins, "linear": self.linear}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Distribution:
        if value["bounds"] is None:
            return cls(linear=value["linear"])
        bins = {int(number): int(count) for number, count in value["bins"]}
        smallest, largest = value["bounds"]
        return cls(sum(bins.values()), value["total"], smallest, largest, bins, value["linear"])


def _bin_numbers(values: np.ndarray, linear: bool) -> np.ndarray:
    if linear:
        return np.floor(values / _LINEAR_STEP).astype(np.int64)
    # frexp is exact, unlike a logarithm: equal values fall into the same bin on every machine.
    mantissas, exponents = np.frexp(values)
    within = np.floor((mantissas - 0.5) * 2 * _PER_DOUBLING).astype(np.int64)
    return np.where(values == 0, _ZERO_BIN, exponents.astype(np.int64) * _PER_DOUBLING + within)


def bin_edges(number: int, *, linear: bool = False) -> tuple[float, float]:
    """The values from (included) and to (excluded) which a bin of ``Distribution.bins`` reaches."""
    if linear:
        return number * _LINEAR_STEP, (number + 1) * _LINEAR_STEP
    if number == _ZERO_BIN:
        return 0.0, 0.0
    exponent, within = divmod(number, _PER_DOUBLING)
    unit = 0.5 / _PER_DOUBLING
    return math.ldexp(0.5 + within * unit, exponent), math.ldexp(0.5 + (within + 1) * unit, exponent)


@dataclass(frozen=True)
class Statistics:
    """Of a number of samples.

    Args:
        samples: how many.
        shards: in how many shards.
        shard_bytes: of these shards' tars (all samples of a shard, dropped ones too).
        media_bytes: of the samples' media members.
        captions: how many captions they have in all.
        extensions: samples by the media's extension, e.g. ``{"webp": 12}``.
        distributions: by the names of ``QUANTITIES``; without those that say nothing (scores where there was no
            scorer, frames and duration of images).
    """

    samples: int = 0
    shards: int = 0
    shard_bytes: int = 0
    media_bytes: int = 0
    captions: int = 0
    extensions: Mapping[str, int] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)

    def plus(self, other: Statistics) -> Statistics:
        """Of the samples of both."""
        mine, theirs = self.distributions, other.distributions
        names = [name for name in QUANTITIES if name in mine or name in theirs]
        none = {name: Distribution(linear=QUANTITIES[name].linear) for name in names}
        extensions = sorted({*self.extensions, *other.extensions})
        return Statistics(
            samples=self.samples + other.samples,
            shards=self.shards + other.shards,
            shard_bytes=self.shard_bytes + other.shard_bytes,
            media_bytes=self.media_bytes + other.media_bytes,
            captions=self.captions + other.captions,
            extensions={e: self.extensions.get(e, 0) + other.extensions.get(e, 0) for e in extensions},
            distributions={n: mine.get(n, none[n]).plus(theirs.get(n, none[n])) for n in names},
        )

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A line of text for each distribution; its cells are those of ``ROW_HEAD``."""
        for name, found in self.distributions.items():
            quantity = QUANTITIES[name]
            label = f"{quantity.label}, {quantity.unit}" if quantity.unit else quantity.label
            low, middle, high = (found.quantile(share) for share in (0.05, 0.5, 0.95))
            if quantity.whole:
                low, middle, high = math.floor(low), math.floor(middle), math.floor(high)
            values = (found.smallest, low, middle, found.mean, high, found.largest)
            yield (label, *(short_number(value) for value in values))

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``from_json`` makes the same statistics of it."""
        numbers = {
            name: getattr(self, name)
            for name in ("samples", "shards", "shard_bytes", "media_bytes", "captions")
        }
        spread = {name: found.to_json() for name, found in self.distributions.items()}
        return {**numbers, "extensions": dict(self.extensions), "distributions": spread}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        spread = value["distributions"]
        ordered = {name: Distribution.from_json(spread[name]) for name in QUANTITIES if name in spread}
        return cls(**{**value, "distributions": ordered})


def index_statistics(index: pa.Table, shard: ShardRecord | None = None) -> Statistics:
    """Of the samples of one index, all or some of its rows; ``shard`` is the record of the tar they lie in."""
    columns = {name: _floats(index, name) for name in QUANTITIES if name in index.column_names}
    width, height = columns["width"], columns["height"]
    columns["aspect"] = np.divide(width, height, out=np.full_like(width, np.nan), where=height > 0)
    if not columns["duration"].any() and (columns["frames"] == 1).all():
        del columns["duration"], columns["frames"]
    spread = {
        name: Distribution.of(columns[name], linear=quantity.linear)
        for name, quantity in QUANTITIES.items()
        if name in columns
    }
    extensions = pc.value_counts(index.column("extension")).to_pylist()
    return Statistics(
        samples=len(index),
        shards=0 if shard is None else 1,
        shard_bytes=0 if shard is None else shard.bytes,
        media_bytes=int(pc.sum(index.column("media_size")).as_py() or 0),
        captions=int(pc.sum(index.column("captions")).as_py() or 0),
        extensions={str(item["values"]): int(item["counts"]) for item in extensions},
        distributions={name: found for name, found in spread.items() if found.count},
    )


def _floats(index: pa.Table, name: str) -> np.ndarray:
    """float64 [N]; NaN where there is no value."""
    column = pc.cast(index.column(name), pa.float64()).combine_chunks()
    return np.asarray(column.fill_null(math.nan).to_numpy(zero_copy_only=False), np.float64)


def dataset_statistics(dataset: Storage, manifest: Manifest) -> Statistics:
    """Of all samples of a dataset but those that its overlay drops, from its shards' indexes.

    Reads each index once, a few at a time; holds at most 64 of them.

    Raises:
        BadData: an index is missing or is not the manifest's; the detail names its url.
    """
    dropped = Dropped(dataset, manifest)

    def read(number: int) -> Statistics:
        shard = manifest.shards[number]
        index = load_index(dataset, shard)
        if len(dropped):
            index = index.filter(pa.array(~dropped.mask(number, index.column("key"))))
        return index_statistics(index, shard)

    total = Statistics()
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(manifest.shards), _SHARDS_AT_ONCE):
            numbers = range(start, min(start + _SHARDS_AT_ONCE, len(manifest.shards)))
            for found in pool.map(read, numbers):
                total = total.plus(found)
    return total


def short_number(value: float) -> str:
    """Three figures for people: ``1,234``, ``12.3``, ``0.0123``; ``–`` for NaN and the infinite."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
