"""Promises of object storage with keys and objects as real buckets have them: each costs itself at most."""

import io
import re
import tarfile

import botocore.exceptions as aws
import pytest
from PIL import Image

from sharding.errors import StorageFault, UnreadableObject, UserError
from sharding.foreign import _index_tar, index_shards
from sharding.plan import survey
from sharding.sources import open_fetcher, open_source
from sharding.sources.addresses import BelowBase
from sharding.storage import ExactPath, Storage, StoredFile, normalise_url, open_storage
from sharding.storage_s3 import _understand
from tests.fixtures.faulty_s3 import Fault
from tests.sharding.listings import configured, listed

KEYS = [
    "a//0", "//1", "///2", "a/../3", "../4", "a/./5", "./6", "sp ace", "pl+us", "pct%20", "h#?x=1",
    "new\nline", "ctl\x01", "back\\slash", "ü", "u\u0308", "\U0001f600", "quote'\"<>&", "n" * 900,
]  # fmt: skip

ARCHIVED = (403, "InvalidObjectState", "The operation is not valid for the object's storage class")
DENIED = (403, "AccessDenied", "Access Denied")
REFUSED = {
    "archived": ARCHIVED,
    "access-denied": DENIED,
    "encrypted": (400, "KMS.DisabledException", "arn:aws:kms:1:key/x is disabled."),
    "unreadable-file": (400, "InvalidTag", "something new"),
}
SSE_C = (400, "InvalidRequest", "The object was stored using a form of Server Side Encryption.")


def jpg(number):
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 90, 30)).save(sink, "JPEG")
    return sink.getvalue()


def fetched(store, options, modality="image"):
    """(listing, results) of a source on the server."""
    config = configured(modality, **options)
    storage = Storage(store.storage("s3://corpus/out"))
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    return opened, list(open_fetcher(config, storage, opened.base).fetch_all(inputs))


@pytest.mark.parametrize("prefix", ["", "p/../q//"])
def test_keys_are_opaque(exact_s3, prefix):
    for number, key in enumerate(KEYS):
        exact_s3.objects[f"{prefix}{key}.jpg"] = b"%d" % number
        exact_s3.objects[f"{prefix}{key}.TXT"] = b"caption %d" % number
    exact_s3.objects[f"{prefix}folder/"] = b""  # as consoles make them
    exact_s3.objects[f"{prefix}slash.jpg/"] = b"x"  # no folder: it has bytes
    exact_s3.objects[f"{prefix}a/._0.jpg"] = b"hidden"
    opened, results = fetched(exact_s3, {"kind": "folder", "path": f"s3://corpus/{prefix}"})
    got = {item.media: item.sidecar for item in results}
    assert got == {b"%d" % number: b"caption %d" % number for number in range(len(KEYS))}
    assert opened.skipped.counts() == {"hidden": 1, "no-suffix": 1}


def test_a_listing_of_many_pages_gives_every_key_once_in_order(exact_s3, monkeypatch):
    monkeypatch.setattr("sharding.storage_s3._PAGE", 3)
    exact_s3.objects = {f"p/{key}": b"x" for key in [*KEYS, "a/..", ".", ".."]} | {
        "p/f/": b"",
        "p/g/": b"x",
    }
    storage = Storage(exact_s3.storage("s3://corpus/p"))
    paths = [file.path for file in storage.list()]
    assert paths == sorted(key.removeprefix("p/") for key, data in exact_s3.objects.items() if data)
    for path in paths:
        assert storage.read_bytes(path) == b"x"
        assert storage.size(path) == 1
        assert storage.url_of(path) == f"s3://corpus/p/{path}"


def test_paths_that_people_write_stay_paths(exact_s3):
    exact_s3.objects = {"p/a/b": b"1", "p/../x": b"2", "p//x": b"3"}
    storage = Storage(exact_s3.storage("s3://corpus/p"))
    assert storage.read_bytes("a//./b") == b"1"
    assert storage.read_bytes(ExactPath("../x")) == b"2"
    for path in ("../x", "/x"):
        with pytest.raises(UserError):
            storage.read_bytes(path)
        with pytest.raises(UserError):
            storage.write_bytes(ExactPath(path), b"")
    assert normalise_url("s3://b//a//c/") == "s3://b//a//c"
    with pytest.raises(ValueError, match="has an empty part"):
        exact_s3.storage("s3://corpus/a//b")


