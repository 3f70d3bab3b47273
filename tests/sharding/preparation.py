"""A small corpus prepared in this process: the tasks of ``sharding.stages`` without Ray, one after another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.captions import stored_captions
from sharding.config import PrepareConfig
from sharding.exchange import steps
from sharding.index import load_index
from sharding.manifest import Counts, ShardRecord
from sharding.plan import Survey, make_plan, survey
from sharding.sources import open_source
from sharding.stages import Work, commit, encode
from sharding.storage import Storage, open_storage


@dataclass(frozen=True)
class StoredSample:
    """One sample of a shard: where it came from, its captions and the bytes of its media."""

    source: str
    captions: list[str]
    media: bytes


@dataclass(frozen=True)
class Prepared:
    """What became of a corpus: what its listing found, the counts of its tasks, and what the shards hold."""

    survey: Survey
    counts: Counts
    samples: list[StoredSample]


def prepare_files(
    files: Mapping[str, bytes], source: Mapping[str, Any], modality: str = "image", **block: Any
) -> Prepared:
    """Prepare a folder of ``files``; that no sample is lost, or counted twice, is asserted here.

    Args:
        source: the block's ``source``; in its texts, ``{folder}`` stands for the folder.
        block: more of the dataset's block; without ``filters`` all samples are kept.

    Raises:
        UserError: as ``sharding.prepare.prepare`` raises it before it starts tasks.
    """
    # In memory where there is such a folder: waiting for a disk is most of the time that a small corpus takes.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="corpus-", dir=memory) as folder:
        raw = Path(folder) / "raw"
        for name, data in files.items():
            path = raw / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        placed = {
            key: value.replace("{folder}", str(raw)) if isinstance(value, str) else value
            for key, value in source.items()
        }
        given = {"filters": []} | block | {"source": placed, "modality": modality}
        return _prepared(PrepareConfig.model_validate(given), open_storage(Path(folder) / "dataset"))


def _prepared(config: PrepareConfig, dataset: Storage) -> Prepared:
    opened = open_source(config, dataset)
    found = survey(opened, lambda _: None)
    work = Work(dataset, config, make_plan(opened, found, config, dataset))
    counts, samples = Counts(), list[StoredSample]()
    records = [encode(work, task) for task in range(work.plan.tasks)]
    if work.exchanges:
        exchange = work.exchange(sum(record.counts.kept for record in records))
        for step, count in steps(exchange):
            for number in range(count):
                step(exchange, number)
        records = [commit((work, exchange), task) for task in range(work.plan.tasks)]
    for record in records:
        counts = counts.plus(record.counts)
        if record.shard is not None:
            samples += _stored(dataset, record.shard)
    assert counts.inputs == found.inputs, "an input of the listing was not read"
    assert counts.read == counts.kept + sum(counts.dropped.values()), "a sample was lost, or counted twice"
    assert counts.kept == len(samples), "the shards hold another number of samples"
    return Prepared(found, counts, samples)


def _stored(dataset: Storage, shard: ShardRecord) -> list[StoredSample]:
    tar = dataset.read_bytes(shard.tar)
    samples = []
    for row in load_index(dataset, shard).to_pylist():
        description = tar[row["json_offset"] :][: row["json_size"]]
        media = tar[row["media_offset"] :][: row["media_size"]]
        samples.append(StoredSample(row["source"], stored_captions(description, b"", None), media))
    return samples
