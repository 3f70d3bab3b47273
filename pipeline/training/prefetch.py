"""The shard cache of a training: how large it must be, and how it is filled ahead of the batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch.utils.data import Sampler

from pipeline.training.config import StageBlock, TrainBlock
from pipeline.training.loading import PREFETCHED_BATCHES, Slot
from sharding.cache import ShardCache
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.order import shards_in_span
from sharding.prefetch import Need, Prefetcher
from sharding.reader import ShardReader


def open_cache(
    folder: Path, train: TrainBlock, remote: dict[str, Manifest], workers_on_node: int
) -> ShardCache | None:
    """The cache that ``train.cache_mb`` asks for, or None where it asks for none or all data are on this machine.

    Args:
        folder: on this machine; shared by its workers.
        remote: manifests, by name, of the datasets that must be fetched.
        workers_on_node: workers of the training that share the folder.

    Raises:
        UserError: ``train.cache_mb`` is less than the lanes of this node need at once, the disk has not so much
            room, or the folder is not ours to write.
    """
    if not train.cache_mb or not remote:
        return None
    needed = -(-bytes_needed(train, remote, workers_on_node) // 2**20)
    if train.cache_mb < needed:
        raise UserError(
            f"train.cache_mb: got {train.cache_mb}; the shards that {workers_on_node} workers with "
            f"{train.lanes // train.workers} lanes each read at once take up to {needed}: set at least that, "
            "or 0 for range reads"
        )
    cache = ShardCache(folder, train.cache_mb * 2**20)
    try:
        cache.check()
    except UserError as error:
        raise UserError(f"train.cache_mb: {error}") from None
    return cache


def bytes_needed(train: TrainBlock, remote: dict[str, Manifest], workers_on_node: int) -> int:
    """The most bytes of shards that a node reads at once, in any epoch, and one shard a worker that arrives."""
    lanes = train.lanes // train.workers * workers_on_node
    most = 0
    for stage in train.stages:
        manifests = [remote[name] for name in stage.mixture if name in remote]
        sizes = [[shard.bytes + shard.index_bytes for shard in manifest.shards] for manifest in manifests]
        held = 0
        for manifest, shards in zip(manifests, sizes, strict=True):
            counts = [shard.samples for shard in manifest.shards]
            span = shards_in_span(counts, _span(train, stage))
            held += min(sum(shards), lanes * span * max(shards))
        arriving = workers_on_node * max((max(shards) for shards in sizes), default=0)
        everything = sum(map(sum, sizes))
        most = max(most, min(everything, held + arriving))
    return most


def _span(train: TrainBlock, stage: StageBlock) -> int:
    """Samples of a lane among which those of the batches under way may lie: whole windows."""
    group = train.batch_of(stage) // (train.lanes * train.accumulation_of(stage))
    under_way = group * (1 + in_flight(train))
    return (1 + -(-(under_way - 1) // train.shuffle_window)) * train.shuffle_window


def in_flight(train: TrainBlock) -> int:
    """Batches that the loader processes may be reading while the next one is handed out."""
    return train.loader_processes * PREFETCHED_BATCHES


class PrefetchedSampler(Sampler[list[Slot]]):
    """The batches of another sampler, whose shards are fetched into the cache ahead of them.

    Args:
        batches: the sampler; it is iterated twice at the same time, once to look ahead.
        readers: by name, as in its slots. Those without a cache are left alone.
        byte_limit: this worker's share of the cache.
        behind: see ``in_flight``.
    """

    def __init__(
        self, batches: Sampler[list[Slot]], readers: dict[str, ShardReader], *, byte_limit: int, behind: int
    ) -> None:
        self._batches, self._byte_limit, self._behind = batches, byte_limit, behind
        self._cached = {name: reader for name, reader in readers.items() if reader.cache is not None}

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # a Sampler need not have a length; ours do

    def __iter__(self) -> Iterator[list[Slot]]:
        [cache] = {id(reader.cache): reader.cache for reader in self._cached.values()}.values()
        assert cache is not None
        prefetcher = Prefetcher(
            cache,
            {name: (reader.dataset, reader.manifest) for name, reader in self._cached.items()},
            map(self._needs, iter(self._batches)),
            byte_limit=self._byte_limit,
            behind=self._behind,
        )
        with closing(prefetcher):
            for slots in self._batches:
                prefetcher.advance()
                yield slots

    def _needs(self, slots: Sequence[Slot]) -> frozenset[Need]:
        return frozenset(
            (slot.dataset, slot.shard) for slot in slots if slot.row >= 0 and slot.dataset in self._cached
        )
