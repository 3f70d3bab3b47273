"""Which of many 64-bit hashes lie within a Hamming distance of an earlier one: exact, in memory, no storage.

Pigeonhole: 64 bits are cut into m = d + r disjoint *blocks*. Two hashes that differ in at most d bits are equal on
at least r blocks. So hashes are grouped by their bits on r blocks, for every choice of r of the m, and compared
within the groups only. Choices are taken in ascending order and share their prefixes (d = 2, r = 2, m = 4)::

    group by block 0 --+-- and by block 1        only groups that are still large are cut further
                       +-- and by block 2
                       +-- and by block 3
    group by block 1 --+-- and by block 2
                       +-- and by block 3
    group by block 2 ----- and by block 3        the first choice is one of d + 1: a *band*

The d + 1 bands are independent, and within a band so are hashes that differ on its block: that is how the work is
spread over tasks of bounded size (``sharding/stages.py``).

Equal hashes are collapsed to their first occurrence before (``later_copies``), so a hash that a million blank
images share is looked at once. What is wanted is only whether *some* earlier hash is near, so within a group what
is found needs no more comparisons: a dense heap of different hashes is settled by its first members.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

from sharding.filters.duplicates import later_copies, mixed

BITS = 64

# Groups up to this size are compared as they are: cutting a row further costs as much as some hundred comparisons.
_LEAF = 256
# Groups up to this size are compared all together, by shifting one against the other.
_TINY = 12
# Rows and columns of a table of distances: 2 MiB of XORs stay in the processor's cache.
_STEP = 512
# Groups that no block cuts any more are cut anew by their other bits above this size.
_HUGE = 16 * _STEP
_ROUNDS = 3

_SORT_NS, _COMPARE_NS = 100.0, 1.5

_EARLIER = np.tri(_STEP, k=-1, dtype=bool)


@dataclass(frozen=True)
class Blocks:
    """How hashes are cut: disjoint ``masks``, of which pairs within ``distance`` share ``len(masks) - distance``."""

    distance: int
    masks: tuple[int, ...]

    @property
    def bands(self) -> int:
        """Choices of the first shared block."""
        return self.distance + 1

    @property
    def shared(self) -> int:
        """Blocks (r) on which two hashes within the distance are equal at least."""
        return len(self.masks) - self.distance

    def band_keys(self, hashes: np.ndarray, band: int) -> np.ndarray:
        """uint64 [N], well mixed: near hashes that a band has to find have equal keys."""
        return mixed(hashes & np.uint64(self.masks[band]))


def cut(distance: int, samples: int, bits: int = 2**BITS - 1) -> Blocks:
    """The blocks with which ``samples`` different hashes are searched soonest.

    Args:
        distance: at least 1.
        bits: mask of the bits to cut, more than ``distance`` of them.
    """
    places = [place for place in range(BITS) if bits >> place & 1]
    choices = range(1, max(2, min(len(places) - distance, 8) + 1))
    shared = min(choices, key=lambda r: _cost(distance, r, samples, len(places)))
    count = distance + shared
    # Striped, since the bits of a perceptual hash are ordered by frequency and the low ones are more alike.
    masks = tuple(sum(1 << place for place in places[number::count]) for number in range(count))
    return Blocks(distance, masks)


def _cost(distance: int, shared: int, samples: int, bits: int) -> float:
    """Nanoseconds for each hash, were all bits fair coins."""
    total, keyed = 0.0, bits / (distance + shared)
    for level in range(1, shared + 1):
        groupings, group = comb(distance + level, level), samples / 2 ** (level * keyed)
        total += groupings * _SORT_NS
        if level == shared or group <= _LEAF:
            return total + groupings * group * _COMPARE_NS
    return total


def near_earlier(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Which hashes differ from some earlier one in at most ``distance`` bits: bool [N].

    Args:
        hashes: uint64 [N] in input order.
        distance: 0 to 16.
    """
    found = later_copies(hashes[:, None])
    if distance:
        first = np.flatnonzero(~found)
        blocks = cut(distance, len(first))
        for band in range(blocks.bands):
            found[first] |= search_band(hashes[first], blocks, band)
    return found


def search_band(hashes: np.ndarray, blocks: Blocks, band: int) -> np.ndarray:
    """One band's part of the search: bool [N], True only where an earlier hash is near.

    Args:
        hashes: uint64 [N], different ones, in input order. All that have one key (``Blocks.band_keys``) must be
            there together.
    """
    search = _Search(hashes, blocks.distance)
    search.refine(np.arange(len(hashes)), blocks, band, used=blocks.masks[band], left=blocks.shared - 1)
    return search.found


