"""Promises of verifying: whatever byte is changed is found and named, and checking goes on after a fault."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from sharding.index import IndexRow, read_index, write_index
from sharding.manifest import Manifest, load_manifest
from sharding.overlay import retract_keys
from sharding.storage import Storage, open_storage
from sharding.verify import FAULTS_OF_A_SHARD, Fault, verify, verify_shard
from sharding.writer import ShardWriter, publish
from tests.sharding.datasets import write_dataset
from tests.sharding.real_media import write_image_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "data")
    write_dataset(storage, (4, 3), size=700)
    return storage


def faults_of(storage: Storage, **options) -> list[Fault]:
    return verify(storage, load_manifest(storage), **options).faults


def flip(storage: Storage, path: str, offset: int, mask: int = 0x01) -> None:
    data = bytearray(storage.read_bytes(path))
    data[offset] ^= mask
    storage.write_bytes(path, bytes(data))


def test_a_whole_dataset_is_sound_on_both_storages(storage):
    write_dataset(storage, (4, 3), size=700)
    seen = []
    found = verify(storage, load_manifest(storage), progress=seen.append)
    assert (found.sound, found.shards, found.samples, found.more, found.extra) == (True, 2, 7, 0, [])
    assert found.bytes == sum(shard.bytes for shard in load_manifest(storage).shards)
    assert [report.name for report in seen] == ["000000", "000001"]


def test_several_processes_find_the_same(dataset):
    flip(dataset, "000001.tar", 5000)
    alone = faults_of(dataset)
    assert len(alone) == 1
    assert faults_of(dataset, jobs=2) == alone


def test_every_flipped_byte_of_a_tar_is_found_and_named_by_key_or_offset(tmp_path):
    storage = open_storage(tmp_path)
    record = write_dataset(storage, (2,), size=60).shards[0]
    whole, path = storage.read_bytes(record.tar), storage.local_path(record.tar)
    owners = owner_of_each_byte(read_index(storage.read_bytes(record.index)).to_pylist(), len(whole))
    members = max(offset for offset, owner in enumerate(owners) if owner is not None)
    # Every fifth byte up to the last member's end (5 and 512 share no divisor: all fields of a header), and of the
    # zeros after it some.
    for offset in [*range(0, members + 2, 5), *range(members + 2, len(whole), 97), len(whole) - 1]:
        changed = bytearray(whole)
        changed[offset] ^= 0x20
        path.write_bytes(changed)
        faults = verify_shard(storage, record, "image", decode=False).faults
        assert len(faults) == 1, (offset, faults)
        owner = owners[offset]
        if owner is None:
            assert (faults[0].cause, faults[0].offset) in (("bad-header", offset), ("bad-padding", offset))
        else:
            row, begin = owner
            found = (faults[0].cause, faults[0].key, faults[0].offset)
            assert found == ("checksum-mismatch", row["key"], begin)
    path.write_bytes(whole)
    assert verify_shard(storage, record, "image", decode=False).faults == []


def owner_of_each_byte(rows: list[dict], size: int) -> list[tuple[dict, int] | None]:
    """Of each byte of a tar: the row whose member's data it is part of, and where those begin; None: of the tar."""
    owners: list[tuple[dict, int] | None] = [None] * size
    for row in rows:
        for kind in ("media", "text", "json"):
            begin, length = row[f"{kind}_offset"], row[f"{kind}_size"]
            owners[begin : begin + length] = [(row, begin)] * length
    return owners


