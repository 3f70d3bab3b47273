"""Promises of names: which files are no part of a corpus, how any name is written, and what folders give."""

import io
import itertools
import json
import os
import tarfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pipeline.shards_view import details, print_dataset, summary
from sharding.errors import UserError
from sharding.foreign import index_shards
from sharding.index import load_index
from sharding.manifest import ShardRecord, load_manifest
from sharding.names import Skipped, escape_name, hidden, unescape_name
from sharding.plan import make_plan, read_inputs, survey
from sharding.reader import ShardReader
from sharding.report import closing_table
from sharding.report_page import report_page
from sharding.sources import folder, open_fetcher, open_source
from sharding.sources.addresses import BelowBase
from sharding.storage import open_storage
from sharding.summary import Summary
from sharding.verify import verify
from tests.sharding.listings import configured, listed, source

RESOURCE_FORK = b"\x00\x05\x16\x07\x00\x02\x00\x00" + b"Mac OS X        " + bytes(4072)


def write(path, data=b"x"):
    """A file, at any path that bytes can spell."""
    path = os.fsencode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def jpg(colour):
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 90, 30)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.mark.parametrize(
    "path",
    [
        "._0.jpg",
        "a/._0.jpg",
        ".DS_Store",
        "__MACOSX/0.jpg",
        "a/__MACOSX/b/0.jpg",
        ".ipynb_checkpoints/3-checkpoint.jpg",
        "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        "#recycle/0.jpg",
        ".Trash-1000/files/0.jpg",
        ".Trashes/501/0.jpg",
        "$RECYCLE.BIN/S-1-5-21/$RABC.jpg",
        "$Recycle.Bin/0.jpg",
        "System Volume Information/IndexerVolumeGuid",
        "lost+found/0.jpg",
        "a/Thumbs.db",
        "thumbs.db",
        "desktop.ini",
        "Icon\r",
        ".git/objects/0.jpg",
        ".nfs000000000001.jpg",
        "...jpg",
    ],
)
def test_what_systems_and_programs_leave_behind_is_hidden(path):
    assert hidden(path)


@pytest.mark.parametrize(
    "path",
    [
        "0.jpg",
        "a.b/_0.jpg",
        "recycled/bottle.jpg",
        "macosx/0.jpg",
        "a/./0.jpg",
        "../0.jpg",
        "thumbs.db/0.jpg",
        "_.jpg",
    ],
)
def test_what_only_looks_like_it_is_not(path):
    assert not hidden(path)


@given(
    st.text(st.characters(codec=None))
    | st.binary().map(os.fsdecode)
    | st.text("\\xu\udce9\ud800e90af5c2\n./")
)
@example("caf\udce9.jpg")
@example("C:\\xe9 \\u2028 \\x5c \\x2e")
@example("\\" * 3 + "x0a\x00\x85\u202e")
def test_any_name_is_written_as_a_line_of_utf_8_and_read_back(name):
    written = escape_name(name)
    assert unescape_name(written) == name
    assert written.encode().decode().splitlines() in ([written], [])
    assert written.isascii() or not any(0xD800 <= ord(character) < 0xE000 for character in written)


def test_names_are_written_as_people_expect():
    names = ["caf\udce9.jpg", "é ü/%20#?.jpg", "a\\b.jpg", "line\nend", "C:\\xe9"]
    assert [escape_name(name) for name in names] == [
        r"caf\xe9.jpg",
        "é ü/%20#?.jpg",
        r"a\b.jpg",
        r"line\x0aend",
        r"C:\x5cxe9",
    ]


def test_no_escape_stands_for_a_part_of_a_path():
    record = {"samples": 1, "bytes": 1, "sha256": "", "index_bytes": 1, "index_sha256": ""}
    for name in (r"\x2e\x2e/x", r"\x2fetc", r"\u002e\u002e", r"..\x2fx"):
        assert unescape_name(name) == name
        assert ShardRecord(name=name, **record).tar == f"{name}.tar"
    for name in ("../x", "/etc", "a//b", r"a\x00"):
        with pytest.raises(ValueError, match="below the dataset"):
            ShardRecord(name=name, **record)


