"""Opens the public packages that the corpora come from: npm tarballs and one Debian package.

Members are read by name into memory and never extracted by their path: a hostile archive can write nothing.
"""

import contextlib
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.errors import UserError

LARGEST_MEMBER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry at one pinned version."""

    name: str
    version: str

    @property
    def specification(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """The file name `npm pack` gives: the scope's @ is dropped and its slash becomes a dash."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


class PackageError(UserError):
    """A package could not be fetched or is not what it should be; the message is one line for the user."""


def _run(command: list[str], folder: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PackageError(f"cannot fetch {what}: the program {command[0]!r} is not installed") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise PackageError(f"cannot fetch {what}: {command[0]} said: {lines[0].strip()}")


@contextlib.contextmanager
def npm_tarball(package: NpmPackage, packages: Path | None) -> Iterator[Path]:
    """The tarball: from the folder `packages`, or from the registry for as long as the block runs."""
    if packages is not None:
        path = packages / package.tarball
        if not path.is_file():
            raise PackageError(f"{path} does not exist; put it there with `npm pack {package.specification}`")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="glscl-package-") as folder:
        command = ["npm", "pack", "--ignore-scripts", package.specification]
        _run(command, Path(folder), package.specification)
        yield Path(folder) / package.tarball


@contextlib.contextmanager
def debian_package(name: str, packages: Path | None) -> Iterator[Path]:
    """The `.deb` of a Debian package, out of the folder `packages` or by `apt-get download`."""
    with contextlib.ExitStack() as stack:
        folder = packages
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glscl-package-")))
            _run(["apt-get", "download", name], folder, name)
        found = sorted(folder.glob(f"{name}_*.deb"))
        if not found:
            raise PackageError(
                f"there is no {name}_*.deb in {folder}; put it there with `apt-get download {name}`"
            )
        yield found[-1]


def _members(archive: tarfile.TarFile, names: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        name = str(PurePosixPath(member.name))
        if not member.isreg() or ".." in PurePosixPath(name).parts or not names.fullmatch(name):
            continue  # names become paths in a storage
        if member.size > LARGEST_MEMBER_BYTES:
            raise PackageError(
                f"{name} in the package is {member.size} bytes, more than any file of it should have"
            )
        stream = archive.extractfile(member)
        assert stream is not None  # isreg() above
        yield name, stream.read()


def npm_members(tarball: Path, names: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members whose whole name matches the pattern, in the tarball's order.

    Raises PackageError when the tarball is damaged.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            yield from _members(archive, re.compile(names))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PackageError(f"{tarball} is damaged: {error}") from error


def npm_names(tarball: Path, names: str) -> list[str]:
    """The names of the members whose whole name matches the pattern, without reading their content."""
    pattern = re.compile(names)
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            return [member.name for member in archive if member.isreg() and pattern.fullmatch(member.name)]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PackageError(f"{tarball} is damaged: {error}") from error


def npm_member(tarball: Path, name: str) -> bytes:
    """The content of one member. Raises PackageError when it is missing."""
    for _, data in npm_members(tarball, re.escape(name)):
        return data
    raise PackageError(f"{tarball} holds no {name}")


def npm_json(tarball: Path, name: str) -> Any:
    return json.loads(npm_member(tarball, name))


def debian_members(package: Path, names: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the package's files whose whole name matches the pattern, in the package's order."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpack:
        assert unpack.stdout is not None
        try:
            with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
                yield from _members(archive, re.compile(names))
        except tarfile.TarError as error:
            raise PackageError(f"{package} is damaged: {error}") from error
        finally:
            unpack.stdout.close()
            unpack.wait()