def test_an_object_that_is_refused_costs_itself(exact_s3):
    answers = [*REFUSED.items(), ("encrypted", SSE_C)]
    for number in range(10):
        exact_s3.objects |= {f"p/{number}.jpg": jpg(number), f"p/{number}.txt": b"x"}
    rows = (b'{"file": "%d.jpg", "text": "x"}\n' % number for number in range(10))
    exact_s3.objects["p/t.jsonl"] = b"".join(rows)
    exact_s3.refused = {f"p/{number}.jpg": answer for number, (_, answer) in enumerate(answers)}
    exact_s3.refused |= {f"p/{5 + number}.txt": answer for number, (_, answer) in enumerate(answers[:4])}
    causes = [cause for cause, _ in answers]
    table = {
        "kind": "table",
        "path": "s3://corpus/p/t.jsonl",
        "path_column": "file",
        "caption_column": "text",
    }
    folder = {"kind": "folder", "path": "s3://corpus/p"}
    for options, lost in ((table, causes + [None] * 5), (folder, [*causes, *causes[:4], None])):
        _, results = fetched(exact_s3, options)
        assert [item.fault and item.fault.cause for item in results] == lost
        details = [item.fault.detail for item in results if item.fault is not None]
        assert all("s3://corpus/p/" in detail and "\n" not in detail for detail in details)


def test_a_url_of_a_bucket_that_is_not_there_costs_its_row(exact_s3):
    rows = [
        "s3://nowhere/a.jpg",
        "s3://corpus/0.jpg",
        "s3://UPPER/x",
        "s3://corpus/" + "n" * 2000,
        "s3://corpus/gone",
    ]
    exact_s3.objects = {"0.jpg": b"1", "t.tsv": "".join(f"{row}\tx\n" for row in ["url", *rows]).encode()}
    options = {"kind": "table", "path": "s3://corpus/t.tsv", "url_column": "url", "caption_column": "x"}
    _, results = fetched(exact_s3, options)
    causes = [item.fault and item.fault.cause for item in results]
    assert causes == ["no-such-bucket", None, "no-such-bucket", "missing-file", "missing-file"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("InvalidAccessKeyId", "not known there"),
        ("ExpiredToken", "expired"),
        ("SignatureDoesNotMatch", "secret key"),
    ],
)
def test_credentials_that_are_wrong_stop_the_job(exact_s3, code, message):
    exact_s3.objects = {"p/0.jpg": b"1", "p/0.txt": b"x"}
    exact_s3.every = (403, code, "no")
    with pytest.raises(UserError, match=message) as caught:
        fetched(exact_s3, {"kind": "folder", "path": "s3://corpus/p"})
    assert not isinstance(caught.value, UnreadableObject)
    storage = Storage(exact_s3.storage("s3://corpus/p"))
    with pytest.raises(
        UserError, match=message
    ) as caught:  # a HEAD's answer has no body: the reason is asked for
        storage.size("0.jpg")
    assert not isinstance(caught.value, UnreadableObject)


