"""The rooms' walls: ``pipeline`` may import the other three, which import neither each other nor ``pipeline``."""

import ast
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
