"""The consumption ledger: which samples each step was really trained on, kept with the run for good.

A sample's id is (digest of the dataset's shards, shard, row). For each step the ledger holds the sum modulo
2^128 of the BLAKE2b hashes of the ids trained on, how many they were, and every slot that was masked, with its
cause (of a step without an update, see ``health``, all are). A sum does not depend on the order inside the batch,
nor on which worker held what: each worker adds up its own part while it trains (half a microsecond a sample), and
the parts meet when a checkpoint is written.

Layout, below the run's folder::

    consumption/00000001-00000100-5f1e....parquet      the steps 1 to 100; named by its own sha256

A part is written before the commit record of the checkpoint, which holds its size and sha256; each part holds
those of the part before. So a checkpoint vouches for the whole history up to its step, also when retention has
deleted those before. A part that a kill left without a commit is never asked for; steps that are done again
make a part of the same name with the same bytes, or, where they differ (another sample could not be read), one
of another name. Nothing here is ever overwritten by anything else, nor deleted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.training.schedule import stages_begun
from sharding.errors import BadData, UserError

if TYPE_CHECKING:
    from cluster.workers import WorkerContext
    from pipeline.training.config import Course
    from pipeline.training.loading import TrainingBatch
    from sharding.storage import Storage

FOLDER = "consumption"
FORMAT = "glscl-consumption"
MODULUS = 1 << 128

#: The cause under which the reader refuses samples of the manifest's overlay: left out on purpose, not bad.
RETRACTED = "dropped"

_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),  # from 1, as in MLflow
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("digest", pa.binary(16), nullable=False),  # little-endian
        pa.field("trained", pa.int64(), nullable=False),  # samples
        pa.field("empty", pa.int64(), nullable=False),  # slots at the end of an epoch
        pa.field(
            "masked",
            pa.list_(pa.struct([("shard", pa.int64()), ("row", pa.int64()), ("cause", pa.string())])),
            nullable=False,
        ),
    ]
)


def refuse_other_shards(
    record: Mapping[str, Any], shards: Mapping[str, str], course: Course, url: str
) -> None:
    """Refuse to go on where what was trained on is not what lies there now.

    Samples may be retracted while a run goes on: what its shards hold must be the same. Stages to come may be given
    other data.

    Args:
        record: of the checkpoint at ``url``, from which the run goes on.
        shards: digest of the shards of each dataset as they are now.

    Raises:
        UserError: names the dataset.
    """
    begun = stages_begun([stage.steps for stage in course.stages], record["step"])
    for name in sorted({name for stage in course.stages[:begun] for name in stage.mixture}):
        if record["shards"][name] != shards[name]:
            raise UserError(
                f"{url} was trained on other shards of '{name}' (digest {record['shards'][name][:12]}) than lie "
                f"there now ({shards[name][:12]}); a run goes on with what it began with: give the job another "
                "name to start anew"
            )


@dataclass(frozen=True, order=True)
class Masked:
    """A sample that kept its slot, but was not trained on."""

    shard: int
    row: int
    cause: str


@dataclass
class StepRecord:
    """What a step was trained on: of one worker while it trains, of all workers in the ledger."""

    step: int
    dataset: str
    epoch: int
    digest: int = 0
    trained: int = 0
    empty: int = 0
    masked: list[Masked] = field(default_factory=list)


@dataclass(frozen=True)
class PartReference:
    """A part of the ledger, as a checkpoint or the part after it vouches for it: its steps, bytes and sha256."""

    first: int
    last: int
    size: int
    sha256: str

    @property
    def path(self) -> str:
        """Relative to the run's folder."""
        return f"{FOLDER}/{self.first:08d}-{self.last:08d}-{self.sha256[:16]}.parquet"


class SampleHash:
    """Hashes of a dataset's samples.

    Args:
        shards_digest: of its manifest (64 hex digits), which keys the hash: the same place in another dataset
            is another sample.
    """

    def __init__(self, shards_digest: str) -> None:
        self._keyed = hashlib.blake2b(digest_size=16, key=bytes.fromhex(shards_digest))

    def total(self, slots: np.ndarray) -> int:
        """Sum modulo 2^128 of the hashes of samples, int64 [N, 2] of (shard, row) without empty slots."""
        ids = np.ascontiguousarray(slots, dtype="<i8").tobytes()
        hashes = bytearray()
        for at in range(0, len(ids), 16):
            keyed = self._keyed.copy()
            keyed.update(ids[at : at + 16])
            hashes += keyed.digest()
        return _from_limbs(
            np.frombuffer(bytes(hashes), dtype="<u4").reshape(-1, 4).sum(axis=0, dtype=np.uint64)
        )


def _from_limbs(limbs: Iterable[Any]) -> int:
    """The number whose 32-bit limbs, lowest first, were added up without carrying."""
    return sum(int(limb) << (32 * place) for place, limb in enumerate(limbs)) % MODULUS


def _limbs(number: int) -> list[int]:
    return [number >> (32 * place) & 0xFFFFFFFF for place in range(4)]


