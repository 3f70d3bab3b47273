"""Promises of the index: the same rows are the same bytes, and a broken file is refused."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.index import INDEX_SCHEMA, IndexRow, index_table, read_index, write_index

ROW = IndexRow(
    key="000000-000001",
    extension="webp",
    media_offset=1536,
    media_size=10,
    text_offset=1024,
    text_size=5,
    json_offset=512,
    json_size=7,
    xxh3=2**64 - 1,
    text_xxh3=1,
    json_xxh3=2,
    width=8,
    height=9,
    frames=1,
    duration=0.5,
    caption_length=5,
    caption_words=1,
    captions=2,
    sha256="ab" * 32,
    source="a/ü.png",
)


def test_rows_come_back_as_written():
    table = read_index(write_index([ROW]))
    assert table.schema.equals(INDEX_SCHEMA)
    assert IndexRow(**table.to_pylist()[0]) == ROW


def test_the_same_rows_are_the_same_bytes():
    assert write_index([ROW]) == write_index(index_table([ROW]))


def test_columns_of_a_later_version_are_passed_over():
    table = index_table([ROW]).append_column("aesthetics", pa.array([0.25]))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    assert read_index(sink.getvalue().to_pybytes()).column_names == INDEX_SCHEMA.names


@pytest.mark.parametrize("cut", [0, 2, 100])
def test_a_cut_index_is_refused(cut):
    with pytest.raises(ValueError, match="index"):
        read_index(write_index([ROW])[:cut])


def test_a_missing_column_is_named():
    sink = pa.BufferOutputStream()
    pq.write_table(index_table([ROW]).drop_columns(["xxh3"]), sink)
    with pytest.raises(ValueError, match="xxh3"):
        read_index(sink.getvalue().to_pybytes())
