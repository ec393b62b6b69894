"""The rooms of `ard` are those of docs/architecture.md, and imports point down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import ard
import pytest

ROOT = Path(ard.__file__).parent
DOC = Path(__file__).parents[2] / "docs" / "architecture.md"


def planned() -> list[str]:
    """The rooms in the table of docs/architecture.md, lowest first."""
    return re.findall(r"^\| `(\w+)/` \|", DOC.read_text().partition("## The trainer")[2], re.M)


def imported_rooms(path: Path) -> set[str]:
    """First names below `ard` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ard":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ard."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ard.")}
    return found


def test_the_plan_is_the_folders():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(planned()) == folders - {"configs"} and len(planned()) == len(folders) - 1


@pytest.mark.parametrize("room", planned())
def test_no_import_from_a_lower_room_to_a_higher_one(room):
    rooms = planned()
    for path in sorted((ROOT / room).rglob("*.py")):
        imported = imported_rooms(path)
        assert imported <= set(rooms), f"{path} imports what is no room: {imported - set(rooms)}"
        higher = {other for other in imported if rooms.index(other) > rooms.index(room)}
        assert not higher, f"{path} imports {higher} from above"


def test_no_file_is_long():
    long = {
        str(path.relative_to(ROOT)): n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long
