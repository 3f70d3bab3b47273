"""Which modules a command and its processes import: glscl's own packages, and nothing that lies in the current folder.

A user's folder may hold a ``model.py``, ``pipeline.py`` or ``statistics.py``. Python puts the current folder first on
the path of ``python -m`` and ``python -c`` (as the fork servers of loader processes are started), and Ray puts it
first on the path of every worker. Imports nothing but what Python has loaded by itself when it starts: whatever is
imported before :func:`leave_current_folder_out` may still come from the current folder.
"""

from __future__ import annotations

import os
import sys

#: Folder of glscl's packages: a checkout, ``site-packages``, or what a submitted job was sent as.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ("pipeline", "model", "sharding", "cluster")
#: Variable with the folder that the command was called in: `custom` filters are looked for there.
FOLDER_VARIABLE = "GLSCL_FOLDER"


def leave_current_folder_out() -> None:
    """For this process and all that it starts; to be called first by whatever is an entry point.

    Classes of ``custom`` filters are found all the same: ``sharding.filters`` puts the folder last on the path.
    Folders of ``PYTHONPATH`` other than the current one stay.
    """
    installed = _installed()
    kept = [entry for entry in sys.path if entry and (_real(entry) in installed or not _is_here(entry))]
    # glscl's packages have names that other folders of the path may have as well.
    sys.path[:] = kept if _real(ROOT) in installed else [ROOT, *(entry for entry in kept if entry != ROOT)]
    os.environ.update(child_environment())


def child_environment() -> dict[str, str]:
    """Variables with which Pythons that this process starts keep the current folder off their path."""
    installed = _installed()
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in given if entry and (_real(entry) in installed or not _is_here(entry))]
    if _real(ROOT) not in installed:
        kept = [ROOT, *(entry for entry in kept if entry != ROOT)]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(kept)}


def current_folder() -> str:
    """The current folder; empty where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def shadowed() -> str | None:
    """The file that Python would import in place of one of glscl's packages; None where there is none.

    The one case that :func:`leave_current_folder_out` cannot mend: a folder of PYTHONPATH before an installed glscl.
    """
    from importlib.machinery import PathFinder

    for name in PACKAGES:
        found = PathFinder.find_spec(name, sys.path)
        if found is not None and found.origin is not None and not _is_own(found.origin):
            return found.origin
    return None


def _is_own(origin: str) -> bool:
    return _real(origin).startswith(_real(ROOT) + os.sep)


def _installed() -> set[str]:
    """Folders that are Python's own, the current one or not."""
    import site

    return {_real(folder) for folder in (*site.getsitepackages(), os.path.dirname(os.__file__))}


def _is_here(entry: str) -> bool:
    """Whether an entry of the path is the current folder, and glscl's packages do not lie there."""
    here = current_folder()
    return bool(here) and _real(entry) == _real(here) != _real(ROOT)


def _real(path: str) -> str:
    return os.path.realpath(path)