def test_a_manifest_names_no_file_that_no_system_can_have():
    record = {"samples": 1, "bytes": 1, "sha256": "", "index_bytes": 1, "index_sha256": ""}
    assert ShardRecord(name=r"caf\xe9", **record)  # a byte that is not UTF-8 is a name's
    for name in (r"a\ud800", r"\udfff/b"):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            ShardRecord(name=name, **record)


def test_skipped_files_are_counted_by_suffix_in_a_bounded_number_of_kinds():
    skipped = Skipped()
    for path in ("a.PDF", "b.pdf", "c.tar.gz", "README", "d.a suffix with blanks"):
        skipped.add_file(path)
    assert skipped.counts() == {".pdf": 2, "no-suffix": 2, ".gz": 1}
    for number in range(1000):
        skipped.add_file(f"log.{number:04d}")
    assert len(skipped.counts()) == 101
    assert sum(skipped.counts().values()) == 1005


def corpus(root):
    """A folder in which every kind of file is: media with and without captions, and what is neither."""
    for name in (
        "0.jpg",
        "0.txt",
        "1.JPG",
        "1.TXT",
        "2.png",
        "sub/3.jpeg",
        "sub/3.Txt",
        "both.jpg",
        "both.TXT",
    ):
        write(root / name)
    for name in ("both.txt", "orphan.txt", "sub/orphan.TXT", "paper.pdf", "more.PDF", "LICENSE", "0.json"):
        write(root / name)
    for name in (
        "._0.jpg",
        "._0.txt",
        "__MACOSX/._0.jpg",
        ".Trash-1000/files/old.jpg",
        "Thumbs.db",
        "@eaDir/0.jpg/x.jpg",
    ):
        write(root / name, RESOURCE_FORK)


def test_every_file_of_a_folder_is_an_input_a_caption_or_counted(tmp_path):
    corpus(tmp_path)
    opened = source(tmp_path, kind="folder")
    inputs, _ = listed(opened)
    assert [(item.address, item.sidecar.path) for item in inputs] == [
        ("0.jpg", "0.txt"),
        ("1.JPG", "1.TXT"),
        ("2.png", "2.txt"),
        ("both.jpg", "both.txt"),
        ("sub/3.jpeg", "sub/3.Txt"),
    ]
    found = survey(opened, lambda _: None)
    assert found.skipped == {"hidden": 6, "unused-caption": 3, ".pdf": 2, ".json": 1, "no-suffix": 1}
    files = sum(len(names) for _, _, names in os.walk(tmp_path))
    assert files == found.inputs + found.sidecars + sum(found.skipped.values())
    assert survey(opened, lambda _: None) == found


def test_the_suffix_that_is_spelt_as_configured_wins(tmp_path):
    for suffix in (".txt", ".TXT", ".Txt"):
        write(tmp_path / f"0{suffix}")
    write(tmp_path / "0.JPG")
    for captions in (".txt", ".TXT", ".Txt"):
        ((item,), _) = listed(source(tmp_path, kind="folder", captions=captions))
        assert item.sidecar == BelowBase(f"0{captions}")
    (tmp_path / "0.txt").unlink()
    ((item,), _) = listed(source(tmp_path, kind="folder"))
    assert item.sidecar == BelowBase("0.TXT")
    with pytest.raises(ValueError, match=r"must be \.txt or \.json"):
        configured(kind="folder", path=str(tmp_path), captions=".caption")


def test_captions_in_upper_case_files_are_read_as_what_they_are(tmp_path):
    write(tmp_path / "a.JPG", b"1")
    write(tmp_path / "a.JSON", b'{"caption": "a dog"}')
    config = configured(kind="folder", path=str(tmp_path), captions=".JSON")
    opened = open_source(config, open_storage(tmp_path))
    (got,) = open_fetcher(config, open_storage(tmp_path), opened.base).fetch_all(listed(opened)[0])
    assert folder.parse_sidecar(got.sidecar, got.input.sidecar.path) == (["a dog"], 0)


