"""Promises of tars as sources: no caption is lost, no sample split, and a short tar is not taken for a whole one."""

import hashlib
import io
import json
import random
import tarfile
import tracemalloc

import pytest
import webdataset

from sharding.errors import UserError
from sharding.sources import open_fetcher, open_source
from sharding.sources import tars as module
from sharding.storage import open_storage
from tests.sharding.datasets import media_of, write_dataset
from tests.sharding.listings import configured, fetched, listed, source


def _write(path, members, form=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _tars(path, **options):
    return source(path, kind="webdataset", **options)


def _read(path, storage=None, **options):
    config = configured(kind="webdataset", **({"path": str(path)} | options))
    return fetched(config, storage or open_storage(path.parent))


def _facts(results):
    return [(f.input.address, f.media, f.input.captions, f.fault and f.fault.cause) for f in results]


MEMBERS = [
    ("a.jpg", b"A" * 700),
    ("a.txt", b"one\n two \r\n\n"),
    ("a.json", b'{"caption": "three", "width": 3}'),
    ("dir/b.0.txt", "zéro".encode()),
    ("dir/b.10.txt", b"ten"),
    ("dir/b.9.txt", b"nine"),
    ("dir/b.PNG", b"B"),
    ("dir/b.json", b'{"captions": ["four", 5]}'),
    ("c.cls", b"7"),
    ("README", b"no key"),
    ("c.webp", b"C" * 3000),
    ("c.txt", b"c"),
]
FACTS = [
    ("x.tar/a.jpg", b"A" * 700, ["three", "one", " two "], None),
    ("x.tar/dir/b.PNG", b"B", ["zéro", "nine", "ten", "four"], None),
    ("x.tar/c.webp", b"C" * 3000, ["c"], None),
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_caption_of_a_key_is_kept(tmp_path, form):
    path = _write(tmp_path / "x.tar", MEMBERS, form)
    results = _read(path)
    assert _facts(results) == FACTS
    assert [item.input.not_text for item in results] == [0, 1, 0]


def test_members_of_a_key_need_not_be_neighbours(tmp_path):
    shuffled = list(MEMBERS)
    random.Random(3).shuffle(shuffled)
    results = _read(_write(tmp_path / "x.tar", shuffled))
    assert sorted(_facts(results)) == sorted(FACTS)


def test_long_names_and_names_that_are_no_utf8(tmp_path):
    long = "d" * 90 + "/" + "n" * 150
    members = [(f"{long}.jpg", b"L"), (f"{long}.txt", b"x"), ("\udcff.jpg", b"M"), ("\udcff.txt", b"y")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        results = _read(_write(tmp_path / "x.tar", members, form))
        assert [(item.media, item.input.captions) for item in results] == [(b"L", ["x"]), (b"M", ["y"])]
        assert results[1].input.address.encode() == b"x.tar/\\xff.jpg"


@pytest.mark.parametrize(
    ("members", "options", "cause"),
    [
        ([("a.txt", b"x")], {}, "media-missing"),
        ([("a.jpg", b"A")], {}, "caption-missing"),
        ([("a.jpg", b"A"), ("a.png", b"B"), ("a.txt", b"x")], {}, "several-media"),
        ([("a.jpg", b"A"), ("a.png", b"B"), ("a.txt", b"x")], {"media": [".PNG"]}, None),
        ([("a.jpg", b"A"), ("a.seg.png", b"B"), ("a.txt", b"x")], {"media": ["jpg"]}, None),
        ([("a.jpg", b"A"), ("a.txt", b"x"), ("a.txt", b"y")], {}, "repeated-member"),
        ([("a.jpg", b"A"), ("a.caption", b"x")], {}, None),
        ([("a.jpg", b"A"), ("a.alt", b"x")], {"text": ["alt"]}, None),
        ([("a.jpg", b"A"), ("a.json", b'{"meta": {"text": "x"}}')], {"caption_field": "meta.text"}, None),
        ([("a.jpg", b"A" * 3000), ("a.txt", b"x")], {}, "too-many-bytes"),
        ([("a.jpg", b"A"), ("a.txt", b"x" * (2 << 20))], {}, "too-many-bytes"),
    ],
)
def test_keys_are_whole_samples_or_counted(tmp_path, members, options, cause):
    path = _write(tmp_path / "x.tar", members)
    config = configured(kind="webdataset", path=str(path), **options).model_copy(
        update={"max_source_mb": 2000 / 2**20}
    )
    (got,) = fetched(config, open_storage(tmp_path))
    assert (got.fault and got.fault.cause) == cause
    if cause is None:
        assert got.input.captions == ["x"]


@pytest.mark.parametrize("text", [b"\xff", b"{", b"[]", b'"x"'])
def test_a_json_member_that_is_none_does_not_take_the_other_captions_with_it(tmp_path, text):
    members = [("a.jpg", b"A"), ("a.json", text), ("a.txt", b"good")]
    (got,) = _read(_write(tmp_path / "x.tar", members))
    assert (got.input.captions, got.input.not_text) == (["good"], 1)


def test_a_linked_member_is_counted_and_never_followed(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("b.txt"))
    assert [item.problem for item in listed(_tars(path))[0]] == ["media-missing", "media-missing"]


def _samples(count):
    return [
        pair
        for number in range(count)
        for pair in ((f"{number}.jpg", b"%d" % number * 400), (f"{number}.txt", b"x"))
    ]


def test_a_tar_cut_at_any_byte_is_an_error_that_names_it_or_counts_once(tmp_path):
    whole = _write(tmp_path / "x.tar", _samples(4)).read_bytes()
    end = whole.rstrip(b"\0")
    end = whole[: -(-len(end) // 512) * 512]  # the last member with its padding
    cuts = [0, 1, 511, 512, 600, 1024, 1536, 2048, len(end) - 512, len(end) - 1, len(end), len(end) + 511]
    for cut in cuts:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"x\.tar is cut off or broken at byte \d+ of"):
            listed(_tars(tmp_path / "x.tar"))
        results = _read(tmp_path / "x.tar", truncated="count")
        good = [item for item in results if item.fault is None]
        assert [item.fault.cause for item in results if item.fault] == ["truncated-tar"]
        # No sample that the cut went through, nor one that it may have gone through.
        assert [item.media for item in good] == [b"%d" % n * 400 for n in range(len(good))]
        assert all(item.input.captions == ["x"] for item in good)
    (tmp_path / "x.tar").write_bytes(whole[: len(end) + 512])  # one of the two zero blocks is enough
    assert len(listed(_tars(tmp_path / "x.tar"))[0]) == 4


def test_a_broken_header_or_a_second_archive_behind_the_first_is_no_end(tmp_path):
    whole = bytearray(_write(tmp_path / "x.tar", _samples(3)).read_bytes())
    both = bytes(whole) * 2
    whole[2048 + 1000] ^= 255  # where a header of the second sample lies
    headers = [n for n in range(0, len(whole), 512) if whole[n : n + 5] == b"1.jpg"]
    whole[headers[0]] ^= 1
    (tmp_path / "x.tar").write_bytes(whole)
    with pytest.raises(UserError, match=f"broken at byte {headers[0]} of"):
        listed(_tars(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(both)
    with pytest.raises(UserError, match="neither a member nor the end of the archive"):
        listed(_tars(tmp_path / "x.tar"))


def test_tars_are_given_by_folder_pattern_or_list(tmp_path):
    for number in range(3):
        _write(tmp_path / "in {x}" / f"{number:03d}.tar", [(f"{number}.jpg", b"x"), (f"{number}.txt", b"c")])
    _write(tmp_path / "more" / "z.tar", [("z.jpg", b"x"), ("z.txt", b"c")])
    folder, more = tmp_path / "in {x}", tmp_path / "more"

    def addresses(path, base=tmp_path):
        config = configured(kind="webdataset", path=path)
        results = fetched(config, open_storage(tmp_path))
        assert all(item.media == b"x" for item in results)
        return [item.input.address.removeprefix(base.as_uri() + "/") for item in results]

    assert addresses(str(more)) == ["z.tar/z.jpg"]
    assert addresses(str(more / "z.tar")) == ["z.tar/z.jpg"]
    folder.rename(tmp_path / "in x")
    folder = tmp_path / "in x"
    assert addresses(f"{folder}/{{000..001}}.tar") == ["000.tar/0.jpg", "001.tar/1.jpg"]
    assert addresses(f"{tmp_path}/{{in x,more}}/{{002,z}}.tar"[:0] + f"{folder}/{{002,000}}.tar") == [
        "002.tar/2.jpg",
        "000.tar/0.jpg",
    ]
    assert addresses([f"{more}/z.tar", f"{folder}/{{001..002}}.tar"]) == [
        "z.tar/z.jpg",
        "in%20x/001.tar/1.jpg",
        "in%20x/002.tar/2.jpg",
    ]
    with pytest.raises(UserError, match=r"no such tar: .*/003\.tar"):
        addresses(f"{folder}/{{000..003}}.tar")


def test_tars_that_cannot_be_read_by_range_or_are_not_there_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar files"):
        listed(_tars(tmp_path))
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="is compressed"):
        listed(_tars(tmp_path))
    _write(tmp_path / "only" / "x.tar", [("README", b"x")])
    with pytest.raises(UserError, match="hold no samples"):
        listed(_tars(tmp_path / "only"))


def test_a_tar_with_more_members_than_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_MEMBERS", 5)
    path = _write(tmp_path / "x.tar", _samples(3))
    with pytest.raises(UserError, match="more than 5 members"):
        listed(_tars(path))


def test_listing_more_tars_takes_no_more_memory(tmp_path):
    for number in range(12):
        members = [(f"{number}-{n}.{suffix}", b"") for n in range(300) for suffix in ("jpg", "txt")]
        _write(tmp_path / f"{number:02d}.tar", members)
    peaks = []
    for tars in ("{00..01}", "{00..11}"):
        opened = open_source(
            configured(kind="webdataset", path=f"{tmp_path}/{tars}.tar"), open_storage(tmp_path)
        )
        tracemalloc.start()
        count = sum(1 for _ in opened.inputs(hashlib.sha256()))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert count == 3600
    assert peaks[1] < 1.2 * peaks[0] + 100_000


def test_the_digest_follows_names_and_places_but_not_the_folder(tmp_path):
    digests = [
        listed(_tars(_write(tmp_path / str(number) / "x.tar", members)))[1]
        for number, members in enumerate(
            [
                _samples(2),
                _samples(2),
                _samples(3),
                list(reversed(_samples(2))),
                [("q.jpg", b""), ("q.txt", b"")],
            ]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_tar_that_changed_since_it_was_listed_is_told(tmp_path):
    path = _write(tmp_path / "x.tar", _samples(2))
    config = configured(kind="webdataset", path=str(path))
    storage = open_storage(tmp_path)
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    path.write_bytes(path.read_bytes()[:700])
    causes = [item.fault.cause for item in open_fetcher(config, storage, opened.base).fetch_all(inputs)]
    assert causes == ["size-mismatch", "size-mismatch"]


def test_what_webdataset_writes_and_this_project_writes_is_read(tmp_path, capsys):
    with webdataset.ShardWriter(f"{tmp_path}/w-%06d.tar", maxcount=2) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"{number:04d}", "jpg": b"%d" % number, "json": {"caption": f"caption {number}"}}
            )
    assert [(item.media, item.input.captions) for item in _read(tmp_path)] == [
        (b"%d" % number, [f"caption {number}"]) for number in range(5)
    ]
    write_dataset(open_storage(tmp_path / "own"))
    own = _read(tmp_path / "own", open_storage(tmp_path))
    first = [item for item in own if item.fault is None]
    assert first[0].media == media_of(0, 0)
    assert first[0].input.captions[0] == "a first caption"


@pytest.mark.server
def test_tars_on_s3_are_walked_and_read_by_range(s3_server, monkeypatch):
    storage = s3_server.storage("raw")
    members = [(f"{n}.mp4", bytes([n]) * (200_000 + n)) for n in range(20)]
    members += [(f"{n}.json", json.dumps({"captions": [f"c{n}", "d"]}).encode()) for n in range(20)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    storage.write_bytes("tars/0.tar", buffer.getvalue())
    storage.write_bytes("tars/1.tar", buffer.getvalue()[:2_000_000])
    read = []
    kind = type(storage._backend)
    plain = kind.read
    monkeypatch.setattr(
        kind, "read", lambda self, *arguments: read.append(plain(self, *arguments)) or read[-1]
    )
    config = configured(
        "video", kind="webdataset", path=f"{storage.url}/tars/{{0..1}}.tar", truncated="count"
    )
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    assert sum(map(len, read)) < 0.6 * 6_000_000  # headers, not the media
    results = list(open_fetcher(config, storage, opened.base).fetch_all(inputs))
    assert [item.media for item in results[:20]] == [data for _, data in members[:20]]
    assert [item.input.captions for item in results[:20]] == [[f"c{n}", "d"] for n in range(20)]
    assert results[-1].fault.cause == "truncated-tar"
    assert {item.fault.cause for item in results[20:-1]} == {"caption-missing"}


def test_a_name_may_have_more_digits_than_a_number(tmp_path):
    digits = ["1" + "0" * 5000, "0" * 5000 + "7", "9" * 5000]
    members = [("a.jpg", b"A"), *((f"a.{text}.txt", text[-3:].encode()) for text in digits)]
    (item,) = _read(_write(tmp_path / "x.tar", members, tarfile.PAX_FORMAT))
    assert item.input.captions == ["007", "999", "000"]


@pytest.mark.parametrize(("number", "size"), [(5, 1 << 20), (9000, 1)])
def test_the_texts_of_a_key_are_bounded_in_all(tmp_path, number, size):
    texts = [(f"a.{n}.txt", b"x" * size) for n in range(number)]
    results = _read(_write(tmp_path / "x.tar", [("a.jpg", b"A"), *texts, ("b.jpg", b"B"), ("b.txt", b"b")]))
    assert [item.fault and item.fault.cause for item in results] == ["too-many-bytes", None]


def test_members_that_lie_far_apart_are_read_in_requests_of_bounded_size(tmp_path, monkeypatch):
    texts = [(f"a.{n}.txt", b"%d" % n) for n in range(60)]
    between = [(f"b{n}.cls", b"\0" * (60 << 10)) for n in range(60)]
    members = [("a.jpg", b"A"), *(one for pair in zip(between, texts, strict=True) for one in pair)]
    path = _write(tmp_path / "x.tar", members)
    root = type(open_storage(tmp_path))
    sizes, read = [], root.read_bytes

    def noted(self, path, start=0, length=None):
        sizes.append(length or 0)
        return read(self, path, start, length)

    config = configured(kind="webdataset", path=str(path))
    storage = open_storage(tmp_path)
    source = open_source(config, storage)
    inputs = [item for item in source.inputs(hashlib.sha256()) if item.texts]
    monkeypatch.setattr(root, "read_bytes", noted)
    (item,) = open_fetcher(config, storage, source.base).fetch_all(inputs)
    assert item.input.captions == [str(n) for n in range(60)]
    assert max(sizes) < 2 << 20
    assert len(sizes) < 10
