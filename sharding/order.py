"""The order of samples: which sample stands in which slot of which batch.

The invariant: **the slots of a batch are a pure function of (digest of the shards, seed, epoch, step) and of
the shape (lanes, window, global batch)**. They do not depend on the number of workers or loader processes, nor on
what ran before. In one epoch each sample stands in exactly one slot, all workers take the same number of
steps, and any step can be asked for at once, so that a resume reads nothing again.

How, for L = 2 lanes, windows of 3 and a global batch of 4, over shards 0 (samples a to e), 1 (f to h) and 2
(i to l)::

    shards, permuted    | f g h | i j k l | a b c d e |     12 samples, taken as a ring
                             ^ the ring is cut here         at a random place: lane 0 begins
    lane 0              | h i j | k l a |                   equal lanes (they differ by one sample at most),
    lane 1              | b c d | e f g |                   each cut into windows
    lane 0, shuffled    | i j h | a l k |                   inside its windows
    lane 1, shuffled    | d b c | g f e |
    batch 0             i j   d b                           G / L = 2 from each lane
    batch 1             h a   c g
    batch 2             l k   f e
    of 2 workers        0     1                             contiguous slices of the lanes

Reading stays local: a lane goes through its shards one after the other, and a window bounds how far apart
neighbours in the order lie. The cut of the ring moves the borders of lanes and windows from epoch to epoch,
which matters when there are few shards. Where the lanes do not divide evenly, the last batches hold empty
slots. A sample that was retracted keeps its slot, which its reader then finds empty: the order of all others
stays, and nothing here has to know of it.

The plan of an epoch is O(shards), a batch is O(batch); nothing is O(samples). The draws use the raw output of
a counter-based generator (Philox), which is the same in every version of NumPy, unlike its shuffles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sharding.seeds import derive_seed

EMPTY = -1  # both columns of a slot that holds no sample
LARGEST_WINDOW = 1 << 16


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The plan of one epoch, made by ``epoch_order``. Small: two numbers a shard."""

    seed: int
    epoch: int
    samples: int
    lanes: int
    window: int
    start: int  # where in the sequence of shards the ring is cut
    shards: np.ndarray = field(repr=False)  # int64 [S]: shards as permuted
    # int64 [S + 1]: where in the sequence each shard begins, and the end of the last
    offsets: np.ndarray = field(repr=False)
    window_seed: int = field(repr=False)


def epoch_order(
    digest: str, seed: int, epoch: int, shard_samples: Sequence[int] | np.ndarray, lanes: int, window: int
) -> EpochOrder:
    """Plan an epoch.

    Args:
        digest: of the manifest's shards, so that other data has another order.
        seed, epoch: of the run; each epoch has an order of its own.
        shard_samples: number of samples of each shard, in the manifest's order; may hold zeros.
        lanes: number of lanes (L); any number of workers that divides it gives the same batches.
        window: samples that are shuffled among themselves, at most ``LARGEST_WINDOW``; 1 keeps the shards'
            own order.

    Raises:
        ValueError: no samples, or a shape that cannot be.
    """
    counts = np.asarray(shard_samples, dtype=np.int64)
    if counts.ndim != 1 or counts.size == 0 or counts.min() < 0 or counts.sum() == 0:
        raise ValueError("a dataset needs at least one sample, and no shard may hold a negative number")
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    if not 1 <= window <= LARGEST_WINDOW:
        raise ValueError(f"window must be between 1 and {LARGEST_WINDOW}, got {window}")
    if epoch < 0:
        raise ValueError(f"epoch must not be negative, got {epoch}")
    draws = np.random.Philox(key=derive_seed(seed, "order.shards", digest, epoch))
    shards = np.argsort(draws.random_raw(counts.size), kind="stable").astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[shards])])
    samples = int(offsets[-1])
    return EpochOrder(
        seed=seed,
        epoch=epoch,
        samples=samples,
        lanes=lanes,
        window=window,
        start=int(draws.random_raw()) % samples,
        shards=shards,
        offsets=offsets,
        window_seed=derive_seed(seed, "order.windows", digest, epoch),
    )


