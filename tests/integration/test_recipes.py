"""Every recipe says what it is, parses with the present settings, and names no path outside the repository."""

import re
from pathlib import Path

import pytest

from eetrain.cli import main
from eetrain.commands.recipes import read_header

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
names = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]


def test_their_number():
    assert names == [
        "e2e/ee_tuning.yaml",
        "e2e/eesd.yaml",
        "e2e/joint_gating.yaml",
        "e2e/layerskip.yaml",
        "e2e/multi_exit.yaml",
        "e2e/skipdecode.yaml",
        "e2e/skipdecode_range.yaml",
        "quickstart/exits.yaml",
        "quickstart/pretrain.yaml",
        "shakespeare/layerskip.yaml",
        "shakespeare/pretrain.yaml",
        "shakespeare/skipdecode.yaml",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_header(path):
    header = read_header(path)
    assert header.paper
    assert header.minutes.isdigit()
    assert re.search(r"\d", header.expected)
    if header.command.startswith("eetrain"):
        assert f"-c recipes/{path.relative_to(ROOT / 'recipes')}" in header.command


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_parses(path, capsys):
    arguments = ["fit", "-c", str(path), "--data.tokenizer", "TOKENIZER", "--data.train", "TRAIN.csv"]
    if "config:" not in path.read_text(encoding="utf-8"):
        arguments += ["--model.backbone.path", "BACKBONE"]
    assert main([*arguments, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "max_steps: " in printed
    assert "TRAIN.csv" in printed


@pytest.mark.parametrize("path", [path for path in (ROOT / "recipes").rglob("*") if path.is_file()], ids=str)
def test_no_path_outside(path):
    if path.suffix in (".yaml", ".sh", ".py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""["'\s=](/(?!bin/sh)\w+/|\.\./\.\./|~/)""", text), path
