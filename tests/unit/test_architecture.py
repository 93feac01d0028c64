"""Decisions about the architecture, kept by tests: who may import whom, and what the top level holds."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eetrain"

# Each room with the rooms it may import. Modules beside the rooms are open to all.
OPEN = {"errors", "cli_errors", "shorthand"}
ALLOWED = {
    "schedules": set(),
    "backbones": set(),
    "exits": {"backbones"},
    "objectives": {"schedules", "backbones", "exits"},
    "data": set(),
    "decoding": {"schedules", "backbones", "exits"},
    "cluster": set(),
    "training": {"backbones", "exits", "objectives", "data", "cluster"},
    "planning": {"backbones", "exits", "training"},
    "parallel": {"backbones", "exits", "objectives", "planning", "training", "cluster"},
    "checkpoints": {"backbones", "exits", "decoding", "training"},
    "evaluation": {"backbones", "exits", "decoding", "data", "viewing"},
    "diagnosis": {"backbones", "exits", "cluster", "training", "planning", "evaluation", "testing"},
    "viewing": {"decoding"},
    "testing": set(),
}
# The model offers generate and save_pretrained; it imports the rooms behind them when they are called.
LAZY = {("exits", "decoding"), ("exits", "checkpoints")}


def imports(path: Path, *, module_level: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    nodes = tree.body if module_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("eetrain.")}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_downwards_only(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        top = imports(file, module_level=True) - OPEN - {room}
        assert top <= ALLOWED[room], f"{file.name} imports {top - ALLOWED[room]}"
        deep = imports(file, module_level=False) - OPEN - {room} - ALLOWED[room]
        assert {(room, other) for other in deep} <= LAZY, f"{file.name} imports {deep}"


def test_every_room_is_listed():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {*ALLOWED, "commands"}


def test_top_level_holds_the_seven_entries():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    names = {line.split("/")[0] for line in listed if line}
    if not names:
        pytest.skip("not a git checkout")
    assert {name for name in names if not name.startswith(".")} <= {
        "pyproject.toml", "eetrain", "recipes", "configs", "tests", "slurm", "README.md", "LICENSE"
    }  # fmt: skip


def test_importing_the_package_loads_no_torch():
    code = "import sys, eetrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_trust_in_foreign_code_by_default():
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, file
        for call in re.findall(r"torch\.load\(.*?\)\n", text, flags=re.S):
            assert "weights_only=True" in call, file
        if "testing" not in file.parts:  # which hands results between processes of its own
            assert not re.search(r"pickle\.loads?\(", text), file
