"""Promises of the statistics: they add up, they are bounded, and they are those of the samples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sharding.errors import BadData
from sharding.index import read_index
from sharding.statistics import (
    QUANTITIES,
    ROW_HEAD,
    Distribution,
    Statistics,
    bin_edges,
    dataset_statistics,
    index_statistics,
)
from sharding.storage import open_storage
from tests.sharding.datasets import write_dataset


def test_a_distribution_is_that_of_its_values_to_within_a_bin():
    values = np.random.default_rng(3).lognormal(4, 2, 20_000)
    found = Distribution.of(values)
    assert (found.count, found.smallest, found.largest) == (20_000, values.min(), values.max())
    assert math.isclose(found.mean, values.mean())
    assert len(found.bins) < 250
    for share in (0.01, 0.05, 0.5, 0.95, 0.99):
        assert math.isclose(found.quantile(share), np.quantile(values, share), rel_tol=0.13)


def test_every_value_lies_within_the_edges_of_its_bin():
    for linear, values in (
        (False, [0.0, 1e-9, 0.5, 1.0, 7.99, 8.0, 224.0, 1e12]),
        (True, [-0.31, 0.0, 0.99]),
    ):
        for value in values:
            ((number, count),) = Distribution.of(np.array([value]), linear=linear).bins.items()
            low, high = bin_edges(number, linear=linear)
            assert count == 1
            assert low <= value < high or value == low == high == 0


def test_parts_add_up_to_the_whole_in_any_cut():
    values = np.random.default_rng(4).integers(0, 500, 1000).astype(float)
    whole = Distribution.of(values)
    for cut in (0, 1, 400, 1000):
        assert Distribution.of(values[:cut]).plus(Distribution.of(values[cut:])) == whole


def test_values_that_are_no_numbers_are_left_out():
    found = Distribution.of(np.array([np.nan, 1.0, np.inf, -3.0]))
    assert (found.count, found.largest) == (1, 1.0)
    none = Distribution.of(np.array([np.nan]))
    assert math.isnan(none.mean)
    assert math.isnan(none.quantile(0.5))


def test_statistics_of_a_dataset_are_those_of_its_indexes(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_dataset(storage, (5, 3))
    found = dataset_statistics(storage, manifest)
    assert (found.samples, found.shards) == (8, 2)
    assert found.shard_bytes == sum(shard.bytes for shard in manifest.shards)
    assert found.media_bytes == sum(3000 + row for row in (0, 1, 2, 3, 4, 0, 1, 2))
    assert found.captions == 1 + 2 + 1 + 2 + 1 + 1 + 2 + 1
    assert found.extensions == {"jpg": 3, "mp4": 1, "png": 2, "webp": 2}
    assert found.distributions["width"].bins.keys() == Distribution.of(np.array([64.0])).bins.keys()
    assert found.distributions["aspect"].mean == 64 / 48
    assert found.distributions["caption_words"].largest == 3
    assert found.distributions["frames"].largest == 5
    assert "score" not in found.distributions
    parts = [
        index_statistics(read_index(storage.read_bytes(shard.index)), shard) for shard in manifest.shards
    ]
    assert parts[0].plus(parts[1]) == found == Statistics().plus(found)


def test_dropped_keys_are_left_out(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_dataset(storage).model_copy(update={"dropped_keys": ["000-00004"]})
    found = dataset_statistics(storage, manifest)
    assert found.samples == 7
    assert found.distributions["frames"].largest == 4


def test_statistics_survive_json(tmp_path):
    storage = open_storage(tmp_path)
    found = dataset_statistics(storage, write_dataset(storage))
    assert Statistics.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Statistics.from_json(Statistics().to_json()) == Statistics()


def test_rows_are_in_the_order_of_the_quantities_with_a_cell_a_column(tmp_path):
    storage = open_storage(tmp_path)
    rows = list(dataset_statistics(storage, write_dataset(storage)).rows())
    assert [len(row) for row in rows] == [len(ROW_HEAD)] * (len(QUANTITIES) - 1)
    assert rows[0] == ("width, px", "64", "64", "64", "64", "64", "64")


def test_a_missing_or_broken_index_is_named(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_dataset(storage)
    storage.write_bytes("000001.parquet", b"nonsense")
    with pytest.raises(BadData, match=r"index-mismatch: .*000001\.parquet"):
        dataset_statistics(storage, manifest)
    storage.delete("000001.parquet")
    with pytest.raises(BadData, match=r"missing-index: .*000001\.parquet"):
        dataset_statistics(storage, manifest)
