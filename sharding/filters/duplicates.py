"""Exact duplicates: which of many keys have occurred before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def later_copies(keys: np.ndarray) -> np.ndarray:
    """Which keys have occurred before: bool [N].

    Args:
        keys: uint64 [N, W], in input order: W words each, e.g. the first 16 bytes of a sha256. (Two different
            files among 10^10 share those with a probability of about 10^-19.)
    """
    # lexsort is stable, so that among equal keys the first in input order comes first.
    order = np.lexsort(keys.T)
    ranked = keys[order]
    copies = np.zeros(len(keys), dtype=bool)
    copies[order[1:]] = (ranked[1:] == ranked[:-1]).all(axis=1)
    return copies


def digest_words(digests: Sequence[str]) -> np.ndarray:
    """uint64 [N, 2]: the first 16 bytes of hexadecimal digests."""
    raw = bytes.fromhex("".join(digest[:32] for digest in digests))
    return np.frombuffer(raw, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def mixed(words: np.ndarray) -> np.ndarray:
    """A bijection of uint64 [N] whose result looks random in every bit (the finaliser of MurmurHash3)."""
    mixed = words ^ (words >> np.uint64(33))
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return mixed
