"""Promises of the search for near duplicates: every pair within the distance is found, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sharding.filters import near
from sharding.filters.near import cut, near_earlier, search_band


def _brute(hashes: np.ndarray, distance: int) -> np.ndarray:
    found = np.zeros(len(hashes), bool)
    for row in range(1, len(hashes)):
        found[row] = (np.bitwise_count(hashes[:row] ^ hashes[row]) <= distance).any()
    return found


def _clustered(seed: int, count: int, centres: int, flips: int) -> np.ndarray:
    """Hashes around random centres, each up to ``flips`` bits away from its own."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, centres, np.uint64)[generator.integers(0, centres, count)]
    for _ in range(flips):
        hashes = hashes ^ (np.uint64(1) << generator.integers(0, 64, count, np.uint64))
    return hashes


@pytest.fixture(params=["as it is", "small groups"])
def thresholds(request, monkeypatch):
    """With small thresholds, small inputs too take the ways of large ones."""
    if request.param == "small groups":
        monkeypatch.setattr(near, "_LEAF", 4)
        monkeypatch.setattr(near, "_TINY", 2)
        monkeypatch.setattr(near, "_HUGE", 600)


@pytest.mark.parametrize("distance", range(17))
def test_every_near_pair_is_found_and_no_other(thresholds, distance):
    for seed, (count, centres, flips) in enumerate(
        [(1200, 250, 3), (1200, 30, 8), (1200, 1, 5), (900, 450, distance), (1500, 2, 12)]
    ):
        hashes = _clustered(seed, count, centres, flips)
        assert (near_earlier(hashes, distance) == _brute(hashes, distance)).all()


@pytest.mark.parametrize("distance", [1, 4, 16])
def test_hashes_that_share_most_bits_are_searched_rightly(thresholds, distance):
    # Only 20 bits vary, as of a corpus of drawings on white: blocks of the others cut nothing.
    hashes = _clustered(7, 2500, 900, 20) & np.uint64(0x0000_00FF_0F0F_000F)
    assert (near_earlier(hashes, distance) == _brute(hashes, distance)).all()


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 7, 10, 16])
def test_pairs_whose_bits_differ_in_every_block_but_the_fewest_are_found(distance, monkeypatch):
    """The adversary's choice: exactly ``distance`` bits, spread over as many blocks as there are."""
    monkeypatch.setattr(near, "_LEAF", 1)  # groups are cut by as many blocks as pairs share, however small
    monkeypatch.setattr(near, "_TINY", 1)
    generator = np.random.default_rng(distance)
    for samples in (10**3, 10**6, 10**9):
        blocks = cut(distance, samples)
        choices = list(itertools.combinations(range(len(blocks.masks)), distance))
        for number in generator.permutation(len(choices))[:60]:
            places = [
                generator.choice([p for p in range(64) if blocks.masks[block] >> p & 1])
                for block in choices[number]
            ]
            base = generator.integers(0, 2**64, dtype=np.uint64)
            other = base ^ np.uint64(sum(1 << int(place) for place in places))
            pair = np.array([base, other])
            found = np.zeros(2, bool)
            for band in range(blocks.bands):
                keys = blocks.band_keys(pair, band)
                if keys[0] == keys[1]:  # else its two hashes need not be in one task
                    found |= search_band(pair, blocks, band)
            assert found.tolist() == [False, True]


def test_the_blocks_are_disjoint_and_share_as_many_as_the_pigeonholes_say():
    for distance in range(1, 17):
        for samples in (10, 10**6, 10**9):
            blocks = cut(distance, samples)
            assert sum(mask.bit_count() for mask in blocks.masks) == 64
            assert sum(blocks.masks) == 2**64 - 1
            assert blocks.shared >= 1
            assert blocks.bands == distance + 1


def test_a_chain_of_neighbours_leaves_its_first_only():
    chain = np.cumsum(np.concatenate([[0], 1 << np.arange(20)])).astype(np.uint64)  # one bit more each
    assert near_earlier(chain, 1).tolist() == [False] + [True] * 20


def test_one_hash_a_million_times_and_a_heap_of_neighbours_are_settled_by_their_first(monkeypatch):
    compared = 0
    real = np.bitwise_count

    def counting(words):
        nonlocal compared
        compared += words.size
        return real(words)

    monkeypatch.setattr(np, "bitwise_count", counting)
    hashes = np.zeros(10**6, np.uint64)
    assert near_earlier(hashes, 4).sum() == 10**6 - 1
    assert compared == 0
    heap = np.concatenate([np.zeros(1, np.uint64), np.uint64(1) << np.arange(64, dtype=np.uint64)])
    pairs = np.unique(heap[:, None] | heap)
    triples = np.unique(pairs[:, None] | heap)  # 43,745 hashes, all within 3 bits of the first
    assert near_earlier(triples, 3).sum() == len(triples) - 1
    assert compared < len(triples) ** 2 / 10


def test_no_hash_and_one_hash_have_no_earlier_ones():
    for count in (0, 1):
        assert not near_earlier(np.zeros(count, np.uint64), 4).any()
