"""Promises about tars of any program: `source: webdataset` and `shards index` treat the same tar in the same way, no
header takes memory for what is not there, and no caption that a tokenizer cannot read gets into a dataset.
"""

import io
import json
import struct
import tarfile

import pytest

from sharding import foreign
from sharding.captions import NotText, is_text, stored_captions
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.foreign import index_shards
from sharding.manifest import load_manifest
from sharding.names import escape_name
from sharding.reader import ShardReader
from sharding.sources.tars import Truncated, walk_tar
from sharding.storage import open_storage
from sharding.tarnames import split_name
from sharding.tarwalk import TarWalk
from sharding.verify import verify
from tests.sharding.foreign_tars import write_tar
from tests.sharding.listings import configured, fetched
from tests.sharding.real_media import picture

HALF = "\ud83d"  # of an emoji, as text cut in UTF-16 has it


def by_source(path):
    """Captions by key of what `source: webdataset` reads of a tar, and the causes of what it drops."""
    found = fetched(configured(kind="webdataset", path=str(path)), open_storage(path.parent))
    names = {item.input.address.partition(".tar/")[2]: item for item in found}
    kept = {name: item.input.captions for name, item in names.items() if item.fault is None}
    return kept, sorted(item.fault.cause for item in found if item.fault is not None)


def by_index(path):
    """The same of `shards index`."""
    storage = open_storage(path.parent)
    manifest = index_shards(storage, "image", bad_limit=1)
    reader = ShardReader(storage, load_manifest(storage))
    samples = [reader.read(0, row) for row in range(manifest.samples)]
    return {sample.key: sample.captions for sample in samples}, manifest.counts


@pytest.mark.parametrize(
    ("members", "media", "captions"),
    [
        (["0.b.jpg", "0.b.txt"], "0.b.jpg", ["caption of 0.b.txt"]),
        (
            ["2024-06.01.dog.JPEG", "2024-06.01.dog.TXT"],
            "2024-06.01.dog.JPEG",
            ["caption of 2024-06.01.dog.TXT"],
        ),
        (["a.ppm", "a.cap"], "a.ppm", ["caption of a.cap"]),
        (["a.avif", "a.captions"], "a.avif", ["caption of a.captions"]),
        (["a.v2.jpg", "a.v2.json"], "a.v2.jpg", ["in JSON"]),
        (["./d/a.jpg", "./d/a.txt"], "d/a.jpg", ["caption of ./d/a.txt"]),
        (["a.jpg", "a.seg.png", "a.txt"], "a.jpg", ["caption of a.txt"]),
        (["a\nb.jpg", "a\nb.txt"], "a\\x0ab.jpg", ["caption of a b.txt"]),
        (["__x.jpg", "__x.txt"], "__x.jpg", ["caption of __x.txt"]),
        (["caf\udce9.jpg", "caf\udce9.txt"], "caf\\xe9.jpg", ["a caption"]),
    ],
)
def test_source_and_index_find_the_same_members(tmp_path, members, media, captions):
    data = {"json": b'{"caption": "in JSON"}'}
    filled = []
    for name in ("__classnames__.txt", "__meta__/x.jpg", *members):
        kind = name.rpartition(".")[2].lower()
        text = f"caption of {name}".replace("\n", " ") if is_text(name) else "a caption"
        is_media = kind in ("jpg", "jpeg", "png", "ppm", "avif")
        filled.append((name, picture(1) if is_media else data.get(kind, text.encode())))
    write_tar(
        tmp_path / "0.tar", filled, encoding="utf-8", errors="surrogateescape", format=tarfile.GNU_FORMAT
    )
    kept, causes = by_source(tmp_path / "0.tar")
    assert (kept, causes) == ({media: captions}, [])
    indexed, counts = by_index(tmp_path / "0.tar")
    assert indexed == {split_name(media)[0]: captions}
    assert (counts.read, counts.kept) == (1, 1)


