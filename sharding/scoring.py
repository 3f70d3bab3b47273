"""Image-text scores: a scorer is handed in, since this package knows no model.

``prepare(..., scorers={"itc": factory})`` makes the filter ``{kind: score, scorer: itc}`` work. The factory
travels to the tasks; the scorer it makes is kept for as long as the worker's process lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

from sharding.errors import UserError
from sharding.filters.config import ScoreFilter
from sharding.media import Encoded

# Media that wait for their batch: clips are large.
_BATCH_BYTES = 64 * 2**20

# Decimals of a score that are kept and compared. The last bits of a float32 depend on the processor and on what
# else was in the batch; the bytes of a shard must not.
_DECIMALS = 4


@dataclass(frozen=True)
class ScoredSample:
    """What a scorer sees: the media as stored (``extension`` jpg, webp, png or mp4) and its captions, one or
    more.
    """

    media: bytes
    extension: str
    captions: list[str]


class Scorer(Protocol):
    """Scores samples in batches."""

    def score(self, samples: Sequence[ScoredSample]) -> Sequence[float]:
        """One finite number a sample, that of its best caption; alike for alike samples, whatever the batch.

        A number that is not finite, or a wrong count of them, is a bug of the scorer's and stops the job.
        """
        ...


class ScorerFactory(Hashable, Protocol):
    """Makes a scorer in each worker process. Picklable; equal factories make equal scorers."""

    @property
    def weights(self) -> str:
        """A digest of all that decides the scores but the block's other fields: part of the dataset's name."""
        ...

    def __call__(self, block: ScoreFilter) -> Scorer: ...


Scorers = Mapping[str, ScorerFactory]


def with_weights(block: ScoreFilter, scorers: Scorers) -> ScoreFilter:
    """The block with the digest of what will score, in place of an address.

    Raises:
        UserError: there is no such scorer, or the block asks for other weights.
    """
    if block.scorer not in scorers:
        there = f"there are {', '.join(sorted(scorers))}" if scorers else "none is handed in"
        raise UserError(f"filters: no scorer {block.scorer!r}; {there}")
    weights = scorers[block.scorer].weights
    if block.weights not in (None, weights):
        raise UserError(f"filters: {block.model or block.scorer} has weights {weights}, not {block.weights}")
    return block.model_copy(update={"weights": weights, "model": None})


@lru_cache(maxsize=4)
def _scorer(factory: ScorerFactory, block: ScoreFilter) -> Scorer:
    return factory(block)


Item = TypeVar("Item")


class Scoring:
    """Scores a stream of samples by one block of a configuration."""

    def __init__(self, block: ScoreFilter, factory: ScorerFactory) -> None:
        self._block, self._factory = block, factory

    def scored(
        self, items: Iterable[Item], sample_of: Callable[[Item], tuple[Encoded, list[str]]]
    ) -> Iterator[tuple[Item, float]]:
        """(item, score) in order; a batch at a time is held.

        Raises:
            RuntimeError: the scorer gave no number for a sample, or one that is not finite.
        """
        batch: list[Item] = []
        held = 0
        for item in items:
            batch.append(item)
            held += len(sample_of(item)[0].data)
            if len(batch) == self._block.batch or held >= _BATCH_BYTES:
                yield from self._score(batch, sample_of)
                batch, held = [], 0
        if batch:
            yield from self._score(batch, sample_of)

    def _score(
        self, batch: list[Item], sample_of: Callable[[Item], tuple[Encoded, list[str]]]
    ) -> Iterator[tuple[Item, float]]:
        samples = []
        for item in batch:
            media, captions = sample_of(item)
            samples.append(ScoredSample(media.data, media.extension, captions))
        scores = [float(score) for score in _scorer(self._factory, self._block).score(samples)]
        if len(scores) != len(batch) or not all(map(math.isfinite, scores)):
            raise RuntimeError(
                f"scorer {self._block.scorer!r} gave {scores} for {len(batch)} samples: one finite number each"
            )
        yield from zip(batch, (round(score, _DECIMALS) for score in scores), strict=True)

    def objection(self, score: float) -> str | None:
        """The cause under which a sample of this score is dropped; None where it stays."""
        if self._block.min is not None and score < self._block.min:
            return "score-too-low"
        return "score-too-high" if self._block.max is not None and score > self._block.max else None
