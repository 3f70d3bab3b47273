"""What ``glscl`` takes from the environment before anything else, made such that libraries can live with it.

Ray, MLflow, rich and typer read variables of the terminal and the home directory as they come, some while they are
imported, and end in a traceback where one is empty, no number, or missing.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import pwd
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sharding.errors import UserError

logger = logging.getLogger(__name__)

_NARROWEST, _WIDEST = 100, 1000
_SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
_LOGIN_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


def settle_output() -> None:
    """Standard output and error take every character, and the variables of their size are sizes or not there."""
    for name in _SIZES:
        if name in os.environ and (size := _size(os.environ.pop(name))):
            os.environ[name] = str(size)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the command
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # what the encoding lacks, and halves of surrogate pairs


def settle_home() -> None:
    """A current and a home directory, and a name of the user, as Ray and MLflow ask for at import.

    A home that is not there is made up for the time of this process and those it starts, which is said.

    Raises:
        UserError: the current directory is gone, or there is no place for a home.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current directory cannot be used ({error.strerror}): change to another"
        ) from None
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        entry = None
    if entry is None and not any(os.environ.get(name) for name in _LOGIN_NAMES):
        os.environ["USER"] = str(os.getuid())
    home = os.environ.get("HOME", "")
    for place in (home, entry.pw_dir if entry is not None else ""):
        if place and os.path.isdir(place):
            os.environ["HOME"] = os.path.abspath(place)
            return
    why = f"{home!r}, which HOME says, is no folder" if home else "HOME is not set"
    try:
        made_up = tempfile.mkdtemp(prefix="glscl-home-")
    except OSError as error:
        raise UserError(f"{why}, and no folder can be made in its place ({error}): set HOME") from None
    atexit.register(_remove, Path(made_up), os.getpid())
    os.environ["HOME"] = made_up
    logger.warning("%s: %s is in its place for this command", why, made_up)


def columns() -> int:
    """Width of the output where it is no terminal: 100, or what COLUMNS says above that."""
    return max(_NARROWEST, _size(os.environ.get("COLUMNS", "")))


def _size(text: str) -> int:
    """A number of columns or lines; 0 where the text is none."""
    found = re.fullmatch(r"\+?0*([0-9]{1,9})", text.strip(), re.ASCII)
    return min(int(found[1]), _WIDEST) if found else 0


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child ends before its parent
        shutil.rmtree(folder, ignore_errors=True)