def test_files_of_nested_names_get_their_own_captions_however_many_lie_between(tmp_path, monkeypatch):
    for stem in ("a", "a.b", "a.b.c", "a-b", "a.0", "ab"):
        write(tmp_path / f"{stem}.JPG")
        write(tmp_path / f"{stem}.txt")
    write(tmp_path / "a.d" / "x.jpg")
    write(tmp_path / "a.TXT")
    expected, digest = listed(source(tmp_path, kind="folder"))
    taken = {item.address: item.sidecar.path for item in expected}
    assert taken.pop("a.d/x.jpg") == "a.d/x.txt"
    assert taken == {f"{stem}.JPG": f"{stem}.txt" for stem in ("a", "a.b", "a.b.c", "a-b", "a.0", "ab")}
    monkeypatch.setattr(folder, "_MOST_WAITING", 1)
    opened = source(tmp_path, kind="folder")
    assert listed(opened) == (expected, digest)
    assert (opened.skipped.sidecars, opened.skipped.counts()) == (6, {"unused-caption": 1})


def test_links_to_nothing_and_folders_that_cannot_be_read_are_inputs_that_are_bad(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.txt")
    write(tmp_path / "closed" / "c.jpg")
    write(tmp_path / "lost+found" / "d.jpg")
    true_scan = os.scandir

    def scan(path):
        if os.path.basename(path) in ("closed", "lost+found"):
            raise PermissionError(13, "Permission denied")
        return true_scan(path)

    monkeypatch.setattr("sharding.storage_file.os.scandir", scan)
    opened = source(tmp_path, kind="folder")
    inputs, _ = listed(opened)
    assert [(item.address, item.problem) for item in inputs] == [
        ("a.jpg", None),
        ("b.jpg", "missing-file"),
        ("closed/", "unreadable-folder"),
        ("loop.jpg", "missing-file"),
    ]
    assert inputs[1].reason == "b.jpg is a link to nothing"
    assert opened.skipped.counts() == {"hidden": 1, "not-a-file": 1}


def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        open_storage(tmp_path).read_bytes("a.jpg", 0, 10)


def test_an_empty_corpus_says_what_was_passed_over(tmp_path):
    for name in ("0.heic2", "1.heic2", "._0.jpg"):
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"empty corpus: no image files .*; passed over: \.heic2 2, hidden 1"):
        listed(source(tmp_path, kind="folder"))


STRANGE = [
    b"caf\xe9",
    b"caf\xc3\xa9",
    b"cafe\xcc\x81",
    b"line\nend",
    b"tab\tbell\x07",
    b"100%20",
    b"a#b?c",
    b"two  spaces ",
    b"quote'\"<>|*",
    b"C:\\xe9",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"n" * 240,
    "\u202egpj".encode(),
    "\U0001f600".encode(),
]


def test_files_of_any_name_are_listed_planned_and_read(tmp_path):
    below = os.fsencode(tmp_path / "raw") + b"/dir\xe9/"
    for number, stem in enumerate(STRANGE):
        write(below + stem + b".jpg", b"%d" % number)
        write(below + stem + b".txt", b"caption %d" % number)
    config = configured(kind="folder", path=str(tmp_path / "raw"))
    storage, dataset = open_storage(tmp_path), open_storage(tmp_path / "out")
    opened = open_source(config, storage)
    plan = make_plan(opened, survey(opened, lambda _: None), config, dataset)
    assert plan.source.inputs == plan.source.sidecars == len(STRANGE)
    inputs = list(read_inputs(dataset, 0))
    got = {item.media: item.sidecar for item in open_fetcher(config, storage, opened.base).fetch_all(inputs)}
    assert got == {b"%d" % number: b"caption %d" % number for number in range(len(STRANGE))}
    json.dumps([item.address for item in inputs], ensure_ascii=False).encode()
    assert len({item.address for item in inputs}) == len(STRANGE)
    assert all(len(item.address.splitlines()) == 1 for item in inputs)


