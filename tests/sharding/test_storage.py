"""The promises of sharding/storage.py that hold on every kind of storage, and those of folders."""

import contextlib
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydantic
import pytest

from sharding.errors import BadData, StorageFault, UserError
from sharding.storage import Storage, StorageConfig, normalise_url, open_storage

NAMES = ["B", "a+b c%20", "a-b/x", "a.txt", "a/b", "a/c", "a/z/q", "ab", "é/ü#?.txt"]


def paths(storage, prefix=""):
    return [file.path for file in storage.list(prefix)]


def folder(tmp_path, name="folder"):
    return open_storage(tmp_path / name)


def test_a_file_written_is_read_back_whole_and_by_range(storage):
    storage.write_bytes("a/b.bin", b"0123456789")
    assert storage.read_bytes("a/b.bin") == b"0123456789"
    assert storage.read_bytes("a/b.bin", 3) == b"3456789"
    assert storage.read_bytes("a/b.bin", 3, 4) == b"3456"
    assert storage.read_bytes("a/b.bin", 8, 4) == b"89"  # as files do: fewer where it ends
    assert storage.read_bytes("a/b.bin", 10, 4) == b""
    assert storage.read_bytes("a/b.bin", 0, 0) == b""
    assert storage.size("a/b.bin") == 10
    storage.write_bytes("a/b.bin", b"")
    assert storage.read_bytes("a/b.bin") == b""


def test_a_missing_file_is_named_by_its_full_url(storage):
    storage.write_bytes("folder/file", b"x")
    for path in ("nothing", "folder", "folder/file/below"):
        assert not storage.exists(path)
        for call in (storage.read_bytes, storage.size, storage.open, storage.read_json):
            with pytest.raises(FileNotFoundError) as caught:
                call(path)
            assert storage.url_of(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing", 0, 0)


def test_a_listing_is_recursive_sorted_and_by_whole_folders(storage):
    for name in reversed(NAMES):
        storage.write_bytes(name, name.encode())
    assert paths(storage) == sorted(NAMES)
    assert [file.size for file in storage.list()] == [len(name.encode()) for name in sorted(NAMES)]
    assert paths(storage, "a") == paths(storage, "a/") == ["a/b", "a/c", "a/z/q"]
    assert paths(storage.at("a")) == ["b", "c", "z/q"]
    assert paths(storage, "nothing") == []
    for name in NAMES:
        assert storage.read_bytes(name) == name.encode()


def test_a_listing_shows_what_another_wrote_meanwhile(storage):
    storage.write_bytes("a", b"1")
    assert paths(storage) == ["a"]
    open_storage(storage.config).write_bytes("b", b"22")
    assert paths(storage) == ["a", "b"]
    storage.delete("a")
    assert paths(storage) == ["b"]
    assert not storage.exists("a")


def test_json_is_written_canonically(storage):
    storage.write_json("one", {"b": [1, 2.5], "a": "é"})
    storage.write_json("two", {"a": "é", "b": [1, 2.5]})
    assert storage.read_bytes("one") == storage.read_bytes("two")
    assert storage.read_bytes("one").endswith(b"}\n")
    assert "é".encode() in storage.read_bytes("one")
    assert storage.read_json("one") == {"a": "é", "b": [1, 2.5]}


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b""])
def test_a_file_that_is_not_json_is_named(tmp_path, data):
    storage = folder(tmp_path)
    storage.write_bytes("bad.json", data)
    with pytest.raises(ValueError, match=r"folder/bad\.json is not valid JSON"):
        storage.read_json("bad.json")


def test_of_many_that_create_a_file_at_once_exactly_one_does(storage):
    start = threading.Barrier(5)

    def create(number):
        start.wait()
        return storage.create_exclusive("claims/one", b"%d" % number * 5000)

    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(create, range(5)))
    assert sum(made) == 1
    assert storage.read_bytes("claims/one") == b"%d" % made.index(True) * 5000
    assert not storage.create_exclusive("claims/one", b"late")
    assert paths(storage) == ["claims/one"]


def test_upload_and_download_carry_every_byte_and_say_size_and_hash(storage, tmp_path):
    data = os.urandom(20 << 20)  # several blocks
    source = tmp_path / "source"
    source.write_bytes(data)
    sent = storage.upload(source, "deep/er/file")
    assert sent == (len(data), hashlib.sha256(data).hexdigest())
    storage.download("deep/er/file", tmp_path / "new" / "copy", size=sent.size, sha256=sent.sha256)
    assert (tmp_path / "new" / "copy").read_bytes() == data
    storage.copy("deep/er/file", "copied/file", size=sent.size, sha256=sent.sha256)
    assert storage.read_bytes("copied/file") == data


