"""Which pairs of objects are held out: a pure function of their names, the same for every seed and table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharding.scenes.config import Split
from sharding.seeds import derive_seed


def pair_draws(names: Sequence[str], split_seed: int) -> np.ndarray:
    """float64 [N, N] in [0, 1): the draw of each pair of names; symmetric, and of those two names only."""
    own = np.array([derive_seed(split_seed, "scenes.held-out", name) for name in names], np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        mixed = own[:, None] + own[None, :]
        # The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit depends on every bit of both.
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) / float(1 << 53)


def pairs_of(split: Split, draws: np.ndarray, held_out: float) -> np.ndarray:
    """bool, as ``draws``: whether the pair belongs to the split; each pair belongs to one."""
    if split == "test":
        return draws < held_out
    if split == "val":
        return (draws >= held_out) & (draws < 2 * held_out)
    return draws >= 2 * held_out
