"""The rooms' walls: ``pipeline`` may import the other three, which import neither each other nor ``pipeline``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"pipeline", "model", "sharding", "cluster"}
ALLOWED = {room: {room} for room in ROOMS} | {"pipeline": ROOMS}


def imported_rooms(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute in this project"
            names.add((node.module or "").split(".")[0])
    return names & ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        assert imported_rooms(file) <= ALLOWED[room], f"{file} reaches into another room"


def test_the_driver_s_modules_leave_torch_to_the_workers() -> None:
    """A mistake in a job is told, and data are prepared, before anything waits for torch to be imported."""
    code = "import pipeline.job, pipeline.cli, sys; print(sorted({'torch', 'transformers', 'mlflow'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