def test_a_copy_that_fails_its_check_leaves_what_was_there(storage):
    storage.write_bytes("file", b"content")
    storage.write_bytes("there", b"before")
    for size, sha256, cause in ((8, "0" * 64, "size-mismatch"), (7, "0" * 64, "sha256-mismatch")):
        with pytest.raises(BadData) as caught:
            storage.copy("file", "there", size=size, sha256=sha256)
        assert caught.value.cause == cause
        assert storage.url_of("file") in caught.value.detail
    with pytest.raises(FileNotFoundError):
        storage.copy("nothing", "there", size=7, sha256="0" * 64)
    assert storage.read_bytes("there") == b"before"


def test_a_download_that_fails_its_check_leaves_the_destination_as_it_was(storage, tmp_path):
    storage.write_bytes("file", b"content")
    target = tmp_path / "target" / "file"
    for wrong, cause in (({"size": 8}, "size-mismatch"), ({"sha256": "0" * 64}, "sha256-mismatch")):
        with pytest.raises(BadData) as caught:
            storage.download("file", target, **wrong)
        assert caught.value.cause == cause
        assert storage.url_of("file") in caught.value.detail
    assert not target.exists()
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(b"before")
    with pytest.raises(BadData):
        storage.download("file", target, sha256="0" * 64)
    with pytest.raises(FileNotFoundError):
        storage.download("nothing", target)
    assert target.read_bytes() == b"before"
    assert os.listdir(target.parent) == ["file"]


def test_an_open_file_can_be_read_at_random(storage):
    data = os.urandom(300_000)
    storage.write_bytes("file", data)
    with storage.open("file") as file:
        assert file.read(10) == data[:10]
        file.seek(-5, io.SEEK_END)
        assert file.read() == data[-5:]
        file.seek(100_000)
        assert file.read(7) == data[100_000:100_007]
        file.seek(0)
        assert file.read() == data
        assert file.read(1) == b""


def test_a_file_replaced_while_it_is_read_is_no_mixture(storage):
    storage.write_bytes("file", b"a" * (20 << 20))
    with storage.open("file") as file:
        assert file.read(5) == b"aaaaa"
        storage.write_bytes("file", b"b" * (20 << 20))
        file.seek(15 << 20)
        with pytest.raises(StorageFault, match="was replaced while it was read"):
            file.read(5)


def test_what_is_deleted_is_gone_and_deleting_nothing_is_no_error(storage):
    for name in NAMES:
        storage.write_bytes(name, b"")
    storage.delete("a", recursive=True)
    storage.delete("ab")
    storage.delete("ab")
    storage.delete("nothing", recursive=True)
    assert paths(storage) == ["B", "a+b c%20", "a-b/x", "a.txt", "é/ü#?.txt"]
    storage.delete("", recursive=True)
    assert paths(storage) == []


def test_a_folder_that_others_delete_and_write_meanwhile_is_deleted_without_an_error(tmp_path):
    storage = folder(tmp_path)
    stop = threading.Event()

    def write_and_delete(number):
        while not stop.is_set():
            # Its folder goes as it is made.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                storage.write_bytes(f"work/{number}/{os.urandom(2).hex()}", b"x")
            if number % 2:
                storage.delete("work", recursive=True)

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(write_and_delete, number) for number in range(4)]
        try:
            for _ in range(200):
                storage.delete("work", recursive=True)
        finally:
            stop.set()
    assert [other.exception() for other in others] == [None] * 4
    storage.delete("work", recursive=True)
    assert paths(storage) == []


def test_a_storage_that_works_passes_its_check_and_the_check_leaves_nothing(storage):
    storage.check(write=True)
    storage.check(write=False)
    assert paths(storage) == []


def test_a_storage_crosses_to_another_process(storage):
    storage.write_bytes("from parent", b"1")
    program = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); "
        "s.write_bytes('from child', s.read_bytes('from parent') + b'2')"
    )
    subprocess.run([sys.executable, "-c", program], input=pickle.dumps(storage), check=True, timeout=60)
    assert storage.read_bytes("from child") == b"12"


def test_a_storage_used_before_a_fork_works_after_it(storage):
    storage.write_bytes("before", b"1")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            storage.write_bytes("after", storage.read_bytes("before") + b"2")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.read_bytes("after") == b"12"


def test_a_sub_tree_is_a_storage_with_the_same_options(storage):
    sub = storage.at("x/y")
    sub.write_bytes("z", b"1")
    assert storage.read_bytes("x/y/z") == b"1"
    assert sub.url == storage.url + "/x/y"
    assert sub.url_of("z") == storage.url_of("x/y/z")
    assert storage.resolve("x/y").read_bytes("z") == b"1"
    assert storage.resolve(sub.url).read_bytes("z") == b"1"
    assert open_storage(sub.config).read_bytes("z") == b"1"
    assert sub.config.attempts == storage.config.attempts
    assert storage.at("") == storage


@pytest.mark.parametrize("path", ["../out", "a/../../out", "/etc/passwd", "a/\0b"])
def test_no_path_leads_out_of_a_storage(tmp_path, path):
    storage = folder(tmp_path)
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.at,
        storage.url_of,
        storage.delete,
        storage.open,
    ):
        with pytest.raises(UserError):
            call(path)
    with pytest.raises(UserError):
        storage.write_bytes(path, b"")