class ConsumptionRecorder:
    """Notes on each worker what it trains on, and writes the ledger's next part with each checkpoint.

    Args:
        run: the run's folder.
        shards: digest of the shards of each dataset.
        newest: the part that the checkpoint gone on from vouches for; None at the beginning.
    """

    def __init__(self, run: Storage, shards: Mapping[str, str], newest: PartReference | None) -> None:
        self._run, self._newest = run, newest
        self._hashes = {name: SampleHash(digest) for name, digest in shards.items()}
        self._steps: list[StepRecord] = []
        self._trained: list[tuple[int, int]] = []  # (shard, row) of this worker in the step at hand

    def add(self, step: int, batch: TrainingBatch) -> None:
        """Note what this worker trains on in ``step``, counted from 1; once for each of its contrastive batches."""
        slot = batch.slots[0]  # a step is of one dataset and one epoch
        if not self._steps or self._steps[-1].step != step:
            self._steps.append(StepRecord(step, slot.dataset, slot.epoch))
            self._trained = []
        record = self._steps[-1]
        trained = []
        for place, cause in zip(batch.slots, batch.causes, strict=True):
            if place.row < 0:
                record.empty += 1
            elif cause is None:
                trained.append((place.shard, place.row))
            else:
                record.masked.append(Masked(place.shard, place.row, cause))
        assert len(trained) == int(batch.valid.sum()), (
            "what is noted as trained on is not what the losses see"
        )
        if trained:
            record.digest = (record.digest + self._hashes[slot.dataset].total(np.array(trained))) % MODULUS
            record.trained += len(trained)
            self._trained += trained

    def leave_out(self, step: int, cause: str) -> None:
        """Note that the step at hand, whose batches are all noted, moved no weights: its samples count as masked."""
        record = self._steps[-1]
        assert record.step == step
        record.masked += [Masked(shard, row, cause) for shard, row in self._trained]
        record.digest, record.trained, self._trained = 0, 0, []

    def take(self, context: WorkerContext) -> list[StepRecord]:
        """The steps since the last part, of all workers together, to be written by worker 0. Collective."""
        records = _of_all_workers(self._steps, context)
        self._steps = []
        return records

    def write(self, records: Sequence[StepRecord]) -> PartReference:
        """Write what was taken as the ledger's next part, on worker 0; to be called before the commit.

        Returns:
            What the commit record of the checkpoint must hold.
        """
        self._newest = write_part(self._run, records, self._newest)
        return self._newest


def _of_all_workers(steps: Sequence[StepRecord], context: WorkerContext) -> list[StepRecord]:
    """The records of all workers together, the same on each. Collective: one sum, and the few masked samples."""
    import torch
    import torch.distributed as dist

    columns = [[*_limbs(one.digest), one.trained, one.empty] for one in steps]
    sums = torch.tensor(columns, dtype=torch.int64, device=context.device).reshape(len(steps), 6)
    dist.all_reduce(sums)
    masked: list[Any] = [None] * context.world_size
    dist.all_gather_object(masked, [one.masked for one in steps])
    together = []
    for number, (one, row) in enumerate(zip(steps, sums.tolist(), strict=True)):
        everywhere = sorted(each for part in masked for each in part[number])
        together.append(
            StepRecord(one.step, one.dataset, one.epoch, _from_limbs(row[:4]), row[4], row[5], everywhere)
        )
    return together


def write_part(run: Storage, records: Sequence[StepRecord], previous: PartReference | None) -> PartReference:
    """Write the ledger's next part: consecutive steps, from the one after ``previous`` on."""
    first, last = records[0].step, records[-1].step
    assert first == (previous.last + 1 if previous else 1)
    assert [one.step for one in records] == list(range(first, last + 1))
    rows = [asdict(one) | {"digest": one.digest.to_bytes(16, "little")} for one in records]
    head = {"format": FORMAT, "version": 1, "previous": asdict(previous) if previous else None}
    table = pa.Table.from_pylist(
        rows, schema=_SCHEMA.with_metadata({FORMAT: json.dumps(head, sort_keys=True)})
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", version="2.6")
    data = sink.getvalue()
    reference = PartReference(first, last, len(data), hashlib.sha256(data).hexdigest())
    run.write_bytes(reference.path, data)
    return reference


@dataclass(frozen=True)
class Gap:
    """Steps of which the ledger has nothing to say, and why."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Ledger:
    """The parts that a checkpoint vouches for, by step, and what is missing of them. Parts stay as stored."""

    parts: list[tuple[PartReference, bytes]]
    gaps: list[Gap]

    def records(self) -> Iterator[StepRecord]:
        """What all workers together were trained on, by step."""
        for _, data in self.parts:
            for row in pq.read_table(pa.BufferReader(data)).to_pylist():
                digest = int.from_bytes(row["digest"], "little")
                masked = [Masked(**each) for each in row["masked"]]
                yield StepRecord(**row | {"digest": digest, "masked": masked})


def read_ledger(run: Storage, vouched: Sequence[PartReference]) -> Ledger:
    """The ledger's parts, each verified by what vouches for it.

    Args:
        run: the run's folder.
        vouched: the newest part that each checkpoint vouches for, that of the newest checkpoint first. The
            older ones serve where a part is lost, and with it what vouched for the parts before it.
    """
    parts: list[tuple[PartReference, bytes]] = []
    gaps: list[Gap] = []
    wanted: PartReference | None = vouched[0]
    while wanted is not None:
        try:
            data = _fetch(run, wanted)
        except BadData as error:
            older = next((one for one in vouched if one.last < wanted.first), None)
            gaps.append(Gap(older.last + 1 if older else 1, wanted.last, error.detail))
            wanted = older
            continue
        parts.append((wanted, data))
        before = _head(data)["previous"]
        wanted = PartReference(**before) if before else None
    return Ledger(parts[::-1], gaps[::-1])


def _fetch(run: Storage, part: PartReference) -> bytes:
    url = run.url_of(part.path)
    try:
        data = run.read_bytes(part.path)
    except FileNotFoundError:
        raise BadData("missing-part", f"{url} is missing") from None
    if len(data) != part.size or hashlib.sha256(data).hexdigest() != part.sha256:
        raise BadData("changed-part", f"{url} is not what was written")
    return data


def _head(data: bytes) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(pq.read_schema(pa.BufferReader(data)).metadata[FORMAT.encode()])
    return head
