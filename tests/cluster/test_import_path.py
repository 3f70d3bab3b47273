"""Whatever lies in the current folder, glscl imports its own packages, Python's and the installed ones.

Processes of their own: what is tried is how Python starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import import_path

ROOT = Path(__file__).parents[2]
#: The way the installed command comes in.
SCRIPT = "import sys\nfrom glscl_pipeline import main\nsys.exit(main())\n"
#: Of Python's own, but for those that Python itself imports while it starts.
STANDARD = ("statistics", "random", "queue", "selectors", "struct", "tempfile", "logging", "json", "typing")
OURS = ("model", "sharding", "cluster/__init__", "pipeline")
INSTALLED = ("torch", "yaml", "typer", "rich", "pydantic")

# As a command does: then a fork server (loader processes), a spawned process and a plain child.
CHILDREN = """
import sys
sys.path.insert(0, {root!r})
from cluster import import_path
sys.path.remove({root!r})
import_path.leave_current_folder_out()
import multiprocessing, subprocess

def told():
    import queue, random, statistics, model, sharding
    print(sys.path, flush=True)

if __name__ == "__main__":
    for way in ("forkserver", "spawn"):
        process = multiprocessing.get_context(way).Process(target=told)
        process.start()
        process.join()
        assert process.exitcode == 0, way
    subprocess.run([sys.executable, "-c", "import queue, random, statistics, model, sharding"], check=True)
"""


def users_folder(folder: Path, names: tuple[str, ...]) -> Path:
    """Modules that leave a line in ``seen`` when they are imported, and are of no use."""
    for name in names:
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"open({str(folder / 'seen')!r}, 'a').write('{name} ')\nraise TypeError('not yours')\n"
        )
    return folder


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=clean | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("names", "command", "variables"),
    [
        ((*OURS, *STANDARD, *INSTALLED), ["SCRIPT"], {}),
        # What Python itself or the packages' .pth files need cannot be hidden from it and work.
        ((*OURS, *INSTALLED, "statistics"), ["SCRIPT"], {"PYTHONPATH": "."}),
        ((*OURS, *INSTALLED, "statistics"), ["SCRIPT"], {"PYTHONPATH": f"FOLDER{os.pathsep}"}),
        # `python -m pipeline` would itself be the user's pipeline.py.
        ((*OURS[:3], *STANDARD[:-1], *INSTALLED), ["-m", "pipeline"], {}),
        ((*OURS[:3], *STANDARD[:-1], *INSTALLED), ["-m", "pipeline.cli"], {"PYTHONSAFEPATH": "1"}),
    ],
)
def test_the_command_imports_nothing_of_the_current_folder(
    names: tuple[str, ...], command: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    folder = users_folder(tmp_path / "work", names)
    script = tmp_path / "bin" / "glscl"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = run(
        folder,
        *(part.replace("SCRIPT", str(script)) for part in command),
        "submit",
        "--help",
        **{name: value.replace("FOLDER", str(folder)) for name, value in variables.items()},
    )
    assert done.returncode == 0, done.stdout
    assert "Send a job to a running Ray cluster" in done.stdout
    assert not (folder / "seen").exists(), (folder / "seen").read_text()


@pytest.mark.parametrize("variables", [{}, {"PYTHONPATH": "."}])
def test_processes_that_it_starts_import_nothing_of_it_either(
    variables: dict[str, str], tmp_path: Path
) -> None:
    names = (*OURS, *INSTALLED, *(STANDARD[:6] if not variables else ("statistics",)))
    folder = users_folder(tmp_path / "work", names)
    script = tmp_path / "script.py"
    script.write_text(CHILDREN.format(root=str(ROOT)))
    done = run(folder, str(script), **variables)
    assert done.returncode == 0, done.stdout
    assert str(folder) not in done.stdout
    assert not (folder / "seen").exists(), (folder / "seen").read_text()


def test_folders_of_pythonpath_other_than_the_current_one_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", str(other), "", str(tmp_path)]))
    monkeypatch.setattr(import_path, "_installed", lambda: {str(ROOT)})
    assert import_path.child_environment() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(other)}
    monkeypatch.setattr(import_path, "_installed", set)  # a checkout
    assert import_path.child_environment()["PYTHONPATH"] == os.pathsep.join([str(ROOT), str(other)])


def test_the_folder_of_the_packages_stays_where_it_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    import_path.leave_current_folder_out()
    assert sys.path[0] == str(ROOT)
    assert "" not in sys.path


def test_a_folder_that_hides_an_installed_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout the packages come first; installed, what PYTHONPATH names comes before them."""
    assert import_path.shadowed() is None
    monkeypatch.setattr(sys, "path", [str(users_folder(tmp_path, ("sharding",))), *sys.path])
    assert import_path.shadowed() == str(tmp_path / "sharding.py")
    assert not (tmp_path / "seen").exists()
