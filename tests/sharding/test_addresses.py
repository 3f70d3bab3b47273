"""Promises of addresses: no name that others wrote becomes a file of this machine, in any source."""

import ast
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sharding
from sharding.errors import BadData
from sharding.sources import Input, open_fetcher, open_source
from sharding.sources.addresses import (
    BelowBase,
    LocalFile,
    S3Object,
    WebUrl,
    below_base,
    pack,
    remote_url,
    shown,
    table_address,
    unpack,
)
from sharding.storage import Storage, open_storage
from tests.sharding.listings import configured, listed, source

SECRET = b"of this machine"

# SECRETFILE is an absolute path of a file of this machine, whose content none of these may give.
HOSTILE = [
    "SECRETFILE",
    "/SECRETFILE",
    "//SECRETFILE",
    "file://SECRETFILE",
    "FILE://SECRETFILE",
    "File://localhost/SECRETFILE",
    "file:SECRETFILE",
    "../secret.mp4",
    "../../../../../../../../../../../SECRETFILE",
    "a/../../secret.mp4",
    "./../secret.mp4",
    "..",
    ".",
    "/",
    "~/secret.mp4",
    "\\..\\secret.mp4",
    "a\0/../../secret.mp4",
    "SECRETFILE\0.mp4",
    "%2e%2e/secret.mp4",
    "%2FSECRETFILE",
    "s3://corpus/SECRETFILE",
    "s3://corpus//SECRETFILE",
    "s3://corpus/../../SECRETFILE",
    "s3://../SECRETFILE",
    "s3:///SECRETFILE",
    "s3://key:secret@corpus/SECRETFILE",
    "http:///SECRETFILE",
    "http://file://SECRETFILE",
    "local:SECRETFILE",
    "memory://SECRETFILE",
    "ftp://host/SECRETFILE",
    "data:image/png;base64,AAAA",
]


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "machine").mkdir()
    path = tmp_path / "machine" / "secret.mp4"
    path.write_bytes(SECRET)
    return path


def hostile(path):
    return [name.replace("SECRETFILE", str(path)) for name in HOSTILE]


def sources_of(names, folder, on_s3):
    """The configuration of every source in which others name media, with lists of ``names``; writes the lists."""
    (folder / "media").mkdir(parents=True)
    write = lambda name, text: (folder / name).write_text(text)  # noqa: E731
    write("t.jsonl", "".join(json.dumps({"file": name, "text": "x"}) + "\n" for name in names))
    images = [{"id": number, "file_name": name, "coco_url": name} for number, name in enumerate(names)]
    notes = [{"image_id": number, "caption": "x"} for number in range(len(names))]
    write("coco.json", json.dumps({"images": images, "annotations": notes}))
    rest = {"split": "test", "sentences": [{"raw": "x"}]}
    write("karpathy.json", json.dumps({"images": [{"filename": name} | rest for name in names]}))
    paths = [
        {"filepath": os.path.dirname(name), "filename": os.path.basename(name) or " "} | rest
        for name in names
    ]
    write("path.json", json.dumps({"images": paths}))
    clips = ["clip"] + [
        clip for name in names if "\0" not in name for clip in (name, name.removesuffix(".mp4"))
    ]
    write("msrvtt.csv", "video_id,sentence\n" + "".join(f'"{clip}",x\n' for clip in clips))
    write("lsmdc.csv", "".join(f"{clip}\t0\t1\t0\t1\tx\n" for clip in clips))
    place = "s3://corpus/lists" if on_s3 else str(folder)
    media = "s3://corpus/media" if on_s3 else str(folder / "media")
    table = {"kind": "table", "path": f"{place}/t.jsonl", "caption_column": "text"}
    sources = {
        "url_column": table | {"url_column": "file"},
        "coco": {"kind": "coco", "path": f"{place}/coco.json", "images": media},
        "coco_url": {"kind": "coco", "path": f"{place}/coco.json", "url_field": "coco_url"},
        "karpathy": {"kind": "karpathy", "path": f"{place}/karpathy.json", "images": media},
        "filepath": {"kind": "karpathy", "path": f"{place}/path.json", "images": media},
        "msrvtt": {"kind": "msrvtt", "path": f"{place}/msrvtt.csv", "videos": media},
        "lsmdc": {"kind": "lsmdc", "path": f"{place}/lsmdc.csv", "videos": media},
    }
    if on_s3:  # the job file does not point to this machine
        sources["path_column"] = table | {"path_column": "file"}
    return sources


