"""Promises of merging: every sample of every source once, under a key of its own, byte for byte, whatever happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.errors import BadData, UserError
from sharding.foreign import index_shards
from sharding.index import load_index
from sharding.manifest import MANIFEST_PATH, load_manifest
from sharding.merge import Merged, merge
from sharding.overlay import retract_keys
from sharding.reader import ShardReader
from sharding.storage import Storage, open_storage
from sharding.verify import verify
from tests.sharding.foreign_tars import write_img2dataset
from tests.sharding.real_media import write_image_dataset


def media_by_key(dataset: Storage) -> dict[str, bytes | str]:
    """Media of every sample by its key; of those that are not read, why not."""
    reader, found = ShardReader(dataset, load_manifest(dataset)), {}
    for shard, record in enumerate(reader.manifest.shards):
        for row, key in enumerate(load_index(dataset, record)["key"].to_pylist()):
            try:
                found[key] = reader.read(shard, row).media
            except BadData as error:
                found[key] = error.cause
    return found


@pytest.fixture
def sources(tmp_path: Path) -> list[Storage]:
    """Two of ours whose keys are the same and whose last and first pictures are, and one of img2dataset's."""
    first, second, third = (open_storage(tmp_path / name) for name in ("first", "second", "third"))
    write_image_dataset(first, 3, name="first", shards=2)
    write_image_dataset(second, 4, name="second", first_seed=5)
    write_img2dataset(tmp_path / "third")
    index_shards(third, "image", caption_field="caption")
    return [first, second, third]


def test_the_union_has_every_sample_under_a_key_of_its_own(storage, sources):
    merged = merge(sources, storage, "all")
    dataset = storage.at(merged.path)
    expected = media_by_key(sources[0])
    expected |= {f"m1-{key}": media for key, media in media_by_key(sources[1]).items()}
    expected |= media_by_key(sources[2])
    assert media_by_key(dataset) == expected
    assert len(expected) == 6 + 4 + 8
    assert verify(dataset, merged.manifest, decode=True).faults == []
    assert (merged.manifest.samples, merged.manifest.counts.kept, merged.manifest.dropped) == (18, 18, 0)
    assert [source["prefix"] for source in merged.manifest.source["merged"]] == ["", "m1-", ""]


def test_captions_and_descriptions_go_with_the_samples(sources, tmp_path):
    storage = open_storage(tmp_path / "out")
    merged = merge(sources, storage, "all")
    reader = ShardReader(storage.at(merged.path), merged.manifest)
    assert [reader.read(2, row).captions for row in range(2)] == [
        [f"picture {n}", "ein Bild"] for n in (5, 6)
    ]
    assert reader.read(4, 1).captions == ["picture 10001"]


def test_shards_whose_keys_are_unique_are_copied_byte_for_byte(sources, tmp_path):
    storage = open_storage(tmp_path / "out")
    merged = merge(sources, storage, "all")
    dataset = storage.at(merged.path)
    for number, (source, path) in enumerate(
        [(0, "000000.tar"), (0, "000001.tar"), (1, None), (2, "00000.tar")]
    ):
        same = path is not None and dataset.read_bytes(f"{number:06d}.tar") == sources[source].read_bytes(
            path
        )
        assert same == (path is not None)


def test_a_dataset_of_foreign_shards_is_renamed_too_when_keys_meet(tmp_path):
    write_img2dataset(tmp_path / "a")
    write_img2dataset(tmp_path / "b", samples=3)
    datasets = [open_storage(tmp_path / name) for name in "ab"]
    for dataset in datasets:
        index_shards(dataset, "image")
    storage = open_storage(tmp_path / "out")
    merged = merge(datasets, storage, "both")
    found = media_by_key(storage.at(merged.path))
    assert len(found) == 14
    assert found["m1-000010002"] == found["000010002"]
    assert verify(storage.at(merged.path), merged.manifest).faults == []


@pytest.mark.parametrize("inline_keys", [1000, 0])
def test_what_the_sources_dropped_stays_dropped(sources, tmp_path, monkeypatch, inline_keys):
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", inline_keys)
    retract_keys(sources[0], ["000001-000000"], reason="x")
    retract_keys(sources[1], ["000000-000001", "000000-000003"], reason="x")
    storage = open_storage(tmp_path / "out")
    merged = merge(sources, storage, "all")
    dataset = storage.at(merged.path)
    dropped = {key for key, media in media_by_key(dataset).items() if media == "dropped"}
    assert dropped == {"000001-000000", "m1-000000-000001", "m1-000000-000003"}
    assert load_manifest(dataset) == merged.manifest
    assert (merged.manifest.dropped, merged.manifest.retractions) == (3, [])
    assert (merged.manifest.dropped_rows is None) == (inline_keys > 0)
    assert verify(dataset, merged.manifest).faults == []
    retract_keys(dataset, ["000000-000000"], reason="y")
    assert load_manifest(dataset).dropped == 4


