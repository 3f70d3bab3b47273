"""Folders on disks that are full, read-only or away for a while, and what no waiting mends."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding import storage_file
from sharding.errors import StorageFault, StorageRefused, UserError
from sharding.storage import Storage, StorageConfig, open_storage

PASSING = ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EAGAIN", "EHOSTDOWN")
LASTING = ("EACCES", "EPERM", "ENAMETOOLONG", "EINVAL", "EFBIG", "ELOOP")


def failing(number: int, times: int = 10**9, then: Callable[..., Any] | None = None) -> Callable[..., Any]:
    left = [times]

    def call(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        assert then is not None
        return then(*arguments, **options)

    return call


def once(folder: Path) -> Storage:
    """A storage that tries each thing once."""
    return Storage(StorageConfig(url=str(folder), attempts=1))


def writes(storage: Storage, source: Path) -> dict[str, Callable[[], Any]]:
    return {
        "write": lambda: storage.write_bytes("a/file", b"new"),
        "create": lambda: storage.create_exclusive("a/new", b"new"),
        "upload": lambda: storage.upload(source, "a/file"),
        "download": lambda: storage.download("a/file", source.parent / "copy"),
    }


@pytest.mark.parametrize("name", [*PASSING, *LASTING])
@pytest.mark.parametrize("where", ["fsync", "open"])
def test_what_may_pass_is_a_storage_fault_and_what_will_not_is_refused_with_file_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    storage, source = once(tmp_path / "s"), tmp_path / "source"
    source.write_bytes(b"source")
    storage.write_bytes("a/file", b"old")
    number = getattr(errno, name)
    with monkeypatch.context() as patch:
        if where == "fsync":
            patch.setattr(storage_file.os, "fsync", failing(number))
        else:
            opened = Path.open
            patch.setattr(
                Path,
                "open",
                lambda path, mode="r", *rest, **options: (
                    failing(number)() if mode == "xb" else opened(path, mode, *rest, **options)
                ),
            )
        for what, act in writes(storage, source).items():
            with pytest.raises(OSError, match="cannot write") as caught:
                act()
            assert type(caught.value) is (StorageFault if name in PASSING else StorageRefused), what
            assert isinstance(caught.value, UserError) == (name in LASTING)
            assert caught.value.errno == number
            message = str(caught.value)
            assert message.endswith(os.strerror(number))
            assert str(tmp_path) in message
            assert ".part" not in message
            assert "\n" not in message
            assert str(copy.copy(caught.value)) == message  # as a worker's error crosses to the driver
    assert storage.read_bytes("a/file") == b"old"
    assert sorted(path.name for path in (tmp_path / "s/a").iterdir()) == ["file"]


@pytest.mark.parametrize("name", ["ESTALE", "ENOTCONN", "ETIMEDOUT"])
def test_reading_listing_and_deleting_on_a_mount_that_is_away_are_storage_faults_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    storage = once(tmp_path)
    storage.write_bytes("a/file", b"old")
    for function in ("open", "stat", "scandir", "unlink"):
        monkeypatch.setattr(storage_file.os, function, failing(getattr(errno, name)))
    for act in (
        lambda: storage.read_bytes("a/file"),
        lambda: storage.exists("a/file"),
        lambda: list(storage.list("a")),
        lambda: storage.delete("a/file"),
    ):
        with pytest.raises(StorageFault, match=os.strerror(getattr(errno, name))):
            act()


def test_a_fault_that_passes_within_the_tries_is_not_noticed_and_a_bad_block_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_file.time, "sleep", pauses.append)
    storage = open_storage(tmp_path)
    fsync = os.fsync
    monkeypatch.setattr(storage_file.os, "fsync", failing(errno.ENOSPC, 3, fsync))
    storage.write_bytes("a/file", b"new")
    assert storage.read_bytes("a/file") == b"new"
    assert len(pauses) == 3
    assert pauses == sorted(pauses)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    monkeypatch.setattr(storage_file.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(StorageFault):
        storage.create_exclusive("a/other", b"new")
    assert len(pauses) == 3 + storage.config.attempts - 1
    pauses.clear()
    monkeypatch.setattr(storage_file.os, "pread", failing(errno.EIO))
    with pytest.raises(StorageFault, match="Input/output error"):
        storage.read_bytes("a/file")
    monkeypatch.setattr(storage_file.os, "fsync", failing(errno.EACCES))
    with pytest.raises(StorageRefused):
        storage.write_bytes("a/file", b"newer")
    assert pauses == []


def test_a_temporary_file_that_cannot_be_cleared_hides_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = once(tmp_path)
    storage.write_bytes("file", b"old")
    monkeypatch.setattr(storage_file.os, "replace", failing(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    with pytest.raises(StorageFault, match=r"cannot write .*/file: Read-only file system"):
        storage.write_bytes("file", b"new")
    assert [file.path for file in storage.list()] == ["file"]


def test_a_disk_without_links_that_fills_up_leaves_no_half_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = once(tmp_path)
    fsync, calls = os.fsync, [0]

    def full_at_the_second(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 2:  # the first is the temporary file's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(storage_file.os, "link", failing(errno.EPERM))
    monkeypatch.setattr(storage_file.os, "fsync", full_at_the_second)
    with pytest.raises(StorageFault):
        storage.create_exclusive("claim", b"mine")
    assert not storage.exists("claim")
    assert storage.create_exclusive("claim", b"mine")
    assert not storage.create_exclusive("claim", b"theirs")


def test_names_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("file", b"")
    with pytest.raises(StorageRefused, match="is not a folder"):
        storage.write_bytes("file/below", b"")
    with pytest.raises(StorageRefused, match="File name too long"):
        storage.write_bytes("x" * 300, b"")


_ON_A_SMALL_DISK = """
import errno, subprocess, sys
from pathlib import Path
from sharding.errors import StorageFault
from sharding.storage import Storage, StorageConfig
root = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", root], check=True)
storage = Storage(StorageConfig(url=str(root / "s"), attempts=1))
source = root.parent / "source"
source.write_bytes(b"x" * 600_000)
storage.write_bytes("there", b"old")
def refused(number):
    for act in (
        lambda: storage.write_bytes("there", b"y" * 300_000),
        lambda: storage.create_exclusive("claim", b"y" * 300_000),
        lambda: storage.upload(source, "up"),
    ):
        try:
            act()
        except StorageFault as error:
            assert error.errno == number, error
            assert "cannot write" in str(error) and ".part" not in str(error), error
        else:
            raise AssertionError("written")
    assert [file.path for file in storage.list()] == ["there"]
    assert sorted(path.name for path in (root / "s").iterdir()) == ["there"]
    assert storage.read_bytes("there") == b"old"
ballast = root / "ballast"
ballast.write_bytes(b"z" * 900_000)
refused(errno.ENOSPC)
ballast.unlink()
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
refused(errno.EROFS)
try:
    storage.delete("there")
except StorageFault as error:
    assert error.errno == errno.EROFS
subprocess.run(["mount", "-o", "remount,rw", root], check=True)
storage.write_bytes("there", b"y" * 300_000)
assert storage.create_exclusive("claim", b"mine") and storage.upload(source, "up").size == 600_000
print("as promised")
"""


def test_a_disk_that_is_full_or_read_only_for_a_while_takes_everything_afterwards(tmp_path: Path) -> None:
    """On a real one, which takes a user who may mount it."""
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small disk of its own needs the right to mount one (root)")
    run = ["unshare", "-m", sys.executable, "-c", _ON_A_SMALL_DISK, str(tmp_path / "disk")]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    if "permission denied" in ended.stderr or "must be superuser" in ended.stderr:
        pytest.skip("a small disk of its own needs the right to mount one (root)")
    assert (ended.stdout, ended.returncode) == ("as promised\n", 0), ended.stderr
