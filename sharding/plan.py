"""How the input is cut into tasks: written down before any work starts, so that a re-run cuts it alike.

The source is listed twice, both times as a stream: once for its digest, which names the dataset's folder, and
once to write the plan into that folder. A prepared dataset is thus recognised by the first listing alone, and
no process ever holds more than the inputs of one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sharding.config import PrepareConfig
from sharding.errors import UserError
from sharding.sources import Input, Source
from sharding.sources.addresses import pack, unpack
from sharding.storage import Storage

PLAN_PATH = "plan.json"
_ADDRESSES = ("media", "sidecar")

_MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
# As ``sharding.sources.addresses.pack`` writes it. Few origins and buckets, many names.
_ADDRESS = pa.struct([("origin", pa.string()), ("name", pa.string()), ("bucket", pa.string())])
_INPUT_SCHEMA = pa.schema(
    [
        pa.field("address", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("media", _ADDRESS),
        pa.field("sidecar", _ADDRESS),
        pa.field("not_text", pa.int32(), nullable=False),
        pa.field("problem", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("texts", pa.list_(_MEMBER), nullable=False),
    ]
)


class Survey(BaseModel):
    """What a listing found: the url that addresses are relative to, how many inputs, and their digest.

    ``sidecars``: files that hold captions of inputs. ``skipped``: files that are neither, by reason
    (``sharding.names``). The digest is of the inputs alone, so that a ``.DS_Store`` more makes no other dataset.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    inputs: int
    digest: str
    sidecars: int = 0
    skipped: dict[str, int] = Field(default_factory=dict)


class Plan(BaseModel):
    """The partition of the input: ``tasks`` parts of ``configuration["samples_per_shard"]`` inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["glscl-plan"] = "glscl-plan"
    version: Literal[1] = 1
    configuration: dict[str, Any]
    configuration_digest: str
    source: Survey
    tasks: int


def survey(source: Source, seen: Callable[[int], None]) -> Survey:
    """List the source; ``seen`` is called with the number of inputs now and then."""
    hasher = hashlib.sha256()
    count = 0
    for count, _ in enumerate(source.inputs(hasher), start=1):
        if count % 1000 == 0:
            seen(count)
    skipped = source.skipped
    return Survey(
        url=source.base,
        inputs=count,
        digest=hasher.hexdigest(),
        sidecars=skipped.sidecars,
        skipped=skipped.counts(),
    )


def inputs_path(task: int) -> str:
    """Where the inputs of a task are listed, relative to the dataset. Gone when the dataset is whole: they are
    addresses as they were given, with the user names and signatures that some have.
    """
    return f"work/plan/{task:06d}.parquet"


def make_plan(source: Source, found: Survey, config: PrepareConfig, dataset: Storage) -> Plan:
    """The dataset's plan: the one that is there, or a new one (``plan.json`` last: it vouches for the lists).

    Raises:
        UserError: the source changed since ``found``, or the folder holds another plan.
    """
    tasks = -(-found.inputs // config.samples_per_shard)
    plan = Plan(
        configuration=config.identity(),
        configuration_digest=config.digest,
        source=found,
        tasks=tasks,
    )
    if dataset.exists(PLAN_PATH):
        there = _read_plan(dataset)
        if there.model_copy(update={"source": _identity(there.source)}) != plan.model_copy(
            update={"source": _identity(plan.source)}
        ):
            raise UserError(f"{dataset.url_of(PLAN_PATH)} is the plan of another dataset: remove its folder")
        return there
    hasher = hashlib.sha256()
    listing = source.inputs(hasher)
    for task in range(tasks):
        _write_inputs(list(islice(listing, config.samples_per_shard)), dataset, task)
    if next(listing, None) is not None or hasher.hexdigest() != found.digest:
        raise UserError(f"{found.url} changed while it was being listed: try again when it is complete")
    dataset.write_json(PLAN_PATH, plan.model_dump(mode="json"))
    return plan


def _identity(found: Survey) -> Survey:
    """Without what a listing passed over: that may be other files when it is listed again."""
    return found.model_copy(update={"sidecars": 0, "skipped": {}})


def _read_plan(dataset: Storage) -> Plan:
    try:
        return Plan.model_validate(dataset.read_json(PLAN_PATH))
    except UserError:
        raise  # a ValueError too: the storage refuses
    except ValueError as error:  # not JSON, or JSON of something else
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is not JSON"
        raise UserError(f"{dataset.url_of(PLAN_PATH)} is no plan ({problem}): remove its folder") from None


def _write_inputs(inputs: list[Input], dataset: Storage, task: int) -> None:
    table = pa.Table.from_pylist([_row(item) for item in inputs], schema=_INPUT_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    dataset.write_bytes(inputs_path(task), sink.getvalue().to_pybytes())


def _row(item: Input) -> dict[str, Any]:
    row = dict(vars(item))
    for name in _ADDRESSES:
        row[name] = None if row[name] is None else pack(row[name])
    return row


def read_inputs(dataset: Storage, task: int) -> Iterator[Input]:
    """The inputs of one task, in order."""
    table = pq.read_table(pa.BufferReader(dataset.read_bytes(inputs_path(task))))
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield Input(
                **{**row, **{name: unpack(row[name]) for name in _ADDRESSES if row[name] is not None}}
            )
