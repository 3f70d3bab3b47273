"""What stands beside an outcome in the ledger: the items' values (Parquet), examples (JSON), a task's own files.

Equal results give equal bytes, so that the digests in two outcomes tell whether they are the same.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import Any

import numpy as np

from pipeline.evaluation.result import Example, Family, Measured

#: Names of the two files that every outcome of items has; those of a task are below :data:`FILES`.
ITEMS, EXAMPLES, FILES = "items.parquet", "examples.json", "files"

_META = b"glscl.families"
_OWN = ("family", "key", "group")  # columns; the others are metrics


def items_to_parquet(families: list[Family]) -> bytes:
    """One row an item: family, key, group (null where every item is one), and a float64 column a metric.

    A metric's column is null in the rows of other families. The families' order and each metric's statistic are in
    the file's metadata ``glscl.families``, as JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = sum(len(family.keys) for family in families)
    columns: dict[str, Any] = {name: [] for name in _OWN}
    start = 0
    for family in families:
        columns["family"] += [family.name] * len(family.keys)
        columns["key"] += family.keys
        columns["group"] += [None] * len(family.keys) if family.groups is None else family.groups
        for name, measured in family.metrics.items():
            assert name not in columns, f"two metrics of a task are named {name}"
            assert len(measured.values) == len(family.keys), f"{name}: one value for each item"
            values, absent = np.zeros(total), np.ones(total, dtype=bool)
            values[start : start + len(family.keys)] = measured.values
            absent[start : start + len(family.keys)] = False
            columns[name] = pa.array(values, pa.float64(), mask=absent)
        start += len(family.keys)
    meta = [
        {"name": f.name, "metrics": {name: m.statistic for name, m in f.metrics.items()}} for f in families
    ]
    arrays = [pa.array(columns[name], pa.string()) if name in _OWN else columns[name] for name in columns]
    table = pa.table(dict(zip(columns, arrays, strict=True)))
    table = table.replace_schema_metadata({_META: json.dumps(meta, sort_keys=True).encode()})
    target = io.BytesIO()
    pq.write_table(table, target, compression="zstd", use_dictionary=["family", "group"])
    return target.getvalue()


def items_from_parquet(data: bytes) -> list[Family]:
    """The families of :func:`items_to_parquet`.

    Raises:
        ValueError: it is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
        described = json.loads((table.schema.metadata or {})[_META])
        names = np.array(table["family"].to_pylist(), dtype=object)
        keys, groups = table["key"].to_pylist(), table["group"].to_pylist()
        families = []
        for entry in described:
            rows = np.flatnonzero(names == entry["name"])
            metrics = {
                name: Measured(table[name].take(pa.array(rows)).to_numpy(), statistic)
                for name, statistic in entry["metrics"].items()
            }
            own = [groups[row] for row in rows]
            grouped = own if own and own[0] is not None else None
            families.append(Family(entry["name"], [keys[row] for row in rows], metrics, grouped))
    except (pa.ArrowException, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no items of an evaluation: {error}") from None
    return families


def examples_to_json(examples: list[Example]) -> bytes:
    """A list of objects; pictures in base64."""
    found = [
        {
            "title": example.title,
            "right": example.right,
            "pictures": [
                {"caption": caption, "data": base64.b64encode(data).decode()}
                for data, caption in example.pictures
            ],
            "lines": [list(line) for line in example.lines],
        }
        for example in examples
    ]
    return json.dumps(found, sort_keys=True, ensure_ascii=False, indent=1).encode() + b"\n"


def examples_from_json(data: bytes) -> list[Example]:
    """The examples of :func:`examples_to_json`.

    Raises:
        ValueError: it is no such file.
    """
    try:
        return [
            Example(
                title=entry["title"],
                right=entry["right"],
                pictures=[
                    (base64.b64decode(picture["data"], validate=True), picture["caption"])
                    for picture in entry["pictures"]
                ],
                lines=[(label, text) for label, text in entry["lines"]],
            )
            for entry in json.loads(data)
        ]
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"no examples of an evaluation: {error}") from None
