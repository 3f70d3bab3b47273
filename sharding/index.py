"""The Parquet index beside each shard: where each member lies in the tar, and what the sample is.

With it a sample is one range read, and a plan over the dataset needs no tar. One row a sample, in the order
of the tar. Offsets are those of a member's *data* (its 512-byte header lies before); the members of one key
are contiguous, so that one read from the smallest offset to the largest end has all of them. A sample of
another program's shard may lack the text or the JSON: then its size is 0 and its offset that of the media.

Members are checked by XXH3-64 (https://xxhash.com) on every read: it tells damage, and takes a twentieth of what zlib's
crc32 takes. Against intent there is the manifest's sha256 of each shard and index.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.errors import BadData

if TYPE_CHECKING:
    from sharding.manifest import ShardRecord
    from sharding.storage import Storage

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("extension", pa.string(), nullable=False),  # of the media member, without the dot
        pa.field("media_offset", pa.int64(), nullable=False),
        pa.field("media_size", pa.int64(), nullable=False),
        pa.field("text_offset", pa.int64(), nullable=False),
        pa.field("text_size", pa.int64(), nullable=False),
        pa.field("json_offset", pa.int64(), nullable=False),
        pa.field("json_size", pa.int64(), nullable=False),
        pa.field("xxh3", pa.uint64(), nullable=False),  # XXH3-64 of the media member
        pa.field("text_xxh3", pa.uint64(), nullable=False),
        pa.field("json_xxh3", pa.uint64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # pixels, of the media as stored
        pa.field("height", pa.int32(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # 1 for an image
        pa.field("duration", pa.float32(), nullable=False),  # seconds, 0 for an image
        pa.field("caption_length", pa.int32(), nullable=False),  # characters of the first caption
        pa.field("captions", pa.int32(), nullable=False),  # how many
        pa.field("sha256", pa.string(), nullable=False),  # of the source's bytes, and the part
        pa.field("source", pa.string(), nullable=False),  # address the media came from
        pa.field("caption_words", pa.int32()),  # of the first caption (sharding/filters/words.py)
        pa.field("phash", pa.uint64()),  # perceptual hash of what is stored (sharding/fingerprint.py)
        pa.field("pixels", pa.string()),  # digest of its pixels (sharding/fingerprint.py)
        pa.field("score", pa.float32()),  # image-text score, where a scorer was asked
    ]
)


@dataclass(frozen=True)
class IndexRow:
    """One row of the index; the fields are those of ``INDEX_SCHEMA``."""

    key: str
    extension: str
    media_offset: int
    media_size: int
    text_offset: int
    text_size: int
    json_offset: int
    json_size: int
    xxh3: int
    text_xxh3: int
    json_xxh3: int
    width: int
    height: int
    frames: int
    duration: float
    caption_length: int
    captions: int
    sha256: str
    source: str
    caption_words: int | None = None
    phash: int | None = None
    pixels: str | None = None
    score: float | None = None


def index_table(rows: Sequence[IndexRow]) -> pa.Table:
    """The rows as an Arrow table of ``INDEX_SCHEMA``."""
    return pa.Table.from_pylist([vars(row) for row in rows], schema=INDEX_SCHEMA)


def write_index(index: pa.Table | Sequence[IndexRow]) -> bytes:
    """The index as Parquet. The same rows give the same bytes."""
    table = index if isinstance(index, pa.Table) else index_table(index)
    sink = io.BytesIO()
    pq.write_table(table.cast(INDEX_SCHEMA), sink, compression="zstd", version="2.6")
    return sink.getvalue()


def read_index(data: bytes) -> pa.Table:
    """The index from its Parquet bytes.

    Raises:
        ValueError: it is not Parquet, or a column is missing or of another type.
    """
    try:
        table = pq.read_table(pa.BufferReader(data))
        missing = [name for name in INDEX_SCHEMA.names if name not in table.column_names]
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged pages, and names that are not UTF-8
        raise ValueError(f"the index is not Parquet: {error}") from None
    if missing:
        raise ValueError(f"the index has no column {', '.join(missing)}")
    # Later versions may add columns (scores): those this version does not know are left out.
    try:
        return table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"the index has a column of another type: {error}") from None


def load_index(dataset: Storage, record: ShardRecord) -> pa.Table:
    """The index of a shard, checked against the manifest's record of it.

    Raises:
        BadData: ``missing-index`` or ``index-mismatch``; the detail names the url.
    """
    url = dataset.url_of(record.index)
    try:
        data = dataset.read_bytes(record.index)
    except FileNotFoundError:
        raise BadData("missing-index", f"{url} does not exist, but the manifest names it") from None
    found = hashlib.sha256(data).hexdigest()
    if found != record.index_sha256:
        detail = f"{url} was changed or damaged: sha256 {found}, but {record.index_sha256} in the manifest"
        raise BadData("index-mismatch", detail)
    try:
        table = read_index(data)
    except ValueError as error:
        raise BadData("index-mismatch", f"{url}: {error}") from None
    if len(table) != record.samples:
        raise BadData("index-mismatch", f"{url} has {len(table)} rows, the manifest {record.samples}")
    return table