def test_checking_goes_on_after_a_fault(dataset):
    rows = read_index(dataset.read_bytes("000000.parquet")).to_pylist()
    flip(dataset, "000000.tar", rows[0]["media_offset"] + 5)
    flip(dataset, "000000.tar", rows[1]["json_offset"] - 512)
    flip(dataset, "000000.tar", rows[3]["text_offset"])
    flip(dataset, "000001.tar", dataset.size("000001.tar") - 1)
    assert [(fault.cause, fault.key) for fault in faults_of(dataset)] == [
        ("checksum-mismatch", rows[0]["key"]),
        ("bad-header", rows[1]["key"]),
        ("checksum-mismatch", rows[3]["key"]),
        ("bad-padding", None),
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_truncated_tar_is_named_with_the_byte_at_which_it_ends(dataset, share):
    whole = dataset.read_bytes("000000.tar")
    end = int(len(whole) * share)
    dataset.write_bytes("000000.tar", whole[:end])
    faults = faults_of(dataset)
    assert [fault.cause for fault in faults][-1] == "size-mismatch"
    assert all(fault.offset == end for fault in faults)
    if share < 0.9:
        assert faults[0].cause == "truncated-shard"
        assert faults[0].key is not None


def test_bytes_after_the_end_of_a_tar_are_found(dataset):
    dataset.write_bytes("000000.tar", dataset.read_bytes("000000.tar") + b"\0" * 512)
    assert [fault.cause for fault in faults_of(dataset)] == ["size-mismatch"]


def test_a_missing_tar_a_missing_index_and_a_damaged_one_are_named(dataset):
    dataset.delete("000000.tar")
    flip(dataset, "000001.parquet", 300)
    assert [(fault.cause, fault.file) for fault in faults_of(dataset)] == [
        ("missing-shard", "000000.tar"),
        ("index-mismatch", "000001.parquet"),
    ]
    dataset.delete("000001.parquet")
    assert [fault.cause for fault in faults_of(dataset)] == ["missing-shard", "missing-index"]


def test_a_tar_without_its_index_is_still_read_to_its_end(dataset):
    dataset.delete("000001.parquet")
    flip(dataset, "000001.tar", 512)  # the first byte of the first member
    assert [fault.cause for fault in faults_of(dataset)] == ["missing-index", "sha256-mismatch"]


def test_a_tar_the_manifest_does_not_name_is_a_fault_and_other_files_are_told(dataset):
    dataset.write_bytes("000009.tar", b"x")
    dataset.write_bytes("notes.txt", b"x")
    dataset.write_bytes("plan/000000.parquet", b"x")
    found = verify(dataset, load_manifest(dataset))
    assert [(fault.cause, fault.file) for fault in found.faults] == [("extra-shard", "000009.tar")]
    assert found.extra == ["notes.txt"]


def test_a_key_that_stands_in_two_shards_is_a_fault(dataset):
    manifest = load_manifest(dataset)
    dataset.write_bytes("000002.tar", dataset.read_bytes("000001.tar"))
    dataset.write_bytes("000002.parquet", dataset.read_bytes("000001.parquet"))
    twice = manifest.shards[1].model_copy(update={"name": "000002"})
    faults = verify(dataset, manifest.model_copy(update={"shards": [*manifest.shards, twice]})).faults
    assert [(fault.cause, fault.key) for fault in faults] == [
        ("duplicate-key", f"001-{row:05d}") for row in range(3)
    ]
    assert faults[0].file == "000001.tar and 000002.tar"


def test_an_index_that_says_other_than_the_tar_is_found_though_its_sha256_fits(dataset):
    def with_index(change) -> list[tuple[str, str | None]]:
        manifest = load_manifest(dataset)
        rows = [IndexRow(**row) for row in read_index(original).to_pylist()]
        data = write_index([change(rows[0]), *rows[1:]])
        dataset.write_bytes("000000.parquet", data)
        return [(fault.cause, fault.key) for fault in verify(dataset, _with_index(manifest, data)).faults]

    original = dataset.read_bytes("000000.parquet")
    key = "000-00000"
    assert with_index(lambda row: replace(row, captions=5)) == [("index-mismatch", key)]
    assert with_index(lambda row: replace(row, caption_length=1)) == [("index-mismatch", key)]
    assert with_index(lambda row: replace(row, key="000-0000")) == [("bad-header", "000-0000")] * 3
    assert ("index-mismatch", key) in with_index(
        lambda row: replace(row, media_offset=row.media_offset - 100)
    )
    assert ("unindexed", "000-00001") in with_index(
        lambda row: replace(row, text_offset=row.media_offset, text_size=0)
    )


def _with_index(manifest: Manifest, data: bytes) -> Manifest:
    first = manifest.shards[0].model_copy(
        update={"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
    )
    return manifest.model_copy(update={"shards": [first, *manifest.shards[1:]]})


def test_many_faults_are_listed_up_to_a_bound_and_counted_beyond(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_dataset(storage, (150,), size=10)
    data = bytearray(storage.read_bytes("000000.tar"))
    for row in read_index(storage.read_bytes("000000.parquet")).to_pylist():
        data[row["media_offset"]] ^= 1
    storage.write_bytes("000000.tar", bytes(data))
    found = verify(storage, manifest)
    assert (len(found.faults), found.more) == (FAULTS_OF_A_SHARD, 50)


def test_a_lost_or_changed_file_of_retracted_rows_is_a_fault(dataset, monkeypatch):
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", 1)
    rows = retract_keys(dataset, ["000-00000", "001-00001"], reason="asked to").after.dropped_rows
    assert rows is not None
    assert faults_of(dataset) == []
    flip(dataset, rows.path, 100)
    assert [(fault.cause, fault.file) for fault in faults_of(dataset)] == [("bad-overlay", rows.path)]


def test_decoding_finds_media_that_were_broken_when_they_were_written(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_image_dataset(storage, 3, broken={1})
    assert verify(storage, manifest).sound
    faults = verify(storage, manifest, decode=True).faults
    assert [(fault.cause, fault.key) for fault in faults] == [("decode-failed", "000000-000001")]


def test_captions_that_are_not_texts_are_found(tmp_path):
    storage = open_storage(tmp_path / "data")
    manifest = write_dataset(storage, (1,), size=10)
    row = IndexRow(**read_index(storage.read_bytes("000000.parquet")).to_pylist()[0])
    with ShardWriter(tmp_path / "shard.tar") as writer:
        members = {"jpg": b"x", "txt": b"a", "json": json.dumps({"captions": [1]}).encode()}
        checksums = {"xxh3": "jpg", "text_xxh3": "txt", "json_xxh3": "json"}
        sizes = {"media_size": "jpg", "text_size": "txt", "json_size": "json"}
        changes = {name: xxh3_64_intdigest(members[of]) for name, of in checksums.items()}
        changes |= {name: len(members[of]) for name, of in sizes.items()}
        writer.add_members(replace(row, **changes), members)
    record = publish(writer, storage, "000000")
    faults = verify(storage, manifest.model_copy(update={"shards": [record]})).faults
    assert [(fault.cause, fault.key) for fault in faults] == [("bad-json", "000-00000")]


def test_faults_read_as_one_line():
    fault = Fault("checksum-mismatch", "000000.tar", "the media member has another checksum", "k", 1536)
    assert (
        str(fault) == "000000.tar, key k, byte 1536: checksum-mismatch: the media member has another checksum"
    )
