"""Promises of Hugging Face datasets as sources: bytes as they are, by row, and no code of theirs."""

import io
import json
import struct

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sharding.errors import UserError
from sharding.sources import huggingface as module
from sharding.sources import open_source
from sharding.storage import open_storage
from tests.sharding.listings import configured, fetched, listed, source

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    module._media_rows.cache_clear()


def _png(number):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def _dataset(count=5):
    rows = {
        "image": [{"bytes": _png(n), "path": f"{n}.png"} for n in range(count)],
        "text": [f"c{n}" for n in range(count)],
        "more": [["x", "y"] if n else None for n in range(count)],
        "url": [f"http://h/{n}.png" if n else None for n in range(count)],
    }
    texts = datasets.List(datasets.Value("string"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "more": texts,
            "url": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def _config(folder, **options):
    path = None if folder is None else str(folder)
    defaults = {"kind": "huggingface", "path": path, "media_column": "image", "caption_column": "text"}
    return configured(**{**defaults, **options})


def _read(path, **options):
    return fetched(_config(path, **options), open_storage(path))


def test_a_saved_dataset_gives_its_undecoded_bytes_by_row(tmp_path):
    _dataset().save_to_disk(str(tmp_path / "saved"))
    results = _read(tmp_path / "saved", caption_column=["text", "more"])
    assert [item.media for item in results] == [_png(n) for n in range(5)]
    assert [item.input.captions for item in results[:2]] == [["c0"], ["c1", "x", "y"]]
    assert results[3].input.address == "train/3"
    assert results[3].input.size == len(_png(3))


def test_rows_that_were_picked_and_shuffled_come_in_their_own_order(tmp_path):
    _dataset().select([4, 0, 2]).save_to_disk(str(tmp_path / "saved"))
    assert [item.media for item in _read(tmp_path / "saved")] == [_png(4), _png(0), _png(2)]


def test_a_split_of_a_saved_dictionary_is_chosen_by_name(tmp_path):
    both = datasets.DatasetDict({"train": _dataset(2), "test": _dataset(4)})
    both.save_to_disk(str(tmp_path / "saved"))
    assert len(_read(tmp_path / "saved", split="test")) == 4
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        _read(tmp_path / "saved", split="dev")


def test_parquet_folders_and_raw_binary_columns_are_read(tmp_path):
    (tmp_path / "p").mkdir()
    _dataset().to_parquet(str(tmp_path / "p" / "train-00000.parquet"))
    assert [item.media for item in _read(tmp_path / "p")] == [_png(n) for n in range(5)]
    raw = datasets.Dataset.from_dict({"image": [b"one", None], "text": ["a", "b"]})
    raw.save_to_disk(str(tmp_path / "raw"))
    results = _read(tmp_path / "raw")
    assert (results[0].media, results[1].fault.cause) == (b"one", "media-missing")


def test_rows_of_one_picture_are_brought_together_by_a_column(tmp_path):
    rows = {
        "image": [_png(7 if n % 2 else 3) if n != 5 else b"other" for n in range(6)],
        "id": ["odd" if n % 2 else "even" for n in range(6)],
        "text": [f"c{n}" if n != 4 else None for n in range(6)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    results = _read(tmp_path / "saved", group_by="id")
    found = [(item.input.address, item.media, item.input.captions, item.input.problem) for item in results]
    assert found == [
        ("train/0", _png(3), ["c0", "c2"], None),
        ("train/1", _png(7), ["c1", "c3"], None),
        ("train/5", b"", [], "bad-row"),
    ]
    with pytest.raises(UserError, match="has no column 'picture'"):
        _read(tmp_path / "saved", group_by="picture")


def test_cells_that_are_not_utf8_cost_their_row(tmp_path):
    column = pa.Array.from_buffers(
        pa.utf8(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 1, 2)), pa.py_buffer(b"a\xe9")]
    )
    (tmp_path / "p").mkdir()
    pq.write_table(
        pa.table({"text": column, "url": ["http://h/a", "http://h/b"]}), tmp_path / "p" / "0.parquet"
    )
    config = _config(tmp_path / "p", media_column=None, url_column="url")
    inputs, _ = listed(open_source(config, open_storage(tmp_path)))
    assert [(item.address, item.captions, item.not_text) for item in inputs] == [
        ("http://h/a", ["a"], 0), ("http://h/b", [], 1),
    ]  # fmt: skip


def test_image_and_video_folders_give_the_files(tmp_path):
    for folder, suffix, column in (("i", "png", "image"), ("v", "mp4", "video")):
        (tmp_path / folder).mkdir()
        rows = []
        for number in range(3):
            (tmp_path / folder / f"{number}.{suffix}").write_bytes(_png(number))
            rows.append({"file_name": f"{number}.{suffix}", "text": f"c{number}"})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / folder / "metadata.jsonl").write_text(lines)
        results = _read(tmp_path / folder, media_column=column)
        assert [item.media for item in results] == [_png(n) for n in range(3)]
        assert [item.input.captions for item in results] == [["c0"], ["c1"], ["c2"]]
        (tmp_path / folder / f"2.{suffix}").unlink()


def test_a_url_column_is_fetched_as_urls(tmp_path):
    _dataset(2).save_to_disk(str(tmp_path / "saved"))
    source = open_source(
        _config(tmp_path / "saved", media_column=None, url_column="url"), open_storage(tmp_path)
    )
    inputs, _ = listed(source)
    assert (inputs[0].address, inputs[0].problem) == ("train/0", "bad-address")
    assert (inputs[1].address, inputs[1].row) == ("http://h/1.png", None)


def test_the_digest_follows_captions_and_sizes_and_not_the_folder(tmp_path):
    digests = []
    changed = _dataset().map(lambda row: {"text": row["text"].replace("c4", "other")})
    for number, rows in enumerate([_dataset(), _dataset(), _dataset(4), changed]):
        rows.save_to_disk(str(tmp_path / str(number)))
        digests.append(listed(open_source(_config(tmp_path / str(number)), open_storage(tmp_path)))[1])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_row_cannot_name_files_outside_its_dataset(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "p").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    paths = [
        str(tmp_path / "secret.png"),
        str(tmp_path / "p" / ".." / "secret.png"),
        "http://h/a.png",
        "gone.png",
    ]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "text": ["c"] * len(paths)}
    # As anyone may write it; the library itself would put the files' bytes in.
    pq.write_table(pa.Table.from_pydict(rows, schema=features.arrow_schema), tmp_path / "p" / "0.parquet")
    results = _read(tmp_path / "p", media_column="image")
    assert {item.fault.cause for item in results} == {"bad-address"}


