"""Our shards are plain WebDataset: other readers see exactly the samples ours sees."""

import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from sharding.manifest import load_manifest
from sharding.reader import RawSample, ShardReader
from sharding.storage import Storage, open_storage
from tests.sharding.real_media import write_image_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "data")
    write_image_dataset(storage, 5, shards=3)
    return storage


@pytest.fixture
def expected(dataset: Storage) -> dict[str, RawSample]:
    reader = ShardReader(dataset, load_manifest(dataset))
    samples = [reader.read(shard, row) for shard in range(3) for row in range(5)]
    return {sample.key: sample for sample in samples}


def tars(dataset: Storage) -> list[str]:
    return [str(dataset.local_path(shard.tar)) for shard in load_manifest(dataset).shards]


def test_webdataset_reads_every_sample_of_our_shards(dataset, expected):
    pipeline = webdataset.WebDataset(tars(dataset), shardshuffle=False, empty_check=False)
    found = {sample["__key__"]: sample for sample in pipeline}
    assert list(found) == list(expected)
    for key, sample in expected.items():
        assert found[key]["jpg"] == sample.media
        assert found[key]["txt"] == sample.captions[0].encode()
        description = json.loads(found[key]["json"])
        assert description["captions"] == sample.captions
        assert (description["width"], description["height"]) == (sample.width, sample.height)


def test_webdataset_decodes_our_shards(dataset, expected):
    pipeline = webdataset.WebDataset(tars(dataset), shardshuffle=False, empty_check=False)
    decoded = list(pipeline.decode("pil").to_tuple("jpg", "txt", "json"))
    assert [text for _, text, _ in decoded] == [sample.captions[0] for sample in expected.values()]
    assert all(image.size == (24, 16) for image, _, _ in decoded)
    assert [len(description["captions"]) for _, _, description in decoded] == [2] * 15


def test_tarfile_reads_our_shards(dataset, expected):
    found = {}
    for path in tars(dataset):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert all(member.isreg() and member.mtime == 0 for member in members)
            for member in members:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    assert len(found) == 3 * len(expected)
    for key, sample in expected.items():
        assert found[f"{key}.jpg"] == sample.media


def test_hugging_face_datasets_reads_our_shards(dataset, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tars(dataset)}, split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = {row["__key__"]: row for row in loaded}
    assert sorted(rows) == sorted(expected)
    for key, sample in expected.items():
        assert rows[key]["jpg"].size == (sample.width, sample.height)
        assert rows[key]["json"]["captions"] == sample.captions
        assert rows[key]["txt"] == sample.captions[0]


def test_hugging_face_datasets_streams_our_shards(dataset, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    stream = datasets.load_dataset(
        "webdataset",
        data_files={"train": tars(dataset)},
        split="train",
        streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )
    assert [row["__key__"] for row in stream] == list(expected)