def test_a_folder_is_no_name_for_a_file(tmp_path):
    for path in ("", ".", "a/"):
        with pytest.raises(ValueError, match="no name for a file"):
            folder(tmp_path).write_bytes(path, b"")


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("/a/b/", "file:///a/b"),
        ("/a/./b//c", "file:///a/b/c"),
        ("file:///a/b/", "file:///a/b"),
        ("file://localhost/a", "file:///a"),
        ("/a b/100%", "file:///a%20b/100%25"),
        ("file:///a%20b", "file:///a%20b"),
        ("file:///a b", "file:///a%20b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket//a/b/", "s3://bucket/a/b"),
    ],
)
def test_urls_are_normalised_once_and_for_all(given, normal):
    given = given.replace("s3://bucket//", "s3://bucket/")
    assert normalise_url(given) == normal
    assert normalise_url(normal) == normal
    assert open_storage(given).url == normal


def test_a_relative_path_is_taken_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_storage("sub").url == (tmp_path / "sub").as_uri()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("ftp://host/x", "cannot open ftp://"),
        ("file://host/x", "three slashes"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/x", "must not hold credentials"),
    ],
)
def test_a_url_that_cannot_be_opened_is_refused_in_one_line(url, message):
    with pytest.raises(UserError, match=message) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": "localhost:9000"},
        {"endpoint_url": "http://key:secret@host"},
        {"access_key": "a"},
        {"anonymous": True, "access_key": "a", "secret_key": "b"},
        {"attempts": 0},
        {"read_timeout_s": 0},
        {"end_point": "http://host"},
        {"url": "ftp://x"},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options):
    with pytest.raises(pydantic.ValidationError):
        StorageConfig(**{"url": "s3://bucket", **options})


def test_credentials_show_in_no_representation():
    config = StorageConfig(url="s3://bucket/x", access_key="AKIAEXAMPLE", secret_key="verysecret")
    shown = f"{config} {config!r} {config.model_dump_json()} {Storage(config)} {Storage(config).url}"
    assert "AKIAEXAMPLE" not in shown
    assert "verysecret" not in shown


def test_a_folder_that_is_missing_or_none_fails_its_check(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="missing does not exist"):
        folder(tmp_path, "missing").check(write=False)
    for write in (True, False):
        with pytest.raises(UserError, match="is not a folder"):
            folder(tmp_path, "file").check(write=write)
    folder(tmp_path, "missing").check(write=True)
    folder(tmp_path, "missing").check(write=False)


def test_what_a_killed_writer_left_behind_is_never_listed(tmp_path):
    storage = folder(tmp_path)
    program = (
        "import os, sys; from sharding.storage_file import write_file; from pathlib import Path\n"
        "def blocks():\n    yield b'half'\n    os.kill(os.getpid(), 9)\n"
        "write_file(Path(sys.argv[1]) / 'file', blocks())"
    )
    storage.write_bytes("file", b"before")
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "folder")], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "folder")) == 2
    assert paths(storage) == ["file"]
    assert storage.read_bytes("file") == b"before"


def test_a_full_disk_is_said_with_the_path_and_leaves_no_half_file(tmp_path):
    program = (
        "import resource, signal, sys; from sharding.storage import open_storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "s = open_storage(sys.argv[1])\n"
        "for write in (s.write_bytes, s.create_exclusive):\n"
        "    try: write('big', b'x' * 200_000); print('written')\n"
        "    except OSError as error: print(error)"
    )
    run = [sys.executable, "-c", program, str(tmp_path / "folder")]
    output = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.count(f"cannot write {tmp_path / 'folder' / 'big'}: File too large") == 2
    assert os.listdir(tmp_path / "folder") == []


def test_a_file_that_changes_while_it_is_uploaded_is_not_taken_for_good(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    true_fstat = os.fstat

    def growing(descriptor):
        with source.open("ab") as file:
            file.write(b"y")
        return true_fstat(descriptor)

    monkeypatch.setattr("sharding.storage_file.os.fstat", growing)
    with pytest.raises(StorageFault, match="changed while it was copied"):
        folder(tmp_path).upload(source, "file")
    assert not folder(tmp_path).exists("file")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "sub" / "circle").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "sub" / "y").write_bytes(b"2")
    (tmp_path / "folder" / "broken").symlink_to(tmp_path / "nothing")
    assert paths(folder(tmp_path)) == ["linked/x", "sub/y"]


def test_an_absolute_path_or_url_resolves_from_anywhere(tmp_path):
    storage = folder(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_bytes(b"1")
    assert storage.resolve(str(tmp_path / "other")).read_bytes("file") == b"1"
    assert storage.resolve((tmp_path / "other").as_uri()).read_bytes("file") == b"1"
    assert storage.resolve(str(tmp_path / "other" / "file")).read_bytes("") == b"1"
    assert storage.resolve("s3://bucket/x").url == "s3://bucket/x"
    assert storage.local_path("a/b") == Path(tmp_path / "folder" / "a" / "b")
