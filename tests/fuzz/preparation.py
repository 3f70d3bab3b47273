"""A small corpus prepared in this process: the tasks of ``sharding.stages`` without Ray, one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharding.config import PrepareConfig
from sharding.index import load_index
from sharding.manifest import Counts
from sharding.plan import make_plan, survey
from sharding.sources import open_source
from sharding.stages import Work, encode
from sharding.storage import open_storage


def prepare_files(
    files: Mapping[str, bytes], source: Mapping[str, Any], modality: str = "image", **block: Any
) -> tuple[Counts, list[str]]:
    """What became of a folder of ``files``: (counts, the ``source`` of every stored sample).

    Args:
        source: the block's ``source``; of its values, ``{folder}`` stands for the folder.
        block: more of the dataset's block.

    Raises:
        UserError: as ``sharding.prepare.prepare`` raises it before it starts tasks.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        raw = Path(folder) / "raw"
        for name, data in files.items():
            path = raw / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        placed = {
            key: value.replace("{folder}", str(raw)) if isinstance(value, str) else value
            for key, value in source.items()
        }
        config = PrepareConfig.model_validate(
            {"source": placed, "modality": modality, "filters": [], **block}
        )
        dataset = open_storage(Path(folder) / "dataset")
        opened = open_source(config, dataset)
        found = survey(opened, lambda _: None)
        work = Work(dataset, config, make_plan(opened, found, config, dataset))
        counts, stored = Counts(), list[str]()
        for task in range(work.plan.tasks):
            record = encode(work, task)
            counts = counts.plus(record.counts)
            if record.shard is not None:
                stored += load_index(dataset, record.shard).column("source").to_pylist()
        assert counts.inputs == found.inputs, "an input of the listing was not read"
        assert counts.read == counts.kept + sum(counts.dropped.values()), (
            "a sample was lost, or counted twice"
        )
        assert counts.kept == len(stored)
        return counts, stored
