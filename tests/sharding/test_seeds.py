"""Promises of sharding/seeds.py and of the errors that cross process boundaries."""

import pickle

import numpy as np
import pytest

from sharding.errors import BadData
from sharding.seeds import derive_seed, generator


def test_a_seed_is_the_same_for_ever():
    # Written down once: a change here changes the data order and masks of every run that was ever started.
    assert derive_seed(0, "order.window", 3, "digest") == derive_seed(0, "order.window", 3, "digest")
    assert derive_seed(7, "augment", 1, 2) == 6607692296699643177


def test_a_seed_fits_a_signed_64_bit_integer():
    seeds = [derive_seed(-5, "x", key) for key in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


def test_every_argument_changes_the_seed_and_none_run_together():
    calls = [
        (1, "a"), (2, "a"), (1, "b"), (1, "a", 1), (1, "a", "1"), (1, "a", 1, 1), (1, "a", 11),
        (1, "ab", "c"), (1, "a", "bc"), (1, "a", "", "bc"), (1, "a", "bc", ""), (-1, "a"),
    ]  # fmt: skip
    assert len({derive_seed(*call) for call in calls}) == len(calls)


def test_a_numpy_integer_is_the_same_key_as_a_plain_one():
    import numpy as np

    assert derive_seed(np.int64(4), "a", np.int32(2)) == derive_seed(4, "a", 2)


def test_bad_data_keeps_cause_and_detail_through_pickling():
    error = pickle.loads(pickle.dumps(BadData("checksum-mismatch", "shard 000001 key a")))  # noqa: S301
    assert (error.cause, error.detail) == ("checksum-mismatch", "shard 000001 key a")
    assert str(error) == "checksum-mismatch: shard 000001 key a"


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**64 - 1])
def test_a_generator_draws_what_philox_draws_with_the_seed_as_its_key(seed: int) -> None:
    expected = np.random.Generator(np.random.Philox(key=seed))
    drawn = generator(seed)
    assert drawn.random(9).tolist() == expected.random(9).tolist()
    assert drawn.integers(1000, size=9).tolist() == expected.integers(1000, size=9).tolist()