@pytest.mark.parametrize("samples_per_pass", [1000, 3])
def test_of_equal_sources_only_the_first_that_is_not_dropped_stays(sources, tmp_path, samples_per_pass):
    # Picture 5 is the last of the first dataset and the first of the second.
    storage = open_storage(tmp_path / "out")

    def duplicates() -> tuple[int, set[str]]:
        merged = merge(sources, storage, "all", drop_duplicates=True, samples_per_pass=samples_per_pass)
        found = media_by_key(storage.at(merged.path))
        return merged.duplicates, {key for key, media in found.items() if media == "dropped"}

    assert duplicates() == (1, {"m1-000000-000000"})
    retract_keys(sources[0], ["000001-000002"], reason="the first is dropped: the second stays")
    assert duplicates() == (0, {"000001-000002"})


def test_merging_again_gives_what_is_there_and_another_merge_is_another_dataset(sources, tmp_path):
    storage = open_storage(tmp_path / "out")
    first = merge(sources, storage, "all")
    before = {file.path: storage.read_bytes(file.path) for file in storage.list()}
    again = merge(sources, storage, "all")
    assert (again.path, again.manifest) == (first.path, first.manifest)
    assert {file.path: storage.read_bytes(file.path) for file in storage.list()} == before
    paths = {first.path, merge(sources, storage, "all", drop_duplicates=True).path}
    paths.add(merge(sources[:2], storage, "all").path)
    paths.add(merge(sources[::-1], storage, "all").path)
    assert len(paths) == 4


def test_killed_while_merging_it_goes_on_and_ends_with_the_same_bytes(sources, tmp_path):
    storage = open_storage(tmp_path / "out")
    code = (
        "import os, sys; from sharding.merge import merge; from sharding.storage import open_storage\n"
        "*sources, out = map(open_storage, sys.argv[1:])\n"
        "merge(sources, out, 'all', jobs=1,\n"
        "      progress=lambda done, total, record: done == 3 and os.kill(os.getpid(), 9))"
    )
    urls = [source.url for source in sources]
    killed = subprocess.run([sys.executable, "-c", code, *urls, storage.url], check=False)
    assert killed.returncode == -9
    files = [file.path for file in storage.list()]
    assert any(path.endswith("commits/000002.json") for path in files)
    assert not any(path.endswith(MANIFEST_PATH) for path in files)
    done: list[int] = []
    merged = merge(sources, storage, "all", progress=lambda number, total, record: done.append(total))
    other = open_storage(tmp_path / "other")
    expected = merge(sources, other, "all")
    assert merged.manifest == expected.manifest
    assert bytes_of(storage, merged) == bytes_of(other, expected)


def bytes_of(storage: Storage, merged: Merged) -> dict[str, bytes]:
    dataset = storage.at(merged.path)
    return {file.path: dataset.read_bytes(file.path) for file in dataset.list()}


def test_a_damaged_source_stops_the_merge_and_gets_no_commit_record(sources, tmp_path):
    data = bytearray(sources[1].read_bytes("000000.tar"))
    data[3000] ^= 1
    sources[1].write_bytes("000000.tar", bytes(data))
    storage = open_storage(tmp_path / "out")
    with pytest.raises(BadData, match="sha256-mismatch"):
        merge(sources, storage, "all", jobs=1)
    records = [file.path for file in storage.list() if "commits/" in file.path]
    assert not any(path.endswith("000002.json") for path in records)
    assert not any(file.path.endswith(MANIFEST_PATH) for file in storage.list())


def test_datasets_that_do_not_belong_together_are_refused(sources, tmp_path):
    storage = open_storage(tmp_path / "out")
    with pytest.raises(UserError, match="two datasets or more"):
        merge(sources[:1], storage, "all")
    with pytest.raises(UserError, match="holds the same as"):
        merge([sources[0], sources[0]], storage, "all")
    value = json.loads(sources[1].read_bytes(MANIFEST_PATH))
    sources[1].write_json(MANIFEST_PATH, value | {"modality": "video"})
    with pytest.raises(UserError, match="modality video"):
        merge(sources, storage, "all")
    assert list(storage.list()) == []
