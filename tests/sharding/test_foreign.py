"""Promises about other programs' tars: they become a dataset without being touched, or are refused with the place."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from sharding.errors import BadData, BadDataLimit, UserError
from sharding.foreign import index_shards
from sharding.index import load_index, read_index
from sharding.manifest import MANIFEST_PATH, load_manifest
from sharding.media.config import VideoConfig
from sharding.media.transcode import transcode_video
from sharding.overlay import retract_keys
from sharding.reader import RawSample, ShardReader
from sharding.storage import Storage, open_storage
from sharding.verify import verify
from tests.fixtures.corpora import CORPUS, corpus_rows
from tests.sharding.foreign_tars import img2dataset_members, write_img2dataset, write_tar
from tests.sharding.real_media import picture


def samples_of(storage: Storage) -> dict[str, RawSample]:
    reader = ShardReader(storage, load_manifest(storage))
    return {
        sample.key: sample
        for shard, count in enumerate(reader.shard_samples)
        for sample in (reader.read(shard, row) for row in range(count))
    }


def files_of(storage: Storage) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(file.path) for file in storage.list()}


def test_img2datasets_layout_is_read_and_none_of_its_files_is_touched(tmp_path):
    images = write_img2dataset(tmp_path)
    storage = open_storage(tmp_path)
    before = files_of(storage)
    manifest = index_shards(storage, "image")
    after = files_of(storage)
    assert {path: after[path] for path in before} == before
    assert sorted(set(after) - set(before)) == [
        "index/00000.json", "index/00000.parquet", "index/00001.json", "index/00001.parquet", "manifest.json",
    ]  # fmt: skip
    assert (manifest.samples, manifest.counts.read, manifest.counts.kept) == (8, 8, 8)
    samples = samples_of(storage)
    assert {key: sample.media for key, sample in samples.items()} == images
    sample = samples["000010002"]
    assert (sample.captions, sample.extension, sample.width, sample.height) == (
        ["picture 10002"],
        "jpg",
        24,
        16,
    )
    row = load_index(storage, manifest.shards[1]).to_pylist()[2]
    assert row["source"] == "https://pictures.example/10002.jpg"
    assert row["sha256"] == hashlib.sha256(b"original 10002").hexdigest()
    found = verify(storage, manifest, decode=True)
    assert (found.faults, found.samples) == ([], 8)


def test_shards_of_webdatasets_own_writer_are_read(storage, tmp_path):
    pattern = str(tmp_path / "shard-%04d.tar")
    pictures = {}
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for number in range(7):
            key = f"sub/sample{number}" + "x" * (
                120 if number == 2 else 0
            )  # a name that needs an extended header
            pictures[key] = picture(number)
            captions = [f"first {number}", f"zweite Ü {number}"]
            writer.write({"__key__": key, "jpg": pictures[key], "json": {"texts": captions}, "cls": number})
    for path in sorted(tmp_path.glob("shard-*.tar")):
        storage.upload(path, f"train/{path.name}")
    manifest = index_shards(storage, "image", caption_field="texts")
    assert [shard.samples for shard in manifest.shards] == [3, 3, 1]
    samples = samples_of(storage)
    assert {key: sample.media for key, sample in samples.items()} == pictures
    assert samples["sub/sample4"].captions == ["first 4", "zweite Ü 4"]
    assert verify(storage, manifest).faults == []


def test_captions_come_from_the_text_where_the_json_lacks_them(tmp_path):
    members = []
    for key, text, value in (
        ("a", b"one\n\n two  words \none", None),
        ("b", b"text", {"width": 3}),
        ("c", b"text", {"caption": "json"}),
        ("d", b"text", {"caption": ["x", "x", " y ", 3]}),
        ("e", b"text", {"caption": "  "}),
    ):
        members += [(f"{key}.png", picture(1, image_format="PNG")), (f"{key}.txt", text)]
        members += [(f"{key}.json", json.dumps(value).encode())] if value is not None else []
    write_tar(tmp_path / "0.tar", members)
    storage = open_storage(tmp_path)
    manifest = index_shards(storage, "image")
    assert {key: sample.captions for key, sample in samples_of(storage).items()} == {
        "a": ["one", "two words"], "b": ["text"], "c": ["json"], "d": ["x", "y"], "e": ["text"],
    }  # fmt: skip
    assert verify(storage, manifest).faults == []


def test_samples_that_cannot_be_used_are_counted_by_cause_and_left_out(tmp_path):
    good, bad = img2dataset_members(1, "good"), picture(2)
    members = [
        *good,
        *img2dataset_members(2, None),
        ("000000003.txt", b"no media"),
        ("000000004.jpg", b"no image"),
        ("000000004.txt", b"caption"),
        ("000000005.jpg", bad),
        ("000000005.png", bad),
        ("000000005.txt", b"two media"),
        ("000000006.jpg", bad),
        ("000000006.json", b"{broken"),
        ("000000007.seg.png", b"x"),
        ("000000007.JPG", bad),
        ("000000007.txt", b"other members are passed over, extensions may be upper case"),
        ("__meta__.txt", b"of the tar"),
    ]
    write_tar(tmp_path / "0.tar", members)
    storage = open_storage(tmp_path)
    with pytest.raises(BadDataLimit, match=r"5 of 7 samples .*no-caption 2.*for example .*key 000000002"):
        index_shards(storage, "image")
    assert not storage.exists(MANIFEST_PATH)
    manifest = index_shards(storage, "image", bad_limit=0.8)
    assert (manifest.counts.read, manifest.counts.kept) == (7, 2)
    assert manifest.counts.dropped == {"decode-failed": 1, "no-caption": 2, "no-media": 1, "several-media": 1}
    assert sorted(samples_of(storage)) == ["000000001", "000000007"]
    assert verify(storage, manifest).faults == []


@pytest.mark.parametrize("at", [0.1, 0.35, 0.5, 0.77])
def test_a_truncated_tar_is_refused_with_its_name_and_the_byte(tmp_path, at):
    write_img2dataset(tmp_path)
    whole = (tmp_path / "00001.tar").read_bytes()
    end = int(len(whole) * at)
    (tmp_path / "00001.tar").write_bytes(whole[:end])
    with pytest.raises(BadData, match=rf"truncated-shard: .*/00001\.tar: ends at byte {end}\b"):
        index_shards(open_storage(tmp_path), "image")
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_tar_that_ends_at_the_edge_of_a_member_is_refused_too(tmp_path, members):
    write_tar(tmp_path / "0.tar", [(f"{n}.txt", b"x") for n in range(members)])
    whole = (tmp_path / "0.tar").read_bytes()
    edge = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for end in (edge, edge + 512):
        (tmp_path / "0.tar").write_bytes(whole[:end])
        with pytest.raises(BadData, match=f"ends at byte {end} without the end-of-archive blocks"):
            index_shards(open_storage(tmp_path), "image")


def test_a_damaged_header_is_refused_with_its_byte_and_not_taken_for_the_end(tmp_path):
    write_img2dataset(tmp_path, shards=1)
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    at = data.index(b"000000002.jpg")
    header = at // 512 * 512
    data[at + 3] ^= 1
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(BadData, match=r"bad-tar: .*/00000\.tar: .* at byte \d+"):
        index_shards(open_storage(tmp_path), "image")
    assert header > 0
    data[at + 3] ^= 1
    (tmp_path / "00000.tar").write_bytes(data + b"more")
    with pytest.raises(BadData, match="bytes after the end of the archive"):
        index_shards(open_storage(tmp_path), "image")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ["a.jpg", "b.jpg", "a.txt", "b.txt"],
            r"0\.tar: a\.txt at byte \d+ belongs to a key that stands further up",
        ),
        (
            ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"],
            r"a\.jpg at byte \d+ belongs to a key that stands",
        ),
        (["a.jpg", "a.txt", "a.jpg"], r"repeated-member 1.*a\.jpg stands twice, again at byte \d+"),
    ],
)
def test_interleaved_and_repeated_keys_of_a_tar_are_refused_with_their_place(tmp_path, members, message):
    write_tar(
        tmp_path / "0.tar", [(name, picture(1) if name.endswith("jpg") else b"text") for name in members]
    )
    with pytest.raises((UserError, BadDataLimit), match=message):
        index_shards(open_storage(tmp_path), "image")


def test_a_key_in_two_tars_is_refused(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, img2dataset_members(1, "x"))
    with pytest.raises(UserError, match=r"000000001 stands twice \(0\.tar and 1\.tar\)"):
        index_shards(open_storage(tmp_path), "image")


def test_compressed_tars_are_refused_by_name_and_by_content(tmp_path):
    storage = open_storage(tmp_path)
    write_tar(tmp_path / "0.tar.gz", img2dataset_members(1, "x"), mode="w:gz")
    with pytest.raises(UserError, match=r"0\.tar\.gz is compressed"):
        index_shards(storage, "image")
    (tmp_path / "0.tar.gz").rename(tmp_path / "0.tar")
    with pytest.raises(BadData, match=r"compressed-tar: .*/0\.tar: is gzip-compressed"):
        index_shards(storage, "image")


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no \.tar"):
        index_shards(open_storage(tmp_path), "image")


def test_indexing_again_gives_the_same_and_reads_only_what_has_no_record(tmp_path, monkeypatch):
    write_img2dataset(tmp_path, shards=3)
    storage = open_storage(tmp_path)
    manifest = index_shards(storage, "image")
    before = files_of(storage)
    opened = []
    real = Storage.open
    monkeypatch.setattr(Storage, "open", lambda self, path: opened.append(path) or real(self, path))
    assert index_shards(storage, "image") == manifest
    storage.delete(MANIFEST_PATH)
    storage.delete("index/00001.json")
    assert index_shards(storage, "image") == manifest
    assert opened == ["00001.tar"]
    assert files_of(storage) == before
    # A record of the format before, whose index had other checksums, is none.
    record = storage.read_json("index/00002.json")
    del record["version"]
    storage.write_json("index/00002.json", record)
    storage.delete(MANIFEST_PATH)
    assert index_shards(storage, "image") == manifest
    assert opened == ["00001.tar", "00002.tar"]
    assert files_of(storage) == before


def test_another_tar_or_another_option_is_refused_until_the_manifest_is_deleted(tmp_path):
    write_img2dataset(tmp_path, shards=1)
    storage = open_storage(tmp_path)
    first = index_shards(storage, "image")
    with pytest.raises(UserError, match="was indexed as"):
        index_shards(storage, "image", caption_field="alt")
    write_img2dataset(tmp_path, shards=2)
    with pytest.raises(UserError, match="tars were added, removed or changed"):
        index_shards(storage, "image")
    storage.delete(MANIFEST_PATH)
    second = index_shards(storage, "image")
    assert second.shards[:1] == first.shards
    assert second.samples == 8


def test_a_manifest_of_another_program_is_never_overwritten(tmp_path):
    write_img2dataset(tmp_path, shards=1)
    (tmp_path / "manifest.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is not a dataset manifest"):
        index_shards(open_storage(tmp_path), "image")
    assert (tmp_path / "manifest.json").read_text() == '{"mine": 1}'


def test_killed_while_indexing_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    for name in ("killed", "whole"):
        write_img2dataset(tmp_path / name, shards=6)
    index_shards(open_storage(tmp_path / "whole"), "image", name="x")
    code = (
        "import os, sys; from sharding.foreign import index_shards; from sharding.storage import open_storage\n"
        "index_shards(open_storage(sys.argv[1]), 'image', name='x', jobs=1,\n"
        "             progress=lambda done, total, record: done == 3 and os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert (tmp_path / "killed" / "index" / "00002.json").exists()
    index_shards(open_storage(tmp_path / "killed"), "image", name="x")
    found = files_of(open_storage(tmp_path / "killed"))
    expected = files_of(open_storage(tmp_path / "whole"))
    there = json.loads(found.pop(MANIFEST_PATH)), json.loads(expected.pop(MANIFEST_PATH))
    assert found == expected
    assert there[0]["shards"] == there[1]["shards"]


def test_clips_have_their_frames_and_seconds(tmp_path):
    source = (CORPUS / corpus_rows("clips.jsonl", limit=1)[0]["path"]).read_bytes()
    limits = VideoConfig(resize=64, crf=30)
    clip = transcode_video(source, limits)
    write_tar(tmp_path / "0.tar", [("a.mp4", clip.data), ("a.txt", b"moving")])
    storage = open_storage(tmp_path)
    manifest = index_shards(storage, "video")
    sample = samples_of(storage)["a"]
    assert (sample.width, sample.height, sample.frames) == (
        clip.info.width,
        clip.info.height,
        clip.info.frames,
    )
    assert sample.duration == pytest.approx(clip.info.duration, rel=0.05)
    assert verify(storage, manifest, decode=True).faults == []


def test_damage_to_an_indexed_tar_is_found_and_named(tmp_path):
    write_img2dataset(tmp_path, shards=1)
    storage = open_storage(tmp_path)
    manifest = index_shards(storage, "image")
    whole = (tmp_path / "00000.tar").read_bytes()
    rows = read_index(storage.read_bytes("index/00000.parquet")).to_pylist()

    def faults(offset: int) -> list[tuple[str, str | None]]:
        changed = bytearray(whole)
        changed[offset] ^= 4
        (tmp_path / "00000.tar").write_bytes(changed)
        return [(fault.cause, fault.key) for fault in verify(storage, manifest).faults]

    for kind in ("media", "text", "json"):
        assert faults(rows[1][f"{kind}_offset"]) == [("checksum-mismatch", "000000001")]
    assert faults(len(whole) - 1)[0][0] == "bad-tar"
    assert faults(rows[2]["media_offset"] - 512)[0][0] == "bad-tar"
    assert {key for _, key in faults(rows[2]["media_offset"] - 512)[1:]} == {"000000002", "000000003"}
    # An owner in a header is nothing that an index names; its checksum is wrong all the same.
    assert faults(rows[0]["media_offset"] - 512 + 265)[0][0] == "bad-tar"
    (tmp_path / "00000.tar").write_bytes(whole[:-512])
    assert [fault.cause for fault in verify(storage, manifest).faults] == ["size-mismatch"]


def test_samples_of_an_indexed_tar_can_be_retracted(tmp_path):
    write_img2dataset(tmp_path)
    storage = open_storage(tmp_path)
    index_shards(storage, "image")
    retract_keys(storage, ["000010001"], reason="asked to")
    with pytest.raises(BadData, match="dropped by the manifest"):
        ShardReader(storage, load_manifest(storage)).read(1, 1)
    assert index_shards(storage, "image").dropped == 1


def test_the_pictures_of_these_tests_are_pictures():
    assert Image.open(io.BytesIO(picture(1))).size == (24, 16)
    assert Path(CORPUS).is_dir()
