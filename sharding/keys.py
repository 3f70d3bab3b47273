"""Whether keys are unique over the shards of one or several datasets.

Shards of which the smallest and largest keys do not overlap cannot share one, so the usual dataset is settled by
two keys a shard. Where shards overlap (keys that are hashes, say), 8 bytes for each of their samples are held.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sharding.index import load_index
from sharding.manifest import ShardRecord
from sharding.storage import Storage


@dataclass(frozen=True)
class KeyedShard:
    """A shard with its smallest and largest key; ``prefix`` stands before all of its keys (``first`` has it)."""

    dataset: Storage
    record: ShardRecord
    first: str
    last: str
    prefix: str = ""

    def keys(self) -> list[str]:
        """All keys, from the index."""
        return [self.prefix + key for key in load_index(self.dataset, self.record)["key"].to_pylist()]


@dataclass(frozen=True)
class RepeatedKey:
    """A key and the shards that hold it: a shard twice, where it holds it twice."""

    key: str
    shards: list[KeyedShard]


def keyed_shard(dataset: Storage, record: ShardRecord) -> KeyedShard:
    """The shard with its range of keys, from its index."""
    keys = load_index(dataset, record)["key"].to_pylist()
    return KeyedShard(dataset, record, min(keys), max(keys))


def repeated_keys(shards: list[KeyedShard], limit: int) -> list[RepeatedKey]:
    """Up to ``limit`` keys that stand more than once, in the order of the keys' shards."""
    found: list[RepeatedKey] = []
    for group in _overlapping(shards):
        if len(found) < limit:
            found += _repeated(group)[: limit - len(found)]
    return found


def _overlapping(shards: list[KeyedShard]) -> Iterator[list[KeyedShard]]:
    """Groups of two or more shards whose ranges of keys hang together."""
    group: list[KeyedShard] = []
    end = ""
    for shard in sorted(shards, key=lambda shard: (shard.first, shard.last)):
        if group and shard.first > end:
            if len(group) > 1:
                yield group
            group = []
        end = max(end, shard.last) if group else shard.last
        group.append(shard)
    if len(group) > 1:
        yield group


def _repeated(group: list[KeyedShard]) -> list[RepeatedKey]:
    hashes = np.concatenate([_hashes(shard.keys()) for shard in group])
    hashes.sort()
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(suspects):
        return []
    holders: defaultdict[str, list[KeyedShard]] = defaultdict(list)
    for shard in group:  # once more, for those keys only: two keys may share a hash
        keys = shard.keys()
        for number in np.flatnonzero(np.isin(_hashes(keys), suspects)):
            holders[keys[number]].append(shard)
    return [RepeatedKey(key, shards) for key, shards in sorted(holders.items()) if len(shards) > 1]


def _hashes(keys: list[str]) -> np.ndarray:
    """uint64 [N]: BLAKE2b of each key."""
    raw = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(raw, dtype=np.uint64).copy()