def given(options, storage):
    """What a source gives of each of its inputs: bytes, or the cause of the fault."""
    config = configured("video", fetch={"attempts": 1, "timeout_s": 0.2}, **options)
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    assert not any(isinstance(item.media, LocalFile) for item in inputs)
    fetched = open_fetcher(config, storage, opened.base).fetch_all(inputs)
    return [item.fault.cause if item.fault else item.media for item in fetched]


@pytest.mark.parametrize("on_s3", [False, True])
def test_no_name_in_a_list_opens_a_file_of_this_machine(tmp_path, secret, exact_s3, on_s3, monkeypatch):
    monkeypatch.chdir(secret.parent)
    storage = Storage(exact_s3.storage("s3://corpus/out"))
    names = hostile(secret)
    options = sources_of(names, secret.parent / "lists", on_s3)
    lists = (file for file in (secret.parent / "lists").iterdir() if file.is_file())
    exact_s3.objects = {f"lists/{file.name}": file.read_bytes() for file in lists}
    for kind, config in options.items():
        results = given(config, storage)
        # An empty path to a folder is the folder; lists of clips name a clip once.
        assert len(results) >= len(names), kind
        assert all(isinstance(result, str) for result in results), (kind, results)


def test_a_listed_key_is_an_object_and_no_file_of_this_machine(secret, exact_s3):
    names = [name for name in hostile(secret) if not name.endswith("/")]
    exact_s3.objects = {f"media/{name}": b"of the bucket" for name in names}
    exact_s3.objects |= {f"{number}/{name}": b"of the bucket" for number, name in enumerate(names[:5])}
    exact_s3.objects["list.csv"] = b"secret\t0\t1\t0\t1\tx\n"
    storage = Storage(exact_s3.storage("s3://corpus/out"))
    for number in range(5):
        lsmdc = {"kind": "lsmdc", "path": "s3://corpus/list.csv", "videos": f"s3://corpus/{number}"}
        assert given(lsmdc, storage) == [b"of the bucket"]
    config = configured("video", kind="folder", path="s3://corpus/media")
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    assert len(inputs) == sum(name.endswith(".mp4") for name in names)
    # Its captions are looked for in the bucket too.
    results = list(open_fetcher(config, storage, opened.base).fetch_all(inputs))
    assert {item.fault.cause for item in results} == {"caption-missing"}
    assert {key.removeprefix("media/") for _, key in exact_s3.requests if key.startswith("media/")} == {
        name.removesuffix(".mp4") + ".txt" for name in names if name.endswith(".mp4")
    }


def test_symbolic_links_lead_where_the_owner_of_the_folder_laid_them(tmp_path, secret):
    # Whoever may make links in a folder of this machine is on it; names in lists still cannot leave by dots.
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").symlink_to(secret)
    ((item,), _) = listed(source(tmp_path / "raw", kind="folder", modality="video"))
    assert item.media == BelowBase("a.mp4")


def test_a_table_on_this_machine_may_name_files_of_it_by_whole_paths_only(tmp_path, secret):
    for name, media in {
        str(secret): LocalFile(str(secret)),
        secret.as_uri(): LocalFile(str(secret)),
        f"FILE://localhost{secret}": LocalFile(str(secret)),
        "./a//b.mp4": BelowBase("sub/a/b.mp4"),
        "a%20b.mp4": BelowBase("sub/a%20b.mp4"),
        "s3://b/k//x y": S3Object("b", "k//x y"),
        "HTTP://h/x": WebUrl("HTTP://h/x"),
    }.items():
        assert table_address(name, "sub/", on_this_machine=True) == media
        if isinstance(media, LocalFile):
            with pytest.raises(BadData, match="only a table on it"):
                table_address(name, "sub/", on_this_machine=False)
        else:
            assert table_address(name, "sub/", on_this_machine=False) == media
    for name in ("../x", f"{secret.parent}/../x", "/", "file://host/x", "gs://b/x", "a/..", "", "/a\0b"):
        with pytest.raises(BadData, match="bad-address"):
            table_address(name, "sub/", on_this_machine=True)