def test_a_table_in_a_folder_of_any_name_finds_its_files(tmp_path):
    below = os.fsencode(tmp_path) + b"/caf\xe9/"
    write(below + b"t.csv", b"file,text\na.jpg,x\n")
    write(below + b"a.jpg", b"1")
    write(below + b"._t.csv", RESOURCE_FORK)
    options = {"kind": "table", "path_column": "file", "caption_column": "text"}
    for path in (tmp_path, os.fsdecode(below), os.fsdecode(below) + "t.csv"):
        config = configured(path=str(path), **options)
        opened = open_source(config, open_storage(tmp_path))
        inputs, _ = listed(opened)
        results = list(open_fetcher(config, open_storage(tmp_path), opened.base).fetch_all(inputs))
        assert [item.media for item in results] == [b"1"]
        assert str(path).endswith("csv") or opened.skipped.counts() == {"hidden": 1}


def tar_of(members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def strange_tars(root):
    """Two tars, one of a name in Latin-1, with members of strange and hidden names; gives their pictures by caption."""
    pictures = {}
    for place, tar in enumerate((b"00000.tar", b"caf\xe9\n.tar")):
        members = [(b"._0.jpg", RESOURCE_FORK), (b"__MACOSX/._1.jpg", RESOURCE_FORK), (b"README", b"x")]
        members += [(b".Trash-1000/files/old.jpg", jpg(1)), (b".Trash-1000/files/old.txt", b"deleted")]
        for number, stem in enumerate((b"0", b"caf\xe9", b"sub/line\nend")):
            caption = f"picture {place} {number}"
            pictures[caption] = jpg(40 * place + 10 * number)
            members += [
                (stem + b"%d.jpg" % place, pictures[caption]),
                (stem + b"%d.txt" % place, caption.encode()),
            ]
        write(os.fsencode(root) + b"/" + tar, tar_of(members))
    write(root / "._00000.tar", RESOURCE_FORK)
    write(root / "00000_stats.json", b"{}")
    return pictures


ASIDE = {"hidden": 9, "no-suffix": 2, ".json": 1}


def test_tars_and_members_of_any_name_are_samples_and_hidden_ones_are_counted(tmp_path):
    pictures = strange_tars(tmp_path)
    config = configured(kind="webdataset", path=str(tmp_path))
    opened = open_source(config, open_storage(tmp_path))
    found = survey(opened, lambda _: None)
    assert (found.inputs, found.skipped) == (6, ASIDE)
    plan = make_plan(opened, found, config, open_storage(tmp_path / "out"))
    inputs = list(
        itertools.chain(*(read_inputs(open_storage(tmp_path / "out"), n) for n in range(plan.tasks)))
    )
    results = open_fetcher(config, open_storage(tmp_path), opened.base).fetch_all(inputs)
    assert {item.input.captions[0]: item.media for item in results} == pictures
    assert r"caf\xe9\x0a.tar/caf\xe91.jpg" in {item.address for item in inputs}


def test_another_programs_tars_of_any_name_are_indexed_read_and_verified(tmp_path):
    pictures = strange_tars(tmp_path)
    dataset = open_storage(tmp_path)
    manifest = index_shards(dataset, "image")
    assert (manifest.counts.read, manifest.counts.kept, manifest.skipped) == (6, 6, ASIDE)
    assert [shard.name for shard in manifest.shards] == ["00000", r"caf\xe9\x0a"]
    assert load_manifest(dataset).digest == manifest.digest
    reader = ShardReader(dataset, load_manifest(dataset))
    read = {}
    for number, shard in enumerate(manifest.shards):
        for row in range(len(load_index(dataset, shard))):
            sample = reader.read(number, row)
            read[sample.captions[0]] = sample.media
    assert read == pictures
    assert verify(dataset, manifest, decode=True).sound
    assert index_shards(dataset, "image").digest == manifest.digest
    # People see what was passed over.
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(closing_table([manifest]))
    print_dataset({**summary(dataset, manifest), **details(manifest)}, console)
    shown = console.export_text()
    assert "files passed over" in shown
    assert shown.count("hidden") == 2
    assert "<td>hidden</td><td class='n'>9</td>" in report_page(manifest, Summary())
