"""Folders of shards as other programs leave them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.sharding.real_media import picture


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> None:
    """A tar of these members in this order, with times and owners of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000.25, "someone"
            tar.addfile(info, io.BytesIO(data))


def img2dataset_members(number: int, caption: str | None) -> list[tuple[str, bytes]]:
    """The three members of a sample as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json."""
    key, image = f"{number:09d}", picture(number)
    description = {
        "caption": caption,
        "url": f"https://pictures.example/{number}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 16,
        "original_width": 48,
        "original_height": 32,
        "exif": "{}",
        "sha256": hashlib.sha256(b"original %d" % number).hexdigest(),
    }
    members = [(f"{key}.jpg", image)]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    return [*members, (f"{key}.json", json.dumps(description, indent=4).encode())]


def write_img2dataset(folder: Path, shards: int = 2, samples: int = 4) -> dict[str, bytes]:
    """img2dataset's layout: 00000.tar, 00000.parquet, 00000_stats.json; gives the images by key."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for shard in range(shards):
        members = []
        for row in range(samples):
            number = 10_000 * shard + row
            found = img2dataset_members(number, f"picture {number}")
            images[f"{number:09d}"] = found[0][1]
            members += found
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(
            pa.table({"url": ["x"] * samples, "status": ["success"] * samples}),
            folder / f"{shard:05d}.parquet",
        )
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": samples, "successes": samples}))
    return images