def test_a_stored_plan_names_files_of_this_machine_where_the_job_file_points_to_it_only(
    tmp_path, secret, exact_s3
):
    storage = Storage(exact_s3.storage("s3://corpus/out"))
    table = {"kind": "table", "path_column": "file", "caption_column": "text"}
    item = Input("x", ["a caption"], media=LocalFile(str(secret)))
    for options in (
        {"kind": "folder", "path": str(tmp_path)},
        {"kind": "folder", "path": "s3://corpus/media"},
        table | {"path": "s3://corpus/t.jsonl"},
        {"kind": "webdataset", "path": ["s3://corpus/a.tar", "s3://corpus/b.tar"]},
    ):
        config = configured(**options)
        (got,) = open_fetcher(config, storage, open_source(config, storage).base).fetch_all([item])
        assert got.fault is not None, options
        assert (got.fault.cause, got.media) == ("bad-address", b""), options
    config = configured(**table, path=str(tmp_path / "t.jsonl"))
    (got,) = open_fetcher(config, storage, open_source(config, storage).base).fetch_all([item])
    assert got.media == secret.read_bytes()


def test_rows_of_hugging_face_name_files_of_their_dataset_alone(tmp_path, secret, monkeypatch):
    monkeypatch.chdir(secret.parent)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "link.mp4").symlink_to(secret)
    names = [*hostile(secret), str(tmp_path / "p" / "link.mp4"), "/" + "n" * 5000, "/dev/stdin", "secret.mp4"]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": None, "path": name} for name in names], "text": ["c"] * len(names)}
    pq.write_table(pa.Table.from_pydict(rows, schema=features.arrow_schema), tmp_path / "p" / "0.parquet")
    options = {
        "kind": "huggingface",
        "path": str(tmp_path / "p"),
        "caption_column": "text",
        "media_column": "image",
    }
    config = configured(**options)
    storage = open_storage(tmp_path)
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    # The listing looks at none of them either: it would tell their sizes.
    assert [name for name, item in zip(names, inputs, strict=True) if item.size is not None] == []
    assert {item.fault.cause for item in open_fetcher(config, storage, opened.base).fetch_all(inputs)} == {
        "bad-address"
    }


@pytest.mark.parametrize(
    "address",
    [
        BelowBase("a\udce9/\n.jpg"),
        BelowBase("/../x"),
        WebUrl("https://me:pw@h/a?token=x%20\\x41"),
        S3Object("b", "//a/\ud800"),
        LocalFile("/caf\udce9"),
    ],
)
def test_the_plan_holds_addresses_as_they_are(address):
    packed = pack(address)
    assert unpack(packed) == address
    json.dumps(packed, ensure_ascii=False).encode()
    assert "pw" not in shown(address)
    assert len(shown(address).splitlines()) == 1


def test_a_url_of_a_list_is_of_the_web_or_of_s3():
    assert remote_url("HTTPS://h/a") == WebUrl("HTTPS://h/a")
    assert remote_url("s3://bucket/../a//b/") == S3Object("bucket", "../a//b/")
    for text in (
        "a.png",
        "/a.png",
        "file:///a",
        "s3://",
        "s3://b",
        "s3://b/",
        "s3://a b/x",
        "gs://b/x",
        "",
        "http:/x",
    ):
        with pytest.raises(BadData, match="bad-address") as caught:
            remote_url(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadData) as caught:
        remote_url("s3://key:verysecret@bucket/x")
    assert "verysecret" not in str(caught.value)


def test_relative_names_of_lists_stay_in_their_folder():
    assert below_base("./a//b.png", "sub//") == BelowBase("sub//a/b.png")
    for name in ("", ".", "./", "..", "a/../b", "/a", "s3://b/a", "a\0b"):
        with pytest.raises(BadData, match="bad-address"):
            below_base(name)


def test_files_of_this_machine_are_named_where_the_job_file_may_point_to_them_only():
    # By the function for a table on this machine, for tars that the job file names, and by the plan that held it.
    made = {}
    root = Path(sharding.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                calls = [one for one in ast.walk(node) if isinstance(one, ast.Call)]
                if any(isinstance(one.func, ast.Name) and one.func.id == "LocalFile" for one in calls):
                    made[f"{path.relative_to(root)}:{node.name}"] = True
    patterns = {"sources/fetch.py:_located", "sources/base.py:identity", "sources/addresses.py:shown"}
    assert set(made) - patterns == {
        "sources/addresses.py:table_address",
        "sources/addresses.py:unpack",
        "sources/tars.py:_place",
    }
    assert os.sep == "/"