def tar_of(number):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in ((f"{number}.jpg", jpg(number)), (f"{number}.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.mark.parametrize("answer", [ARCHIVED, DENIED])
def test_a_tar_or_table_that_is_refused_counts_as_one_input_and_the_others_are_read(exact_s3, answer):
    for number in range(3):
        exact_s3.objects[f"p//{number}.tar"] = tar_of(number)
        exact_s3.objects[f"q//{number}.jsonl"] = b'{"file": "%d.jpg", "text": "x"}\n' % number
    exact_s3.refused = {"p//1.tar": answer, "q//1.jsonl": answer}
    cause = "archived" if answer == ARCHIVED else "access-denied"
    tables = {"kind": "table", "path": "s3://corpus/q", "path_column": "file", "caption_column": "text"}
    tars = {"kind": "webdataset", "path": "s3://corpus/p"}
    for options in (tars, tables):
        opened, results = fetched(exact_s3, options)
        assert [item.fault and item.fault.cause for item in results][:3].count(cause) == 1
        assert survey(opened, lambda _: None).inputs == 3
    assert fetched(exact_s3, tables)[1][0].input.media == BelowBase("/0.jpg")
    exact_s3.refused = dict.fromkeys(exact_s3.objects, answer)
    for options in (tars, tables):
        with pytest.raises(UserError, match=f"none of the .* can be read: .*{cause.replace('-', '.')}"):
            fetched(exact_s3, options)
    for path, kind in (("p//0.tar", tars), ("q//0.jsonl", tables)):
        with pytest.raises(UserError, match=cause.replace("-", ".")):
            fetched(exact_s3, kind | {"path": f"s3://corpus/{path}"})


@pytest.mark.parametrize("name", ["a//b/../0.tar", "/0.tar"])
def test_a_tar_or_table_that_the_job_names_by_an_odd_key_is_read(exact_s3, name):
    exact_s3.objects = {name: tar_of(7), name.replace("tar", "jsonl"): b'{"file": "x.jpg", "text": "x"}\n'}
    exact_s3.objects[name.replace("0.tar", "x.jpg")] = b"1"
    _, results = fetched(exact_s3, {"kind": "webdataset", "path": f"s3://corpus/{name}"})
    assert [item.media for item in results] == [jpg(7)]
    table = {"kind": "table", "path_column": "file", "caption_column": "text"}
    _, results = fetched(exact_s3, table | {"path": f"s3://corpus/{name.replace('tar', 'jsonl')}"})
    assert [item.media for item in results] == [b"1"]


@pytest.mark.server
def test_a_store_that_cleans_keys_away_costs_the_row_that_names_one(s3_server):
    storage = s3_server.storage("odd")
    storage.write_bytes("a/0.jpg", b"1")
    url = storage.url
    names = [
        f"{url}/a/0.jpg",
        f"{url}/a//0.jpg",
        f"{url}/a/../a/0.jpg",
        f"{url}/./a/0.jpg",
        f"{url}//a/0.jpg",
    ]
    storage.write_bytes("t.tsv", "".join(f"{row}\tx\n" for row in ["url", *names]).encode())
    options = {"kind": "table", "path": f"{url}/t.tsv", "url_column": "url", "caption_column": "x"}
    config = configured(**options)
    opened = open_source(config, storage)
    results = list(open_fetcher(config, storage, opened.base).fetch_all(listed(opened)[0]))
    assert results[0].media == b"1"
    for item in results[1:]:
        assert item.media == b"1" or item.fault.cause in ("missing-file", "bad-address", "access-denied")


@pytest.mark.server
def test_shards_of_another_program_on_s3_lose_a_tar_that_is_refused_and_find_it_again(s3_server, faulty_s3):
    storage = s3_server.storage("tars", endpoint_url=faulty_s3.url)
    for number in range(3):
        storage.write_bytes(f"{number}.tar", tar_of(number))
    faulty_s3.reset(Fault("denied", "GET", r"1\.tar", times=100))
    manifest = index_shards(storage, "image", bad_limit=0.5)
    assert (manifest.counts.kept, manifest.counts.dropped) == (2, {"access-denied": 1})
    storage.delete("manifest.json")
    faulty_s3.reset()
    assert index_shards(storage, "image").counts.kept == 3


def test_a_tar_whose_key_is_no_path_costs_itself(exact_s3):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name, data in (("0.jpg", jpg(0)), ("0.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    exact_s3.objects = {f"p/{key}": tar.getvalue() for key in ("a.tar", "./x.tar", "b/../y.tar", "c//z.tar")}
    record = _index_tar(
        Storage(exact_s3.storage("s3://corpus/p")), StoredFile("./x.tar", 1), "image", "captions"
    )
    assert record.counts.dropped == {"bad-address": 1}
    assert "its key has an empty, '.' or '..' part" in record.examples[0]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (405, "MethodNotAllowed", UserError),
        (501, "NotImplemented", UserError),
        (400, "SomethingNew", UserError),
        (304, "NotModified", StorageFault),
    ],
)
def test_a_code_that_is_not_known_is_told_as_one_line_of_the_store(exact_s3, status, code, kind):
    backend = Storage(exact_s3.storage("s3://corpus/p"))._backend
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = backend._translate(_understand(aws.ClientError(answer, "PutObject")), "x", "no such thing here")
    assert type(error) is kind
    assert re.fullmatch(rf"s3://corpus/p/x: .*{code}: no such thing here", str(error))


@pytest.mark.parametrize(
    ("code", "kind"),
    [("AccessDenied", UserError), ("MethodNotAllowed", UserError), ("InternalError", StorageFault)],
)
def test_a_file_of_many_that_cannot_be_deleted_is_named(exact_s3, monkeypatch, code, kind):
    storage = Storage(exact_s3.storage("s3://corpus/p"))
    reply = {"Errors": [{"Key": "p/a", "Code": code}]}
    monkeypatch.setattr(storage._backend, "_call", lambda *_, **__: reply)
    with pytest.raises(kind, match=f"s3://corpus/p/a cannot be deleted: {code}"):
        storage._backend._delete_many(["a"])


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("http://me:hunter2@127.0.0.1:9", "must not hold credentials"),
        ("http://me:hun/ter2@127.0.0.1:9", "must not hold credentials"),
        ("hunter2:9000", "must be http"),
        ("http://[hunter2", "must be http"),
    ],
)
def test_an_endpoint_of_the_environment_that_holds_credentials_is_refused_unquoted(
    monkeypatch, name, value, why
):
    for each in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    storage = open_storage("s3://corpus/p")
    for use in (
        lambda: storage.check(write=False),
        lambda: storage.read_bytes("x"),
        lambda: storage.delete("x"),
    ):
        with pytest.raises(UserError, match=f"{name}: {why}") as caught:
            use()
        assert not re.search("hun/?ter2|me:", str(caught.value))
