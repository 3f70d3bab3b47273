"""Exact duplicates over a whole corpus, by the sha256 of the source's bytes."""

from __future__ import annotations

import numpy as np


def later_copies(digests: np.ndarray) -> np.ndarray:
    """Which digests have occurred before: bool [N].

    Args:
        digests: uint64 [N, 2], the first 16 bytes of each sha256, in input order. (Two different files among
            10^10 share them with a probability of about 10^-19.)
    """
    # lexsort is stable, so that among equal digests the first in input order comes first.
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ranked = digests[order]
    copies = np.zeros(len(digests), dtype=bool)
    copies[order[1:]] = (ranked[1:] == ranked[:-1]).all(axis=1)
    return copies


def digest_words(sha256: list[str]) -> np.ndarray:
    """uint64 [N, 2]: the first 16 bytes of hexadecimal digests."""
    raw = b"".join(bytes.fromhex(digest[:32]) for digest in sha256)
    return np.frombuffer(raw, dtype=">u8").reshape(-1, 2).astype(np.uint64)
