"""Promises of the sources of folders and tables: what is listed, in which order, and under which digest."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.config import PrepareConfig
from sharding.errors import UserError
from sharding.names import Skipped
from sharding.plan import make_plan, read_inputs, survey
from sharding.sources import Input, open_source
from sharding.sources.addresses import BelowBase, LocalFile, S3Object, WebUrl
from sharding.sources.folder import parse_sidecar
from sharding.sources.tars import member_captions
from sharding.storage import open_storage
from tests.sharding.listings import listed as _list
from tests.sharding.listings import source as _source


def _table(path, **source):
    return _source(path, **({"kind": "table", "path_column": "file", "caption_column": "text"} | source))


def test_a_folder_lists_its_media_by_path_with_their_sidecars(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "a.txt", "b.txt", "LICENSE", "clip.mp4", "b.x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inputs, _ = _list(_source(tmp_path, kind="folder"))
    assert [item.address for item in inputs] == ["a.JPG", "b.png", "b.x.png", "sub/c.webp"]
    assert [item.sidecar.path for item in inputs] == ["a.txt", "b.txt", "b.x.txt", "sub/c.txt"]
    clips, _ = _list(_source(tmp_path, kind="folder", modality="video", captions=".json"))
    assert [item.address for item in clips] == ["clip.mp4", "sub/c.webp"]
    assert clips[0].sidecar == BelowBase("clip.json")


def test_the_listing_digest_follows_names_sizes_and_sidecars_but_not_the_place(tmp_path):
    digests = set()
    for number, (name, media, caption) in enumerate(
        [("a", b"1", b"x"), ("b", b"1", b"x"), ("a", b"12", b"x"), ("a", b"1", b"xy")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"{name}.png").write_bytes(media)
        (folder / f"{name}.txt").write_bytes(caption)
        digests.add(_list(_source(folder, kind="folder"))[1])
    assert len(digests) == 4
    again = tmp_path / "again"
    again.mkdir()
    (again / "a.png").write_bytes(b"1")
    (again / "a.txt").write_bytes(b"x")
    assert _list(_source(again, kind="folder"))[1] in digests


def test_a_missing_folder_and_one_without_media_are_user_errors(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="empty corpus: no image files"):
        _list(_source(tmp_path, kind="folder"))
    with pytest.raises(UserError, match="nowhere"):
        _list(_source(tmp_path / "nowhere", storage=open_storage(tmp_path), kind="folder"))


ROWS = [
    {"file": "img/a.png", "text": "a", "more": ["b", "c"], "split": "train", "n": 1},
    {"file": "/abs/b.png", "text": None, "more": [], "split": "train", "n": 2},
    {"file": "s3://bucket/c.png", "text": "d", "more": None, "split": "test", "n": 3},
]
EXPECTED = [
    Input.at(BelowBase("img/a.png"), captions=["a", "b", "c"]),
    Input.at(LocalFile("/abs/b.png"), captions=[]),
    Input.at(S3Object("bucket", "c.png"), captions=["d"]),
]


def _write_rows(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables_give_paths_and_captions_of_several_columns(tmp_path, suffix):
    path = tmp_path / f"my table{suffix}"
    _write_rows(path)
    assert _list(_table(path, caption_column=["text", "more"]))[0] == EXPECTED


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("where", "kept"), [({"split": "train"}, 2), ({"n": [1, 3]}, 2), ({"n": 2, "split": "train"}, 1)]
)
def test_where_selects_rows(tmp_path, suffix, where, kept):
    path = tmp_path / f"t{suffix}"
    _write_rows(path)
    assert len(_list(_table(path, where=where))[0]) == kept


def test_csv_tables_are_read_with_quotes_and_byte_order_mark(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefffile,text,n\na.png,"one, two\nthree",1\nb.png\nc.png,x,2,3\nd.png,y,2\n'.encode())
    inputs, _ = _list(_table(path))
    assert inputs[0] == Input.at(BelowBase("a.png"), captions=["one, two\nthree"])
    assert inputs[1] == Input.at(BelowBase("b.png"), captions=[])
    assert inputs[2].problem == "bad-row"
    # A row that cannot be read cannot be selected by its columns either: it is counted, not lost.
    assert [item.address for item in _list(_table(path, where={"n": 2}))[0]] == ["t.csv:5", "d.png"]


def test_rows_that_cannot_be_read_are_listed_with_their_cause_and_line(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [
        '{"file": "a.png", "text": 5}',
        "{broken",
        "[1]",
        '{"text": "x"}',
        '{"file": 7, "text": "x"}',
        "",
        '{"file": "b.png", "text": ["x", 3, "\\ud800"]}',
        '{"file": "c.png", "text": "x"}\udcff',
    ]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    inputs, _ = _list(_table(path))
    assert [item.problem for item in inputs] == [
        None,
        "bad-row",
        "bad-row",
        "bad-address",
        "bad-address",
        None,
        "bad-row",
    ]
    assert (inputs[0].captions, inputs[0].not_text) == ([], 1)
    assert (inputs[5].captions, inputs[5].not_text) == (["x"], 2)
    assert inputs[1].address == "t.jsonl:2"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        path.write_text("file,caption\na,b\n")
    else:
        _write_rows(path)
    with pytest.raises(UserError, match=r"no column 'nope'; it has .*file"):
        _list(_table(path, caption_column="nope"))


def test_missing_empty_and_wrong_tables_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"no such table: file://.*/t.jsonl"):
        _list(_table(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_text("")
    with pytest.raises(UserError, match=r"t\.jsonl"):
        _list(_table(tmp_path / "t.jsonl"))
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        _list(_table(tmp_path / "t.parquet"))
    _write_rows(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="no rows match 'where'"):
        _list(_table(tmp_path / "t.jsonl", where={"split": "none"}))


def test_a_folder_of_tables_is_read_in_order_and_paths_are_relative_to_each(tmp_path):
    for part in ("b", "a"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "t.jsonl").write_text(json.dumps({"file": "x.png", "text": part}))
    assert [item.address for item in _list(_table(tmp_path))[0]] == ["a/x.png", "b/x.png"]


def test_url_columns_hold_urls_only(tmp_path):
    urls = ["a.png", "http://h/a.png", "HTTPS://h/a.png", "s3://b/a.png", "file:///etc/hostname", "/a.png"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"u": url, "text": "x"}) + "\n" for url in urls))
    inputs, _ = _list(_table(tmp_path / "t.jsonl", path_column=None, url_column="u"))
    bad = "bad-address"
    assert [item.problem for item in inputs] == [bad, None, None, None, bad, bad]


def test_the_plan_lists_the_inputs_of_each_task_and_is_made_once(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"file": f"{n}.png", "text": str(n)}) + "\n" for n in range(25)))
    source, dataset = _table(path), open_storage(tmp_path / "out")
    config = PrepareConfig.model_validate(
        {
            "source": {"kind": "table", "path": str(path), "path_column": "file", "caption_column": "text"},
            "modality": "image",
            "samples_per_shard": 10,
        }
    )
    found = survey(source, lambda _: None)
    plan = make_plan(source, found, config, dataset)
    assert (plan.tasks, found.inputs) == (3, 25)
    listed = [item.address for task in range(3) for item in read_inputs(dataset, task)]
    assert listed == [f"{n}.png" for n in range(25)]
    path.write_text(path.read_text() + json.dumps({"file": "late.png", "text": "x"}))
    assert make_plan(source, found, config, dataset) == plan
    with pytest.raises(UserError, match="changed while it was being listed"):
        make_plan(source, found, config, open_storage(tmp_path / "other"))


def test_listing_and_planning_take_no_more_memory_for_a_larger_corpus(tmp_path):
    peaks = []
    for rows in (2_000, 20_000):
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for number in range(rows):
                file.write(json.dumps({"file": f"{number}.png", "text": f"caption {number} " * 5}) + "\n")
        config = PrepareConfig.model_validate(
            {
                "source": {
                    "kind": "table",
                    "path": str(path),
                    "path_column": "file",
                    "caption_column": "text",
                },
                "modality": "image",
                "samples_per_shard": 500,
            }
        )
        source, dataset = open_source(config, open_storage(tmp_path)), open_storage(tmp_path / f"out{rows}")
        tracemalloc.start()
        make_plan(source, survey(source, lambda _: None), config, dataset)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 200_000


@pytest.mark.parametrize(
    ("data", "suffix", "expected"),
    [
        (b"\xef\xbb\xbfone\n\n two \r\n", ".txt", (["one", " two "], 0)),
        (b'{"caption": "one"}', ".json", (["one"], 0)),
        (b'{"captions": ["one", 2, null]}', ".json", (["one"], 2)),
        (b'{"caption": 5}', ".json", ([], 1)),
    ],
)
def test_sidecars_are_lines_or_json(data, suffix, expected):
    assert parse_sidecar(data, suffix) == expected


def test_webvid_csv_is_a_table_of_urls(tmp_path):
    (tmp_path / "results_10M_train.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '1066674784,https://host/1066674784-preview.mp4,PT00H00M10S,046_047,"Travel, blogger shoot"\n'
    )
    inputs, _ = _list(
        _table(
            tmp_path / "results_10M_train.csv",
            path_column=None,
            url_column="contentUrl",
            caption_column="name",
            modality="video",
        )
    )
    assert inputs == [
        Input.at(WebUrl("https://host/1066674784-preview.mp4"), captions=["Travel, blogger shoot"])
    ]


def test_the_url_lists_of_img2dataset_are_tables_in_parts(tmp_path):
    for part in range(2):
        rows = [
            {"URL": f"http://h/{part}{n}.jpg", "TEXT": f"c{n}", "WIDTH": 10, "pwatermark": 0.1}
            for n in (0, 1)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"part-{part:05d}.parquet")
    inputs, _ = _list(_table(tmp_path, path_column=None, url_column="URL", caption_column="TEXT"))
    assert [(item.address, item.captions) for item in inputs] == [
        (f"http://h/{part}{n}.jpg", [f"c{n}"]) for part in range(2) for n in (0, 1)
    ]


def test_tab_separated_values_have_no_quotes_and_need_no_header(tmp_path):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_bytes(b'a "very typical, bus station\thttp://h/a.jpg\nsierra\thttp://h/b?x=1,2\nalone\n')
    options = {"path_column": None, "url_column": "url", "caption_column": "caption"}
    inputs, _ = _list(_table(path, columns=["caption", "url"], **options))
    assert inputs[:2] == [
        Input.at(WebUrl("http://h/a.jpg"), captions=['a "very typical, bus station']),
        Input.at(WebUrl("http://h/b?x=1,2"), captions=["sierra"]),
    ]
    assert inputs[2].problem == "bad-address"
    path.write_text("url\tcaption\nhttp://h/a.jpg\tx\n")
    assert _list(_table(path, **options))[0] == [Input.at(WebUrl("http://h/a.jpg"), captions=["x"])]
    (tmp_path / "t.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"source\.columns is for \.csv and \.tsv"):
        _list(_table(tmp_path / "t.jsonl", columns=["file", "text"]))


def test_every_field_of_an_input_is_in_the_plan(tmp_path):
    item = Input(
        address="a.tar/k.jpg",
        captions=["x"],
        media=S3Object("bucket", "/../a\udcff\n.tar"),
        sidecar=BelowBase("s\udce9.txt"),
        not_text=2,
        problem="p",
        reason="why",
        offset=2**40,
        size=7,
        row=2**40,
        texts=[{"name": "k.txt", "offset": 9, "size": 3}],
    )

    class One:
        base = "file:///nowhere"
        skipped = Skipped()

        def inputs(self, hasher):
            yield item

    config = PrepareConfig.model_validate({"source": {"kind": "folder", "path": "/x"}, "modality": "image"})
    dataset = open_storage(tmp_path)
    make_plan(One(), survey(One(), lambda _: None), config, dataset)
    assert list(read_inputs(dataset, 0)) == [item]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"captions": [], "caption": "x"}, (["x"], 0)),
        ({"captions": None, "caption": "x"}, (["x"], 0)),
        ({"captions": ["y", 5], "caption": "x"}, (["y"], 1)),
        ({"captions": []}, ([], 0)),
    ],
)
def test_json_says_the_same_beside_a_picture_and_in_a_tar(value, expected):
    data = json.dumps(value).encode()
    assert parse_sidecar(data, "a.json") == member_captions("a.json", data, None) == expected
