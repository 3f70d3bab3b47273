"""Promises of shards: plain WebDataset tars, contiguous keys, true offsets, equal bytes."""

import hashlib
import io
import json
import tarfile

import pytest
import webdataset
from PIL import Image
from xxhash import xxh3_64_intdigest

from sharding.errors import StorageFault
from sharding.index import read_index
from sharding.media import encode_image
from sharding.media.config import ImageConfig
from sharding.media.info import Encoded, MediaInfo
from sharding.storage import open_storage
from sharding.writer import ShardWriter, copy_without, member_header, member_info, publish


def _picture(level: int, kind: str = "webp"):
    sink = io.BytesIO()
    Image.new("RGB", (8 + level, 6), (level, level, level)).save(sink, "PNG")
    return encode_image(sink.getvalue(), ImageConfig(format=kind))


def _write(path, samples: int = 3, kind: str = "webp") -> ShardWriter:
    with ShardWriter(path) as writer:
        for number in range(samples):
            captions = [f"caption {number} ü", "another"]
            writer.add(
                f"000000-{number:06d}", _picture(number, kind), captions, f"{number:064x}", f"{number}.png"
            )
    return writer


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
def test_webdataset_and_tarfile_read_a_shard(tmp_path, kind):
    _write(tmp_path / "a.tar", kind=kind)
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000-000000", "000000-000001", "000000-000002"]
    assert samples[1]["txt"].decode() == "caption 1 ü"
    assert json.loads(samples[1]["json"])["captions"] == ["caption 1 ü", "another"]
    assert Image.open(io.BytesIO(samples[1][kind])).size == (9, 6)
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 9
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "glscl")}


def test_the_index_points_at_the_members(tmp_path):
    writer = _write(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    for number, row in enumerate(writer.rows):
        media = data[row.media_offset : row.media_offset + row.media_size]
        assert media == _picture(number).data
        assert xxh3_64_intdigest(media) == row.xxh3
        assert data[row.text_offset : row.text_offset + row.text_size].decode() == f"caption {number} ü"
        description = json.loads(data[row.json_offset : row.json_offset + row.json_size])
        assert (description["width"], description["source"]) == (8 + number, f"{number}.png")
        assert (row.width, row.height, row.frames, row.captions, row.caption_length) == (
            8 + number,
            6,
            1,
            2,
            11,
        )


def test_equal_samples_make_equal_shards(tmp_path):
    _write(tmp_path / "a.tar")
    _write(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_copying_a_shard_leaves_out_the_rows_named_and_changes_nothing_else(tmp_path):
    whole = _write(tmp_path / "whole.tar")
    with ShardWriter(tmp_path / "same.tar") as same, (tmp_path / "whole.tar").open("rb") as source:
        copy_without(source, whole.rows, set(), same)
    assert (tmp_path / "same.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()
    assert same.rows == whole.rows
    with ShardWriter(tmp_path / "less.tar") as less, (tmp_path / "whole.tar").open("rb") as source:
        copy_without(source, whole.rows, {1}, less)
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(less.path), shardshuffle=False)]
    assert keys == [row.key for row in less.rows] == ["000000-000000", "000000-000002"]


def test_keys_out_of_order_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("b", _picture(1), ["x"], "0" * 64, "x")
        with pytest.raises(ValueError, match="in order"):
            writer.add("a", _picture(1), ["x"], "0" * 64, "x")


def test_a_published_shard_is_what_its_record_says(tmp_path):
    writer = _write(tmp_path / "local.tar")
    storage = open_storage(tmp_path / "store")
    record = publish(writer, storage, "work/000004")
    tar, index = storage.read_bytes("work/000004.tar"), storage.read_bytes("work/000004.parquet")
    assert (record.name, record.samples, record.bytes) == ("000004", 3, len(tar))
    assert record.sha256 == hashlib.sha256(tar).hexdigest()
    assert (record.index_bytes, record.index_sha256) == (len(index), hashlib.sha256(index).hexdigest())
    assert read_index(index).num_rows == 3


def test_a_shard_that_the_disk_changed_before_it_was_sent_is_not_published(tmp_path):
    writer = _write(tmp_path / "local.tar")
    data = bytearray(writer.path.read_bytes())
    data[700] ^= 1
    writer.path.write_bytes(data)
    with pytest.raises(StorageFault, match="arrived changed"):
        publish(writer, open_storage(tmp_path / "store"), "000004")


@pytest.mark.parametrize("size", [0, 1, 511, 8**11 - 1])
@pytest.mark.parametrize("name", ["a.json", "x" * 100, f"{'f' * 60}/{'x' * 60}.jpg", "ü.txt"])
def test_a_members_header_is_that_of_tarfile(name, size):
    assert member_header(name, size) == member_info(name, size).tobuf(tarfile.USTAR_FORMAT, "utf-8")


def test_a_shard_is_byte_for_byte_what_tarfile_writes(tmp_path):
    keys = ["000000-000000", "000000-000001-0007", f"{'folder' * 10}/{'name' * 20}"]
    with ShardWriter(tmp_path / "shard.tar") as writer:
        for number, key in enumerate(keys):
            media = Encoded(bytes([number]) * (511 + number), "webp", MediaInfo(4, 3))
            writer.add(key, media, ["ein Füller"], "0" * 64, "source")
    tar = (tmp_path / "shard.tar").read_bytes()
    with tarfile.open(tmp_path / "own.tar", "w", format=tarfile.USTAR_FORMAT) as own:
        for row in writer.rows:
            members = {
                "json": (row.json_offset, row.json_size),
                "txt": (row.text_offset, row.text_size),
                "webp": (row.media_offset, row.media_size),
            }
            for kind, (offset, size) in members.items():
                own.addfile(member_info(f"{row.key}.{kind}", size), io.BytesIO(tar[offset : offset + size]))
    assert tar == (tmp_path / "own.tar").read_bytes()
