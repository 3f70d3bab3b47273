"""The promises of sharding/order.py, by simulating whole epochs."""

import dataclasses
import itertools
import pickle
import random

import numpy as np
import pytest

import sharding.order
from sharding.order import EMPTY, LARGEST_WINDOW, batch_slots, epoch_order, steps_per_epoch

SHARDS = [[1], [7], [3, 0, 5], [10, 10, 10, 10], [1, 2, 3, 4, 5, 6], [0, 0, 33], [64]]
SHAPES = [  # lanes, samples of each lane in a batch, window
    (1, 1, 1), (1, 4, 3), (2, 1, 4), (2, 3, 2), (4, 2, 5), (6, 1, 3), (8, 2, 64), (12, 1, 2),
]  # fmt: skip


def epoch(shards, lanes, per_lane, window, *, seed=3, number=0, digest="d", worker=0, workers=1):
    """All slots of a worker in an epoch: [steps, slots, 2]."""
    order = epoch_order(digest, seed, number, shards, lanes, window)
    steps = steps_per_epoch(sum(shards), lanes, lanes * per_lane)
    return np.stack([batch_slots(order, step, lanes * per_lane, worker, workers) for step in range(steps)])


def samples_of(slots):
    flat = slots.reshape(-1, 2)
    return [tuple(slot) for slot in flat[flat[:, 0] != EMPTY].tolist()]


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize(("lanes", "per_lane", "window"), SHAPES)
def test_an_epoch_holds_each_sample_exactly_once(shards, lanes, per_lane, window):
    seen = samples_of(epoch(shards, lanes, per_lane, window))
    assert sorted(seen) == [(shard, row) for shard, count in enumerate(shards) for row in range(count)]


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize(("lanes", "per_lane", "window"), SHAPES)
def test_the_batch_does_not_depend_on_the_number_of_workers(shards, lanes, per_lane, window):
    whole = epoch(shards, lanes, per_lane, window)
    for workers in [w for w in range(1, lanes + 1) if lanes % w == 0]:
        parts = [
            epoch(shards, lanes, per_lane, window, worker=worker, workers=workers)
            for worker in range(workers)
        ]
        assert {part.shape for part in parts} == {(len(whole), lanes * per_lane // workers, 2)}  # equal steps
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_the_drawn_example_of_the_module_is_what_the_functions_give():
    shards, letters = (5, 3, 4), iter("abcdefghijkl")
    name = {(shard, row): next(letters) for shard, count in enumerate(shards) for row in range(count)}
    order = epoch_order("example", 8, 0, shards, 2, 3)

    def lane(number, window):
        of_window = dataclasses.replace(order, window=window)
        return [
            name[slot] for step in range(3) for slot in samples_of(batch_slots(of_window, step, 4, number, 2))
        ]

    def boxes(parts):
        return "| " + " | ".join(" ".join(part) for part in parts) + " |"

    ring = boxes([[name[shard, row] for row in range(shards[shard])] for shard in order.shards.tolist()])
    expected = {"shards, permuted": ring}
    for number in range(2):
        for title, window in ((f"lane {number}", 1), (f"lane {number}, shuffled", 3)):
            samples = lane(number, window)
            expected[title] = boxes([samples[:3], samples[3:]])
    for step in range(3):
        pairs = [
            " ".join(name[slot] for slot in samples_of(batch_slots(order, step, 4, number, 2)))
            for number in range(2)
        ]
        expected[f"batch {step}"] = "   ".join(pairs)
    drawn = {line[4:24].strip(): line[24:56].strip() for line in sharding.order.__doc__.splitlines()}
    assert {title: drawn[title] for title in expected} == expected
    caret = next(line for line in sharding.order.__doc__.splitlines() if "^" in line).index("^")
    assert caret == 24 + ring.index(lane(0, 1)[0]) - 1


def test_batches_of_another_size_go_on_where_an_epoch_was_left():
    rest = random.Random(11)
    for shards, lanes in itertools.product(SHARDS, (1, 2, 3, 6)):
        order = epoch_order("d", 3, 1, shards, lanes, 4)
        whole = epoch(shards, lanes, 1, 4, number=1)  # what each lane gives, one after the other
        for _ in range(4):
            taken, seen = 0, []
            while True:
                per_lane = rest.choice((1, 2, 3, 5))
                left = steps_per_epoch(sum(shards), lanes, lanes * per_lane, taken)
                if not left:
                    break
                steps = rest.randint(1, left)
                for step in range(steps):
                    slots = batch_slots(order, step, lanes * per_lane, taken=taken)
                    expected = whole[taken + step * per_lane :][:per_lane].swapaxes(0, 1)
                    got = slots.reshape(lanes, per_lane, 2)
                    np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)
                    assert (got[:, expected.shape[1] :] == EMPTY).all()
                    seen += samples_of(slots)
                taken += steps * per_lane
            assert sorted(seen) == [
                (shard, row) for shard, count in enumerate(shards) for row in range(count)
            ]


def test_the_cost_of_a_plan_and_of_a_batch_does_not_grow_with_the_samples_of_a_shard(monkeypatch):
    """Counted, not timed: how many numbers are drawn, and how long the arrays of the plan are."""
    drawn = []
    permutation = sharding.order._permutation

    def counting(seed, size):
        drawn.append(size)
        return permutation(seed, size)

    monkeypatch.setattr(sharding.order, "_permutation", counting)
    costs = []
    for samples in (10, 10_000, 10_000_000):
        drawn.clear()
        order = epoch_order("d", 0, 0, [samples] * 300, 4, 8)
        batch_slots(order, steps_per_epoch(300 * samples, 4, 16) // 2, 16)
        arrays = [value.size for value in vars(order).values() if isinstance(value, np.ndarray)]
        costs.append((arrays, len(drawn) <= 2 * 4, max(drawn)))
    assert costs == [([300, 301], True, 8)] * 3


def test_empty_slots_stand_only_at_the_end_of_a_lane_and_are_as_few_as_can_be():
    for shards, (lanes, per_lane, window) in itertools.product(SHARDS, SHAPES):
        slots = epoch(shards, lanes, per_lane, window)
        lane_major = slots.reshape(len(slots), lanes, per_lane, 2).transpose(1, 0, 2, 3).reshape(lanes, -1, 2)
        filled = lane_major[:, :, 0] != EMPTY
        assert (np.sort(~filled, axis=1) == ~filled).all()
        counts = filled.sum(axis=1)
        assert counts.max() - counts.min() <= 1
        assert len(slots) == -(-int(counts.max()) // per_lane)
        assert ((lane_major == EMPTY).all(axis=2) == ~filled).all()


def test_any_step_can_be_asked_for_at_once_also_after_pickling():
    shards, lanes, per_lane, window = [40, 17, 60], 4, 3, 8
    whole = epoch(shards, lanes, per_lane, window, number=5)
    fresh = pickle.loads(pickle.dumps(epoch_order("d", 3, 5, shards, lanes, window)))  # noqa: S301
    for step in reversed(range(len(whole))):
        np.testing.assert_array_equal(batch_slots(fresh, step, lanes * per_lane), whole[step])


def test_epochs_seeds_and_datasets_have_orders_of_their_own():
    shape = ([50, 50, 50], 2, 5, 16)
    orders = [
        epoch(*shape), epoch(*shape, number=1), epoch(*shape, seed=4), epoch(*shape, digest="e"),
        epoch(*shape, number=2),
    ]  # fmt: skip
    for one, other in itertools.combinations(orders, 2):
        assert (one != other).any(axis=2).mean() > 0.8
    np.testing.assert_array_equal(orders[0], epoch(*shape))


def test_with_one_shard_a_sample_changes_its_lane_and_its_window_from_epoch_to_epoch():
    lanes = []
    for number in range(12):
        slots = epoch([64], 4, 1, 4, number=number)
        lanes.append(int(np.argwhere(slots[:, :, 1] == 10)[0][1]))
    assert len(set(lanes)) == 4


def test_neighbours_in_the_order_come_from_few_shards():
    shards = [100] * 50
    order = epoch_order("d", 0, 0, shards, 2, 100)
    touched = {shard for step in range(100) for shard, _ in batch_slots(order, step, 2).tolist()}
    assert len(touched) <= 6  # 100 samples of each of 2 lanes: a window lies in 2 or 3 shards


def test_inside_a_window_every_order_is_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        rows = epoch([3], 1, 3, 3, seed=seed)[0, :, 1].tolist()
        counts[tuple(rows)] = counts.get(tuple(rows), 0) + 1
    assert len(counts) == 6
    assert all(140 < count < 260 for count in counts.values())  # 200 expected, deviation 13


def test_the_order_of_a_run_that_was_started_with_an_earlier_release_stays():
    order = epoch_order("0" * 64, 1234, 2, [5, 4, 6], 2, 4)
    assert batch_slots(order, 1, 4).tolist() == [[0, 2], [2, 5], [2, 0], [1, 3]]


def test_a_plan_of_a_billion_samples_is_small():
    shards = [10_000] * 100_000
    order = epoch_order("d", 1, 7, shards, 64, 4096)
    slots = batch_slots(order, steps_per_epoch(10**9, 64, 4096) // 2, 4096)
    assert (slots[:, 0] >= 0).all()
    assert len(pickle.dumps(order)) < 20 * len(shards)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_samples": []}, "at least one sample"),
        ({"shard_samples": [0, 0]}, "at least one sample"),
        ({"shard_samples": [3, -1]}, "negative"),
        ({"lanes": 0}, "lanes"),
        ({"window": 0}, "window"),
        ({"window": LARGEST_WINDOW + 1}, "window"),
        ({"epoch": -1}, "epoch"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, message):
    usual = {"digest": "d", "seed": 0, "epoch": 0, "shard_samples": [4], "lanes": 2, "window": 2}
    with pytest.raises(ValueError, match=message):
        epoch_order(**{**usual, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 3}, "multiple of the workers"),
        ({"workers": 0}, "multiple of the workers"),
        ({"worker": 2, "workers": 2}, "worker must be"),
        ({"global_batch": 6}, "multiple of the lanes"),
        ({"global_batch": 0}, "multiple of the lanes"),
        ({"step": 5}, "step must be between 0 and 4"),
        ({"step": -1}, "step must be"),
        ({"taken": 5}, "step must be"),
        ({"taken": -1}, "taken must not be negative"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(arguments, message):
    order = epoch_order("d", 0, 0, [20], 4, 2)
    with pytest.raises(ValueError, match=message):
        batch_slots(order, **{**{"step": 0, "global_batch": 4}, **arguments})