class _Search:
    """``found`` [N] grows while groups are compared."""

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        self.found = np.zeros(len(hashes), dtype=bool)
        self._hashes, self._distance = hashes, distance

    def refine(
        self, rows: np.ndarray, blocks: Blocks, last: int, *, used: int, left: int, round_: int = 1
    ) -> None:
        """Group ``rows`` (ascending) by the bits ``used``; compare small groups, cut large ones further.

        Args:
            last: the highest block that is in ``used``; later ones may follow.
            left: how many blocks must follow.
        """
        if len(rows) < 2:
            return
        rows, starts = self._grouped(rows, used)
        sizes = np.diff(starts, append=len(rows))
        self._compare_tiny(rows, starts, sizes)
        large = _LEAF if left else _HUGE
        for group in np.flatnonzero((sizes > _TINY) & (sizes <= large)).tolist():
            self._compare(rows[starts[group] : starts[group] + sizes[group]])
        if left:
            rest = np.sort(rows[np.repeat(sizes > large, sizes)])
            for block in range(last + 1, len(blocks.masks) - left + 1):
                self.refine(
                    rest, blocks, block, used=used | blocks.masks[block], left=left - 1, round_=round_
                )
            return
        for group in np.flatnonzero(sizes > large).tolist():
            self._settle(rows[starts[group] : starts[group] + sizes[group]], used, round_)

    def _grouped(self, rows: np.ndarray, used: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ordered by group, ascending within, and where groups start; groups of one are left out, and those
        in which all but the first are found already.
        """
        # One sort of plain words is several times faster than an argsort: the key above, the row's place below.
        # Keys that collide above only make a group larger.
        width = np.uint64(int(len(rows) - 1).bit_length())
        keys = mixed(self._hashes[rows] & np.uint64(used)) >> width << width
        keys |= np.arange(len(rows), dtype=np.uint64)
        keys.sort()
        rows = rows[(keys & ((np.uint64(1) << width) - np.uint64(1))).astype(np.int64)]
        keys >>= width
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(starts, append=len(rows))
        open_ = ~self.found[rows]
        open_[starts] = False
        kept = np.add.reduceat(open_, starts, dtype=np.int64) > 0
        rows = rows[np.repeat(kept, sizes)]
        sizes = sizes[kept]
        return rows, np.cumsum(sizes) - sizes

    def _compare_tiny(self, rows: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        tiny = sizes <= _TINY
        sizes = sizes[tiny]
        # Place of each row in its group's rest: how many of the group come after it.
        place = np.repeat(starts[tiny], sizes) + _ranges(sizes)
        after = np.repeat(sizes, sizes) - _ranges(sizes) - 1
        hashes = self._hashes
        for shift in range(1, _TINY):
            keep = after >= shift
            place, after = place[keep], after[keep]
            if not len(place):
                return
            later = rows[place + shift]
            near = np.bitwise_count(hashes[rows[place]] ^ hashes[later]) <= self._distance
            self.found[later[near]] = True

    def _compare(self, rows: np.ndarray) -> None:
        """All pairs of a group (rows ascending), a table of ``_STEP`` x ``_STEP`` at a time."""
        hashes = self._hashes[rows]
        for start in range(0, len(rows), _STEP):
            earlier = hashes[start : start + _STEP]
            open_ = start + np.flatnonzero(~self.found[rows[start:]])
            for first in range(0, len(open_), _STEP):
                later = open_[first : first + _STEP]
                near = np.bitwise_count(hashes[later, None] ^ earlier) <= self._distance
                if later[0] < start + _STEP:
                    near &= later[:, None] > np.arange(start, start + len(earlier))
                self.found[rows[later[near.any(axis=1)]]] = True

    def _settle(self, rows: np.ndarray, used: int, round_: int) -> None:
        """A huge group that agrees on all bits ``used``: what its first members do not settle is cut anew."""
        hashes = self._hashes[rows]
        for first in range(0, len(rows), _STEP):
            part = slice(first, first + _STEP)
            near = np.bitwise_count(hashes[part, None] ^ hashes[:_STEP]) <= self._distance
            if first == 0:
                near &= _EARLIER
            self.found[rows[part][near.any(axis=1)]] = True
        open_ = int(np.count_nonzero(~self.found[rows]))
        free = (2**BITS - 1) & ~used
        if round_ < _ROUNDS and free.bit_count() > self._distance:
            blocks = cut(self._distance, len(rows), free)
            expected = _cost(self._distance, blocks.shared, len(rows), free.bit_count())
            if expected * len(rows) < open_ * len(rows) * _COMPARE_NS / 2:
                for band in range(blocks.bands):
                    self.refine(
                        rows,
                        blocks,
                        band,
                        used=used | blocks.masks[band],
                        left=blocks.shared - 1,
                        round_=round_ + 1,
                    )
                return
        self._compare(rows)


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """0..size-1 for each size, one after another."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
