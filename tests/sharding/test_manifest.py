"""Promises of the manifest: what names a dataset, and what becomes of a broken one."""

import pickle

import pytest

from sharding.errors import UserError
from sharding.manifest import MANIFEST_PATH, Counts, Manifest, ShardRecord, canonical_digest, load_manifest
from sharding.storage import open_storage


def _manifest(**changes):
    values = {
        "name": "pairs",
        "modality": "image",
        "configuration": {"b": 1, "a": 2},
        "configuration_digest": "c" * 64,
        "source": {"url": "file:///x", "inputs": 3, "digest": "d" * 64},
        "shards": [
            ShardRecord(
                name="000000", samples=2, bytes=10, sha256="e" * 64, index_bytes=5, index_sha256="f" * 64
            )
        ],
        "counts": Counts(read=3, kept=2, dropped={"duplicate": 1}),
    }
    return Manifest(**(values | changes))


def test_a_manifest_comes_back_from_storage_with_the_same_digest(tmp_path):
    storage = open_storage(tmp_path)
    manifest = _manifest()
    storage.write_json(MANIFEST_PATH, manifest.model_dump(mode="json"))
    loaded = load_manifest(storage)
    assert loaded == manifest
    assert loaded.digest == manifest.digest
    assert loaded.samples == 2
    assert (loaded.shards[0].tar, loaded.shards[0].index) == ("000000.tar", "000000.parquet")


def test_the_digest_is_that_of_what_the_dataset_holds_wherever_it_came_from():
    shard = _manifest().shards[0]
    assert _manifest().digest == _manifest(source={"url": "s3://b/x", "inputs": 3, "digest": "d" * 64}).digest
    assert _manifest().digest != _manifest(shards=[shard.model_copy(update={"sha256": "0" * 64})]).digest
    assert _manifest().digest != _manifest(dropped_keys=["000000-000001"]).digest
    assert canonical_digest({"a": 1, "b": 2}) == canonical_digest({"b": 2, "a": 1})


def test_a_retraction_is_another_dataset_of_the_same_shards():
    manifest = _manifest()
    named = manifest.digest, manifest.shards_digest  # computed once, and not carried over to a changed copy
    retracted = manifest.model_copy(update={"dropped_keys": ["000000-000001"]})
    assert retracted.digest == _manifest(dropped_keys=["000000-000001"]).digest != named[0]
    assert retracted.shards_digest == named[1]
    shard = manifest.shards[0].model_copy(update={"sha256": "0" * 64, "samples": 5})
    changed = manifest.model_copy(update={"shards": [shard]}, deep=True)
    assert changed.shards_digest == _manifest(shards=[shard]).shards_digest != named[1]
    assert changed.samples == 5
    assert (manifest.digest, manifest.shards_digest) == named


def test_a_pickled_manifest_is_the_same():
    manifest = _manifest(dropped_keys=["ü"], configuration={"a": 0.1, "b": None, "c": [1, "ß"]})
    copy = pickle.loads(pickle.dumps(manifest))  # noqa: S301
    assert copy == manifest
    assert copy.digest == manifest.digest


def test_what_was_computed_of_a_manifest_is_neither_written_nor_compared():
    manifest = _manifest()
    assert manifest.digest
    assert manifest.samples == 2
    assert manifest == _manifest()
    assert manifest.model_dump().keys() == Manifest.model_fields.keys()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no dataset at"),
        (b"{", "prepare the dataset again"),
        (b"[]", "not a dataset manifest"),
        (b'{"format": "glscl-dataset", "version": 1}', "version 1; this program reads version 2"),
        (b'{"format": "glscl-dataset", "version": 2}', "name"),
    ],
)
def test_a_missing_or_broken_manifest_is_one_line_that_names_its_url(tmp_path, content, says):
    storage = open_storage(tmp_path)
    if content is not None:
        storage.write_bytes(MANIFEST_PATH, content)
    with pytest.raises(UserError, match=says) as caught:
        load_manifest(storage)
    assert storage.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_counts_add_up_by_cause():
    total = Counts(read=3, kept=1, dropped={"b": 2}).plus(
        Counts(read=4, kept=2, dropped={"a": 1, "b": 1}, captions_dropped={"c": 1})
    )
    assert total == Counts(read=7, kept=3, dropped={"a": 1, "b": 3}, captions_dropped={"c": 1})
    assert list(total.dropped) == ["a", "b"]
