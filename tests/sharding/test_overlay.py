"""Promises of retracting: what was dropped is never read, nothing is lost or overwritten, and it can be undone."""

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from sharding.errors import BadData, UserError
from sharding.manifest import find_manifest, load_manifest, overlay_path
from sharding.overlay import Dropped, retract_keys, retract_where, undo
from sharding.reader import ShardReader
from sharding.rules import parse_rule
from sharding.storage import Storage, open_storage
from tests.sharding.datasets import write_dataset

KEYS = [f"{shard:03d}-{row:05d}" for shard, rows in ((0, 5), (1, 3)) for row in range(rows)]


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "data")
    write_dataset(storage)
    return storage


@pytest.fixture(params=["inline", "in a file"])
def inline_keys(request, monkeypatch) -> str:
    """Runs a test with the dropped keys in the overlay itself, and with all of them in its file of rows."""
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", 1000 if request.param == "inline" else 0)
    return request.param


def unreadable(storage: Storage) -> list[str]:
    """Keys that a reader refuses as dropped."""
    reader, keys = ShardReader(storage, load_manifest(storage)), []
    for shard, record in enumerate(reader.manifest.shards):
        for row in range(record.samples):
            try:
                reader.read(shard, row)
            except BadData as error:
                if error.cause != "dropped":
                    raise
                keys.append(f"{shard:03d}-{row:05d}")
    return keys


def test_dropped_keys_are_not_read_and_the_digest_is_another(storage, inline_keys):
    before = write_dataset(storage)
    result = retract_keys(storage, [KEYS[6], KEYS[1]], reason="asked to")
    assert unreadable(storage) == [KEYS[1], KEYS[6]]
    after = load_manifest(storage)
    assert after == result.after
    assert after.digest != before.digest
    assert (after.samples, after.dropped, after.revision) == (8, 2, 1)
    assert (after.dropped_rows is None) == (inline_keys == "inline")
    assert [(entry.samples, entry.reason, entry.rule) for entry in after.retractions] == [
        (2, "asked to", "2 keys")
    ]


def test_the_former_manifest_and_every_tar_stay_as_they_were(dataset):
    before = {file.path: dataset.read_bytes(file.path) for file in dataset.list()}
    digest = load_manifest(dataset).digest
    retract_keys(dataset, KEYS[:2], reason="one")
    first = load_manifest(dataset)
    retract_keys(dataset, KEYS[5:6], reason="two")
    assert {path: dataset.read_bytes(path) for path in before} == before
    assert load_manifest(dataset, 0).digest == digest
    assert load_manifest(dataset, 1) == first
    assert find_manifest(dataset, digest) == load_manifest(dataset, 0)
    assert find_manifest(dataset, first.digest) == first
    assert find_manifest(dataset, "0" * 64) is None


def test_retractions_add_up_from_keys_in_the_overlay_to_a_file_of_rows(dataset, monkeypatch):
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", 2)
    for number, key in enumerate(KEYS[:4], 1):
        retract_keys(dataset, [key], reason="one more")
        assert unreadable(dataset) == KEYS[:number]
        assert (load_manifest(dataset).dropped_rows is None) == (number <= 2)


def test_a_rule_drops_what_fits_it(dataset, inline_keys):
    rule = "frames >= 3 and extension in ('png', 'mp4')"
    result = retract_where(dataset, parse_rule(rule), rule=rule, reason="too long")
    expected = [KEYS[2], KEYS[3], KEYS[7]]
    assert result.rows.to_pydict() == {"shard": [0, 0, 1], "row": [2, 3, 2], "key": expected}
    assert unreadable(dataset) == expected
    assert load_manifest(dataset).retractions[0].rule == rule


def test_what_is_dropped_already_is_not_dropped_twice(dataset, inline_keys):
    retract_keys(dataset, KEYS[:2], reason="first")
    again = retract_keys(dataset, KEYS[1:3], reason="second")
    assert (again.already, again.rows["key"].to_pylist()) == (1, [KEYS[2]])
    nothing = retract_keys(dataset, KEYS[:2], reason="third")
    assert nothing.before == nothing.after == load_manifest(dataset)
    assert load_manifest(dataset).revision == 2


def test_a_dry_run_tells_and_changes_nothing(dataset):
    before = {file.path: dataset.read_bytes(file.path) for file in dataset.list()}
    result = retract_keys(dataset, KEYS[:3], reason="", dry_run=True)
    assert result.rows["key"].to_pylist() == KEYS[:3]
    assert {file.path: dataset.read_bytes(file.path) for file in dataset.list()} == before