def test_a_dataset_with_code_is_refused_and_its_code_not_run(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "birds.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="comes with code, which is not run"):
        _read(folder)
    assert not (tmp_path / "ran").exists()


def test_builders_that_were_not_looked_into_are_refused(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="its files are of kind text; supported are arrow"):
        _read(tmp_path / "t")


def test_what_is_missing_is_named(tmp_path):
    _dataset().save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no column 'picture'; it has image, more, text, url"):
        _read(tmp_path / "saved", media_column="picture")
    with pytest.raises(UserError, match=r"'text' of .* holds .* not images"):
        _read(tmp_path / "saved", media_column="text")
    (tmp_path / "none").mkdir()
    _dataset(0).to_parquet(str(tmp_path / "none" / "train.parquet"))
    with pytest.raises(UserError, match="corresponds to no data"):
        _read(tmp_path / "none")
    _dataset(0).save_to_disk(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="it has no rows"):
        _read(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such folder"):
        module.open_dataset(_config(tmp_path / "gone").source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None, "hub": "owner/name"}, "40 hex digits of a commit"),
        ({"path": None, "hub": "owner/name", "revision": "main"}, "since branches and tags move"),
        ({"path": None, "hub": "../x", "revision": _COMMIT}, "hub"),
        ({"revision": _COMMIT}, "revision belongs to hub"),
        ({"path": "s3://b/x"}, "file system of every machine"),
        ({"url_column": "u"}, "either media_column or url_column"),
        ({"path": None}, "either path or hub"),
    ],
)
def test_a_block_that_does_not_pin_its_data_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _config("/x", **options)


def test_a_hub_dataset_is_its_commit(tmp_path, monkeypatch):
    config = _config("/x", path=None, hub="owner/name", revision=_COMMIT)
    other = _config("/x", path=None, hub="owner/name", revision=_COMMIT[::-1])
    assert config.digest != other.digest
    assert open_source(config, open_storage(tmp_path)).base == f"hf://datasets/owner/name@{_COMMIT}"
    asked = {}

    def builder(path, **options):
        asked.update(options, path=path)
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    with pytest.raises(UserError, match="cannot open owner/name: Dataset 'owner/name' doesn't exist"):
        module.open_dataset(config.source)
    assert (asked["path"], asked["revision"]) == ("owner/name", _COMMIT)
    # A folder of that name beside the command would be taken for it.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has the name of the hub's dataset"):
        module.open_dataset(config.source)


def test_other_media_of_the_same_size_are_not_lost_in_a_group(tmp_path):
    rows = {"image": [b"one", b"two", b"one"], "id": [1, 1, 1], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "raw"))
    cells = [{"bytes": data, "path": "same.png"} for data in rows["image"]]
    datasets.Dataset.from_dict(rows | {"image": cells}).cast_column("image", datasets.Image()).save_to_disk(
        str(tmp_path / "images")
    )
    for name in ("raw", "images"):
        found = [
            (item.media, item.input.captions, item.input.problem)
            for item in _read(tmp_path / name, group_by="id")
        ]
        assert found == [(b"one", ["a", "c"], None), (b"", [], "bad-row")]


def test_files_of_equal_name_and_size_in_other_folders_are_other_media(tmp_path):
    files = [tmp_path / "saved" / folder / "0.png" for folder in ("x", "y", "x")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(file.parent.name.encode())
    rows = {
        "image": [{"bytes": None, "path": str(file)} for file in files],
        "id": [1] * 3,
        "text": ["a", "b", "c"],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "id": datasets.Value("int64"), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    results = _read(tmp_path / "saved", group_by="id")
    assert [(item.media, item.input.captions) for item in results] == [(b"x", ["a", "c"]), (b"", [])]


@pytest.mark.parametrize(
    ("keys", "groups", "bad"),
    [
        ([float("nan"), 1.0, float("nan"), None], [["c1"]], 3),
        ([" k", "", "k ", " "], [["c0", "c2"]], 2),
    ],
)
def test_keys_are_told_as_in_a_table(tmp_path, keys, groups, bad):
    rows = {"image": [b"x"] * 4, "id": keys, "text": [f"c{n}" for n in range(4)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    results = _read(tmp_path / "saved", group_by="id")
    assert [item.input.captions for item in results if not item.fault] == groups
    faults = [item.fault for item in results if item.fault]
    assert [(fault.cause, fault.detail) for fault in faults] == [
        ("bad-row", "it has no 'id' to group by")
    ] * bad
    table = tmp_path / "table"
    table.mkdir()
    pq.write_table(pa.table({"file": ["x.jpg"] * 4, "id": keys, "text": rows["text"]}), table / "t.parquet")
    same = source(table, kind="table", path_column="file", caption_column="text", group_by="id")
    assert [item.captions for item in listed(same)[0] if not item.problem] == groups