def steps_per_epoch(samples: int, lanes: int, global_batch: int, taken: int = 0) -> int:
    """Number of batches in which every sample has its slot, the last ones perhaps with empty slots.

    Args:
        samples, lanes, global_batch: of the dataset, of the order, over all workers.
        taken: samples that each lane has given before, where batches of another size began the epoch.

    Raises:
        ValueError: unless ``global_batch`` is a multiple of ``lanes``.
    """
    longest_lane = -(-samples // lanes)
    return -(-max(0, longest_lane - taken) // _per_lane(lanes, global_batch))


def batch_slots(
    order: EpochOrder, step: int, global_batch: int, worker: int = 0, workers: int = 1, *, taken: int = 0
) -> np.ndarray:
    """The slots of one worker in one batch.

    Args:
        order: the plan of the epoch.
        step: which batch of the epoch, from 0; counted from where ``taken`` ends.
        global_batch: slots of the batch over all workers (G).
        worker, workers: whose slots; the concatenation over all workers is the batch of one worker.
        taken: samples that each lane has given before, where batches of another size began the epoch.

    Returns:
        int64 [G / workers, 2]: (shard, row) for each slot, (-1, -1) for an empty one. Lane-major: the
        worker's lanes one after the other, each with G / lanes consecutive slots.

    Raises:
        ValueError: unless ``lanes % workers == 0``, ``global_batch % lanes == 0`` and worker and step are in
            range.
    """
    per_lane = _per_lane(order.lanes, global_batch)
    if workers < 1 or order.lanes % workers:
        raise ValueError(f"the number of lanes ({order.lanes}) must be a multiple of the workers ({workers})")
    if not 0 <= worker < workers:
        raise ValueError(f"worker must be between 0 and {workers - 1}, got {worker}")
    if taken < 0:
        raise ValueError(f"taken must not be negative, got {taken}")
    steps = steps_per_epoch(order.samples, order.lanes, global_batch, taken)
    if not 0 <= step < steps:
        raise ValueError(f"step must be between 0 and {steps - 1} in this epoch, got {step}")
    lanes = order.lanes // workers
    slots = np.full((lanes, per_lane, 2), EMPTY, dtype=np.int64)
    for i in range(lanes):
        places = _lane_places(order, worker * lanes + i, taken + step * per_lane, per_lane)
        # The last of equals: passes empty shards by.
        at = np.searchsorted(order.offsets, places, side="right") - 1
        slots[i, : len(places), 0] = order.shards[at]
        slots[i, : len(places), 1] = places - order.offsets[at]
    return slots.reshape(lanes * per_lane, 2)


def shards_in_span(shard_samples: Sequence[int], span: int) -> int:
    """The most shards that ``span`` consecutive samples of a lane may lie in, in any order of the shards."""
    # Whole ones in the middle, the smallest there are, and a sample of one more on each side.
    counts = np.sort(np.asarray([count for count in shard_samples if count], dtype=np.int64))
    inside = int(np.searchsorted(np.cumsum(counts), span - 2, side="right")) if span > 2 else 0
    return min(len(counts), inside + min(span, 2))


def _per_lane(lanes: int, global_batch: int) -> int:
    if global_batch < 1 or global_batch % lanes:
        raise ValueError(f"the global batch ({global_batch}) must be a multiple of the lanes ({lanes})")
    return global_batch // lanes


def _lane_places(order: EpochOrder, lane: int, begin: int, count: int) -> np.ndarray:
    """Where in the sequence of shards up to ``count`` samples of a lane stand, from its ``begin``-th, shuffled."""
    first = lane * order.samples // order.lanes
    length = (lane + 1) * order.samples // order.lanes - first
    parts = [np.zeros(0, np.int64)]
    at, end = begin, min(begin + count, length)
    while at < end:
        number = at // order.window
        window_begin = number * order.window
        size = min(order.window, length - window_begin)
        stop = min(end, window_begin + size)
        shuffled = _permutation(derive_seed(order.window_seed, "window", lane, number), size)
        parts.append(shuffled[at - window_begin : stop - window_begin].astype(np.int64) + window_begin)
        at = stop
    return (np.concatenate(parts) + first + order.start) % order.samples


# A window lasts for many batches, and each lane of a worker is in a window of its own: room for 2,048 lanes, in
# 64 MiB for windows of 16,384 (256 MiB for the largest).
@functools.lru_cache(maxsize=2048)
def _permutation(seed: int, size: int) -> np.ndarray:
    keys = np.random.Philox(key=seed).random_raw(size)
    shuffled = np.argsort(keys, kind="stable").astype(np.uint16)  # below LARGEST_WINDOW
    shuffled.flags.writeable = False
    return shuffled
