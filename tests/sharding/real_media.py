"""Small datasets of real images, for tests that decode."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
from PIL import Image

from sharding.manifest import Counts, Manifest
from sharding.media import Encoded, MediaInfo
from sharding.storage import Storage
from sharding.writer import ShardWriter, publish


def picture(seed: int, width: int = 24, height: int = 16, image_format: str = "JPEG") -> bytes:
    """An image file of noise drawn from ``seed``."""
    pixels = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, (height, width, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, image_format)
    return sink.getvalue()


def write_image_dataset(
    storage: Storage,
    samples: int,
    *,
    name: str = "pictures",
    first_seed: int = 0,
    shards: int = 1,
    broken: AbstractSet[int] = frozenset(),
) -> Manifest:
    """Shards of ``samples`` images each, keys as ``glscl prepare`` gives them; ``broken`` rows do not decode."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            with ShardWriter(Path(folder) / f"{shard}.tar") as writer:
                for row in range(samples):
                    seed = first_seed + shard * samples + row
                    data = picture(seed)
                    data = data[:100] if row in broken else data
                    captions = [f"picture {seed}", "ein Bild"]
                    digest = hashlib.sha256(data).hexdigest()
                    media = Encoded(data, "jpg", MediaInfo(24, 16))
                    writer.add(f"{shard:06d}-{row:06d}", media, captions, digest, f"source/{seed}.jpg")
            records.append(publish(writer, storage, f"{shard:06d}"))
    total = samples * shards
    manifest = Manifest(
        name=name,
        modality="image",
        configuration={"source": {"kind": "folder"}},
        configuration_digest="0" * 64,
        source={"url": "file:///raw"},
        shards=records,
        counts=Counts(read=total, kept=total),
    )
    storage.write_json("manifest.json", manifest.model_dump(mode="json"))
    return manifest