def test_a_key_the_dataset_does_not_have_is_refused_or_passed_over(dataset):
    with pytest.raises(UserError, match=r"no sample with the key nobody \(1 of 2\)"):
        retract_keys(dataset, ["nobody", KEYS[0]], reason="x")
    assert load_manifest(dataset).dropped == 0
    result = retract_keys(dataset, ["nobody", KEYS[0]], reason="x", ignore_unknown=True)
    assert (result.unknown, unreadable(dataset)) == (["nobody"], [KEYS[0]])
    with pytest.raises(UserError, match="no key"):
        retract_keys(dataset, [], reason="x")


def test_undoing_gives_the_former_digest_again(dataset, inline_keys):
    digests = [load_manifest(dataset).digest]
    for key in KEYS[:3]:
        digests.append(retract_keys(dataset, [key], reason="x").after.digest)
    assert len(set(digests)) == 4
    undo(dataset, reason="a mistake")
    assert load_manifest(dataset).digest == digests[2]
    undo(dataset, reason="a mistake")
    assert load_manifest(dataset).digest == digests[1]
    retract_keys(dataset, [KEYS[7]], reason="y")
    assert unreadable(dataset) == [KEYS[0], KEYS[7]]
    undo(dataset, reason="")
    undo(dataset, reason="")
    assert load_manifest(dataset).digest == digests[0]
    assert unreadable(dataset) == []
    history = [(entry.samples, entry.rule) for entry in load_manifest(dataset).retractions]
    assert history == [
        (1, f"key {KEYS[0]}"), (1, f"key {KEYS[1]}"), (1, f"key {KEYS[2]}"), (-1, "undo 3"), (-1, "undo 2"),
        (1, f"key {KEYS[7]}"), (-1, "undo 6"), (-1, "undo 1"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="no retraction to undo"):
        undo(dataset, reason="")


def test_of_retractions_at_once_none_is_lost(storage, inline_keys):
    write_dataset(storage)
    start = threading.Barrier(4)

    def work(keys: list[str]) -> None:
        start.wait()
        for key in keys:
            retract_keys(storage, [key], reason="at once")

    threads = [threading.Thread(target=work, args=(KEYS[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unreadable(storage) == KEYS
    manifest = load_manifest(storage)
    assert (manifest.dropped, manifest.revision) == (8, 8)


def test_a_writer_that_dies_before_its_last_write_leaves_the_dataset_as_it_was(dataset, monkeypatch):
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", 0)
    before = load_manifest(dataset)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "create_exclusive", die)
        with pytest.raises(KeyboardInterrupt):
            retract_keys(dataset, KEYS[:1], reason="x")
    assert load_manifest(dataset) == before
    retract_keys(dataset, KEYS[:1], reason="x")
    assert unreadable(dataset) == KEYS[:1]


def test_a_lost_or_damaged_file_of_rows_stops_reading_rather_than_bring_samples_back(dataset, monkeypatch):
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", 0)
    rows = retract_keys(dataset, KEYS[:1], reason="x").after.dropped_rows
    assert rows is not None
    data = dataset.read_bytes(rows.path)
    dataset.write_bytes(rows.path, data[:-1] + b"x")
    with pytest.raises(UserError, match="changed or damaged"):
        unreadable(dataset)
    dataset.delete(rows.path)
    with pytest.raises(UserError, match="missing"):
        unreadable(dataset)


def test_an_overlay_of_another_dataset_is_refused(dataset, tmp_path):
    other = open_storage(tmp_path / "other")
    write_dataset(other, (2,))
    retract_keys(dataset, KEYS[:1], reason="x")
    other.write_bytes(overlay_path(1), dataset.read_bytes(overlay_path(1)))
    with pytest.raises(UserError, match="belongs to another dataset"):
        load_manifest(other)


def test_the_mask_of_a_shard_agrees_with_single_questions(dataset, inline_keys):
    retract_keys(dataset, [KEYS[1], KEYS[4], KEYS[5]], reason="x")
    dropped = Dropped(dataset, load_manifest(dataset))
    assert len(dropped) == 3
    for shard, keys in enumerate((KEYS[:5], KEYS[5:])):
        single = [dropped.holds(shard, row, key) for row, key in enumerate(keys)]
        assert dropped.mask(shard, pa.array(keys)).tolist() == single
