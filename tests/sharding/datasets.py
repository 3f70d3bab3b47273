"""Small datasets for the tests of reading, written with the project's own writer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from sharding.manifest import Counts, Manifest
from sharding.media import Encoded, MediaInfo
from sharding.storage import Storage
from sharding.writer import ShardWriter, publish

CAPTIONS = ["a first caption", "ein zweiter, mit Ümläuten"]


def media_of(shard: int, row: int, size: int = 3000) -> bytes:
    """Bytes of a sample; they stand for a picture, which reading does not look into."""
    return np.random.Generator(np.random.Philox(key=1000 * shard + row)).bytes(size + row)


def write_dataset(storage: Storage, shard_samples: tuple[int, ...] = (5, 3), size: int = 3000) -> Manifest:
    """Write shards, indices and the manifest; sample (s, r) has the key "s-r" and the bytes ``media_of(s,
    r)``.
    """
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for shard, samples in enumerate(shard_samples):
            path = Path(folder) / f"{shard:06d}.tar"
            with ShardWriter(path) as writer:
                for row in range(samples):
                    # Extensions on both sides of "json" and "txt" in the order of names.
                    extension = ("jpg", "webp", "png", "mp4")[row % 4]
                    media = Encoded(
                        media_of(shard, row, size), extension, MediaInfo(64, 48, 1 + row, 0.5 * row)
                    )
                    writer.add(
                        f"{shard:03d}-{row:05d}", media, CAPTIONS[: 1 + row % 2], "0" * 64, f"source/{row}"
                    )
            records.append(publish(writer, storage, f"{shard:06d}"))
    manifest = Manifest(
        name="test",
        modality="image",
        configuration={},
        configuration_digest="0" * 64,
        source={"url": "file:///nowhere"},
        shards=records,
        counts=Counts(read=sum(shard_samples), kept=sum(shard_samples)),
    )
    storage.write_json("manifest.json", manifest.model_dump(mode="json"))
    return manifest