def test_source_and_index_drop_the_same_samples(tmp_path):
    def surrogate(field):
        return json.dumps({field: f"half {HALF}"}).encode()

    members = [
        ("good.jpg", picture(0)), ("good.txt", b"good"), ("good.json", surrogate("url")),
        ("twice.jpg", picture(1)), ("twice.txt", b"x"), ("twice.jpg", picture(2)),
        ("two.jpg", picture(3)), ("two.JPG", picture(3)), ("two.txt", b"x"),
        ("half.jpg", picture(4)), ("half.json", surrogate("caption")),
        ("latin.jpg", picture(5)), ("latin.txt", b"caf\xe9"),
        ("rescued.jpg", picture(6)), ("rescued.json", b"{broken"), ("rescued.txt", b"rescued"),
        ("none.txt", b"no media"),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    kept, causes = by_source(tmp_path / "0.tar")
    assert kept == {"good.jpg": ["good"], "half.jpg": [], "latin.jpg": [], "rescued.jpg": ["rescued"]}
    assert causes == ["media-missing", "repeated-member", "several-media"]
    indexed, counts = by_index(tmp_path / "0.tar")
    assert indexed == {"good": ["good"], "rescued": ["rescued"]}
    assert counts.dropped == {"caption-not-text": 2, "no-media": 1, "repeated-member": 1, "several-media": 1}
    assert counts.read == counts.kept + sum(counts.dropped.values()) == 7


def test_links_and_devices_are_counted_with_their_key_and_never_followed(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    assert by_source(tmp_path / "0.tar") == ({}, ["media-missing"] * 3)
    with pytest.raises(UserError, match="no sample with media"):
        index_shards(open_storage(tmp_path), "image", bad_limit=1)
    assert json.loads((tmp_path / "index" / "0.json").read_text())["counts"]["dropped"] == {"no-media": 3}


def _header(name=b"a.jpg", size=b"00000000000\0", kind=b"0"):
    """A header with a right checksum, whatever is in it."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:263] = name, size, kind, b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _binary(number):
    """A size in base 256, as GNU tar writes large ones; the sign is allowed to be negative."""
    return struct.pack(">iq", -1 if number < 0 else -(1 << 31), number)


def _pax(records):
    return _header(b"pax", b"%011o\0" % len(records), b"x") + records.ljust(512, b"\0") + _header()


HOSTILE = {
    "a member of an exabyte": _header(size=_binary(1 << 60)),
    "a negative size": _header(size=_binary(-600)),
    "an extended header of an exabyte": _header(kind=b"x", size=_binary(1 << 60)),
    "a long name of an exabyte": _header(kind=b"L", size=_binary(1 << 60)),
    "a negative extended header": _header(kind=b"x", size=_binary(-600)),
    "a negative long name": _header(kind=b"L", size=_binary(-600)),
    "long names of long names": _header(kind=b"L", size=b"00000001000\0") * 3000,
    "a size that is no number": _header(size=b"zzzzzzzzzzz\0"),
    "a pax size that is no number": _pax(b"12 size=xyz\n"),
    "a negative pax size": _pax(b"13 size=-900\n"),
    "a pax record without a length": _pax(b"size=1\n"),
    "a pax record that is not UTF-8": _pax(b"14 path=\xff.jpg\n"),
    "a sparse map without numbers": _pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=5\n"),
    "a name with a NUL and a line end": _header(name=b"a\nb.jpg\0c"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_header_that_claims_anything_is_an_error_with_its_byte_and_takes_no_memory(tmp_path, what):
    data = HOSTILE[what] + bytes(10240)
    (tmp_path / "0.tar").write_bytes(data)
    storage = open_storage(tmp_path)
    walked = _walked(data)
    listed = fetched(configured(kind="webdataset", path=str(tmp_path / "0.tar"), truncated="count"), storage)
    assert listed, "nothing was counted"
    if isinstance(walked, BadData):
        assert walked.cause in ("bad-tar", "truncated-shard")
        assert "byte" in walked.detail
        assert {item.fault.cause for item in listed} <= {"truncated-tar", "media-missing", "caption-missing"}
    with pytest.raises((BadData, BadDataLimit, UserError)):
        index_shards(storage, "image")


def test_a_tar_with_any_byte_changed_is_read_or_refused_in_both_ways(tmp_path):
    write_tar(
        tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.txt", b"x"), ("b.jpg", picture(1)), ("b.txt", b"y")]
    )
    whole = (tmp_path / "0.tar").read_bytes()
    storage = open_storage(tmp_path)
    for place in range(0, 512, 3):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (tmp_path / "0.tar").write_bytes(changed)
        walked = _walked(changed)
        try:
            listed = [member.name for member in walk_tar(storage, "0.tar", len(changed))]
        except Truncated:
            listed = None
        assert (None if isinstance(walked, BadData) else walked) == listed


def _walked(data):
    """Names of the members, or why there are none."""
    try:
        return [member.name for member, _ in TarWalk(io.BytesIO(data), "0.tar").members()]
    except BadData as error:
        return error


@pytest.mark.parametrize(
    ("description", "text", "captions"),
    [
        ({"caption": f"x{HALF}"}, b"line", ["line"]),
        ({"caption": [f"x{HALF}", "y"]}, b"line", ["y"]),
        ({"caption": 7}, b"\xef\xbb\xbfline", ["line"]),
        ({"caption": {"a": 1}}, b"", NotText),
        ({"caption": [None, f"{HALF}"]}, b" ", NotText),
        ({}, b"caf\xe9", NotText),
        ({}, b" \n", ValueError),
        (b"[" * 100_000, b"", ValueError),
        (b"[" * 100_000, b"line", ["line"]),
        (b"1" * 5000, b"line", ["line"]),
        (b"\xff", b"", ValueError),
    ],
)
def test_captions_of_other_programs_are_text_or_none(description, text, captions):
    data = description if isinstance(description, bytes) else json.dumps(description).encode()
    if isinstance(captions, list):
        assert stored_captions(data, text, "caption") == captions
    else:
        with pytest.raises(captions):
            stored_captions(data, text, "caption")


def test_a_caption_that_no_tokenizer_reads_in_shards_that_are_there_is_masked_with_its_key(
    tmp_path, monkeypatch
):
    members = []
    for number in range(3):
        caption = f"number {number}" + (HALF if number == 1 else "")
        members += [
            (f"{number}.jpg", picture(number)),
            (f"{number}.json", json.dumps({"caption": caption}).encode()),
        ]
    write_tar(tmp_path / "0.tar", members)
    # As a version of this program indexed it that did not look.
    monkeypatch.setattr(foreign, "stored_captions", lambda value, words, field: [json.loads(value)[field]])
    storage = open_storage(tmp_path)
    manifest = index_shards(storage, "image")
    found = dict(ShardReader(storage, manifest).read_many([(0, row) for row in range(3)]))
    assert [found[row].captions for row in (0, 2)] == [["number 0"], ["number 2"]]
    assert (found[1].cause, "0.tar, key 1" in found[1].detail) == ("bad-json", True)
    assert [(fault.cause, fault.key) for fault in verify(storage, manifest).faults] == [("bad-json", "1")]


def test_a_key_that_was_left_out_is_told_with_its_reason(tmp_path):
    good = [("a.jpg", picture(0)), ("a.txt", b"x")]
    write_tar(tmp_path / "0.tar", [*good, ("b.jpg", picture(1)), ("b.txt", b"\xff")])
    storage = open_storage(tmp_path)
    manifest = index_shards(storage, "image", bad_limit=0.5)
    assert manifest.samples == 1
    assert "caption-not-text: the text member is not UTF-8" in (foreign.left_out(storage, "b") or "")
    assert foreign.left_out(storage, "c") is None


@pytest.mark.parametrize("captions", [["x", HALF], [HALF], []])
def test_a_caption_of_ours_that_is_no_text_costs_its_sample_when_it_is_read(captions):
    with pytest.raises(ValueError, match="list of texts"):
        stored_captions(json.dumps({"captions": captions}).encode(), b"", None)


def test_names_that_utf8_cannot_hold_are_written_out():
    assert escape_name("caf\udce9 \ud83d \U0001f436") == "caf\\xe9 \\ud83d \U0001f436"
