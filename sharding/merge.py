"""Several datasets of one modality as one: the plain union of their shards, in the order given.

::

    birds-1a2b.../000000.tar ... 000041.tar   --copied-->     all-9f8e.../000000.tar ... 000041.tar
    more-3c4d.../000000.tar ... 000007.tar    --renamed-->    all-9f8e.../000042.tar ... 000049.tar

Media are not touched. A shard is copied byte for byte where its keys are unique in the union. A dataset of which any
key stands in one before it has all its keys prefixed: its tars are written again, the same members under other
names, so that equal sources give equal bytes. What the sources' overlays drop stays dropped.

The result is ``datasets/NAME-DIGEST``, where the digest is of the sources and options: the same merge again finds what
is done (each shard has a commit record, the manifest is written last), and another merge is another dataset.

Merging is not mixing by weights: that is what a training's ``mixture`` does, with datasets left apart.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.errors import BadData, StorageFault, UserError
from sharding.filters.duplicates import digest_words, later_copies
from sharding.index import load_index, write_index
from sharding.keys import KeyedShard, keyed_shard, repeated_keys
from sharding.manifest import (
    MANIFEST_PATH,
    Counts,
    Manifest,
    Retraction,
    ShardRecord,
    canonical_digest,
    load_manifest,
)
from sharding.overlay import ROWS_SCHEMA, Dropped, with_dropped
from sharding.storage import Storage
from sharding.tarnames import clean_name, is_of_tar
from sharding.tarwalk import TarWalk
from sharding.writer import member_info

_PASS = 20_000_000  # digests looked at in one pass for duplicates: 24 bytes each


@dataclass(frozen=True)
class Source:
    """A dataset that is merged; ``prefix`` of its keys in the result."""

    dataset: Storage
    manifest: Manifest
    prefix: str = ""


@dataclass(frozen=True)
class Merged:
    """The result. ``path`` relative to the storage; ``duplicates`` dropped by the overlay."""

    path: str
    manifest: Manifest
    duplicates: int


@dataclass(frozen=True)
class _Job:
    """One shard to be made: ``number`` in the result, from the shard ``record`` of ``source``."""

    number: int
    source: Source
    shard: int

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


def merge(
    datasets: list[Storage],
    storage: Storage,
    name: str,
    *,
    drop_duplicates: bool = False,
    jobs: int = 4,
    samples_per_pass: int = _PASS,
    progress: Callable[[int, int, ShardRecord], None] | None = None,
) -> Merged:
    """Make the union, or go on making it, or return it when it is there.

    Args:
        datasets: two or more folders of datasets, in order.
        storage: the result goes to its ``datasets/NAME-DIGEST``.
        drop_duplicates: of samples made from equal bytes (sha256 of the source), in whichever dataset, only the
            first that is not dropped already stays; the others are dropped by the overlay.
        jobs: shards at a time; each takes the space of one on the local disk.
        samples_per_pass: bounds the memory that finding duplicates takes, 24 bytes each; more samples take more
            passes over the indexes.
        progress: called after each shard with (number done, number of shards, its record).

    Raises:
        UserError: fewer than two datasets, one given twice, different modalities.
        BadData: a shard is not what its manifest says (then nothing of it is in the result).
    """
    sources = _open(datasets)
    identity = {
        "kind": "merge",
        "sources": [source.manifest.digest for source in sources],
        "drop_duplicates": drop_duplicates,
    }
    path = f"datasets/{name}-{canonical_digest(identity)[:12]}"
    target = storage.at(path)
    if target.exists(MANIFEST_PATH):
        manifest = load_manifest(target)
        return Merged(path, manifest, int(manifest.source.get("duplicates", 0)))
    target.check(write=True)
    sources = _prefixed(sources)
    work = [
        _Job(number, source, shard)
        for number, (source, shard) in enumerate(
            (source, shard) for source in sources for shard in range(len(source.manifest.shards))
        )
    ]
    records: list[ShardRecord] = []
    with ThreadPoolExecutor(jobs, thread_name_prefix="merge") as pool:
        try:
            for record in pool.map(lambda job: _make(target, job), work):
                records.append(record)
                if progress is not None:
                    progress(len(records), len(work), record)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    counts = Counts()
    for source in sources:
        counts = counts.plus(source.manifest.counts)
    manifest = Manifest(
        name=name,
        modality=sources[0].manifest.modality,
        configuration={"source": identity},
        configuration_digest=canonical_digest(identity),
        source={},
        shards=records,
        counts=counts,
    )
    carried, duplicates = _overlay(work, drop_duplicates, samples_per_pass)
    if len(carried):
        entry = Retraction(samples=len(carried), reason="dropped in the merged datasets", rule="merge")
        manifest = with_dropped(target, manifest, carried, entry)
    if len(duplicates):
        entry = Retraction(
            samples=len(duplicates), reason="made from the same bytes as another", rule="drop-duplicates"
        )
        manifest = with_dropped(target, manifest, duplicates, entry)
    # The history of a dataset begins with its manifest: what it is made with is no retraction.
    manifest = manifest.model_copy(
        update={"retractions": [], "source": _description(sources, len(carried), len(duplicates))}
    )
    target.write_json(MANIFEST_PATH, manifest.model_dump(mode="json"))
    return Merged(path, manifest, len(duplicates))


def _open(datasets: list[Storage]) -> list[Source]:
    if len(datasets) < 2:
        raise UserError("merge takes two datasets or more")
    sources = [Source(dataset, load_manifest(dataset)) for dataset in datasets]
    seen: dict[str, str] = {}
    for source in sources:
        digest = source.manifest.digest
        if digest in seen:
            raise UserError(
                f"{source.dataset.url} holds the same as {seen[digest]}: a dataset is merged once"
            )
        seen[digest] = source.dataset.url
        if source.manifest.modality != sources[0].manifest.modality:
            raise UserError(
                f"{source.dataset.url} is of modality {source.manifest.modality}, {sources[0].dataset.url} of "
                f"{sources[0].manifest.modality}: a dataset has one"
            )
    return sources


def _description(sources: list[Source], carried: int, duplicates: int) -> dict[str, Any]:
    described = [
        {
            "name": source.manifest.name,
            "url": source.dataset.url,
            "digest": source.manifest.digest,
            "samples": source.manifest.samples,
            "prefix": source.prefix,
        }
        for source in sources
    ]
    return {"url": sources[0].dataset.url, "merged": described, "dropped": carried, "duplicates": duplicates}


def _prefixed(sources: list[Source]) -> list[Source]:
    """Give those a prefix of which a key stands in one before; keys of the result are unique."""
    result: list[Source] = []
    taken: list[KeyedShard] = []
    for number, source in enumerate(sources):
        shards = [keyed_shard(source.dataset, record) for record in source.manifest.shards]
        prefix, attempt = "", 0
        while repeated_keys([*taken, *(_with_prefix(shard, prefix) for shard in shards)], limit=1):
            prefix = f"m{number}" + "x" * attempt + "-"
            attempt += 1
        taken += [_with_prefix(shard, prefix) for shard in shards]
        result.append(Source(source.dataset, source.manifest, prefix))
    return result


def _with_prefix(shard: KeyedShard, prefix: str) -> KeyedShard:
    return KeyedShard(
        shard.dataset, shard.record, prefix + shard.first, prefix + shard.last, shard.prefix + prefix
    )


def _make(target: Storage, job: _Job) -> ShardRecord:
    """Make one shard of the result, unless its commit record says that this was done."""
    path = f"commits/{job.name}.json"
    try:
        return ShardRecord.model_validate(target.read_json(path))
    except UserError:
        raise  # a ValueError too: the storage refuses
    except (FileNotFoundError, ValueError):
        pass  # not made yet, or its record is damaged
    source = job.source.manifest.shards[job.shard]
    index = load_index(job.source.dataset, source)
    with tempfile.TemporaryDirectory(prefix="glscl-merge-") as folder:
        tar = Path(folder) / "source.tar"
        job.source.dataset.download(source.tar, tar, size=source.bytes, sha256=source.sha256)
        if job.source.prefix:
            renamed = Path(folder) / "renamed.tar"
            places = _rename(tar, renamed, job.source.prefix, job.source.dataset.url_of(source.tar))
            index = _moved(index, places, job.source.prefix, job.source.dataset.url_of(source.index))
            tar = renamed
        with tar.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        sent = target.upload(tar, f"{job.name}.tar")
        if (sent.size, sent.sha256) != (tar.stat().st_size, sha256):
            raise StorageFault(f"{target.url_of(job.name)}.tar: the shard arrived changed")
    data = write_index(index)
    record = ShardRecord(
        name=job.name,
        samples=source.samples,
        bytes=sent.size,
        sha256=sha256,
        index_bytes=len(data),
        index_sha256=hashlib.sha256(data).hexdigest(),
        caption_field=source.caption_field,
    )
    target.write_bytes(record.index, data)
    target.write_json(path, record.model_dump(mode="json"))
    return record


def _rename(source: Path, destination: Path, prefix: str, url: str) -> dict[int, int]:
    """Write a tar again with prefixed names; gives the offset of each member's data in the new one by the old."""
    places = {}
    with (
        source.open("rb") as file,
        destination.open("wb") as out,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for member, data in TarWalk(file, url).members():
            if not member.regular:
                continue
            # __classnames__.txt and the like are of no sample.
            name = member.name if is_of_tar(member.name) else prefix + clean_name(member.name)
            tar.addfile(member_info(name, member.size), io.BytesIO(data))
            places[member.offset] = _data_offset(out, member.size)
    return places


def _data_offset(out: BinaryIO, size: int) -> int:
    """Where the data of the member lie that was just written."""
    return out.tell() - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _moved(index: pa.Table, places: dict[int, int], prefix: str, url: str) -> pa.Table:
    """The index of a tar whose members were renamed and so moved."""
    columns = {name: index[name] for name in index.column_names}
    columns["key"] = pc.binary_join_element_wise(prefix, index["key"], "")
    for name in ("media_offset", "text_offset", "json_offset"):
        try:
            moved = [places[offset] for offset in index[name].to_pylist()]
        except KeyError as error:
            raise BadData("index-mismatch", f"{url}: no member at byte {error} ({name})") from None
        columns[name] = pa.chunked_array([pa.array(moved, pa.int64())])
    return pa.table(columns, schema=index.schema)


def _overlay(work: list[_Job], drop_duplicates: bool, samples_per_pass: int) -> tuple[pa.Table, pa.Table]:
    """Rows of the result (shard, row, key) that the sources drop, and that are duplicates."""
    overlays = {id(job.source): Dropped(job.source.dataset, job.source.manifest) for job in work}
    carried = [ROWS_SCHEMA.empty_table()]
    for job in work:
        if len(overlays[id(job.source)]):
            index = load_index(job.source.dataset, job.source.manifest.shards[job.shard])
            mask = overlays[id(job.source)].mask(job.shard, index["key"])
            carried.append(_as_rows(job, index, np.flatnonzero(mask)))
    if not drop_duplicates:
        return pa.concat_tables(carried), ROWS_SCHEMA.empty_table()
    samples = sum(job.source.manifest.shards[job.shard].samples for job in work)
    passes = max(1, -(-samples // samples_per_pass))
    copies = [ROWS_SCHEMA.empty_table()]
    for number in range(passes):
        copies += _duplicates(work, overlays, number, passes)
    rows = pa.concat_tables(copies).sort_by([("shard", "ascending"), ("row", "ascending")])
    return pa.concat_tables(carried), rows


def _duplicates(
    work: list[_Job], overlays: dict[int, Dropped], number: int, passes: int
) -> Iterator[pa.Table]:
    """Later copies among the digests of one pass: those of which the first word leaves ``number``."""
    words, rows, sizes = [], [], []
    for job in work:
        index = load_index(job.source.dataset, job.source.manifest.shards[job.shard])
        digests = digest_words(index["sha256"].to_pylist())
        mine = digests[:, 0] % np.uint64(passes) == number
        mine &= ~overlays[id(job.source)].mask(job.shard, index["key"])
        words.append(digests[mine])
        rows.append(np.flatnonzero(mine).astype(np.int32))
        sizes.append(len(rows[-1]))
    copies = later_copies(np.concatenate(words))
    begin = 0
    for job, size, places in zip(work, sizes, rows, strict=True):
        picked = places[copies[begin : begin + size]]
        begin += size
        if len(picked):
            index = load_index(job.source.dataset, job.source.manifest.shards[job.shard])
            yield _as_rows(job, index, picked)


def _as_rows(job: _Job, index: pa.Table, rows: np.ndarray) -> pa.Table:
    keys = [job.source.prefix + key for key in index["key"].take(pa.array(rows)).to_pylist()]
    shard = np.full(len(rows), job.number, np.int32)
    return pa.table(
        [pa.array(shard), pa.array(rows.astype(np.int32)), pa.array(keys, pa.string())], schema=ROWS_SCHEMA
    )
