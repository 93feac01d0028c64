import json
from pathlib import Path

import pytest
import torch

from eetrain.cli import main
from eetrain.commands import recipes
from eetrain.commands.ls import ls
from eetrain.commands.recipes import RecipeHeader, read_header
from eetrain.errors import ConfigError

GOOD = """# purpose: train two exits
#   and the backbone
# A free remark.
#   Not part of anything.
# command: eetrain fit -c a.yaml \\
#   --trainer.max_steps 5
# hardware: 2 CPU cores
# minutes: 9
# expected: BLEU 68, NLL: 1.2
model: x
# paper: too late, the header has ended
"""


def test_header_entries_and_their_continuations(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GOOD)
    assert read_header(path) == RecipeHeader(
        purpose="train two exits and the backbone",
        command="eetrain fit -c a.yaml --trainer.max_steps 5",
        hardware="2 CPU cores",
        minutes="9",
        expected="BLEU 68, NLL: 1.2",
        paper=None,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\n", r"lacks purpose, command, hardware, minutes, expected\. HINT: Start the file with .*# purpose:"),
        (GOOD.replace("# minutes: 9\n", "# minutes:\n"), r"a\.yaml: the header lacks minutes\."),
        ("# purpose: again\n" + GOOD, r"the header has purpose twice"),
    ],
)
def test_faulty_headers(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_header(path)


def test_ls_looks_into_subfolders_and_marks_faulty_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text("model: x\n")
    assert ls(str(tmp_path), json=True) == 0
    captured = capsys.readouterr().out
    assert captured.count("\n") == 1
    bad, good = json.loads(captured)["recipes"]
    assert bad["name"] == "bad"
    assert "lacks purpose" in bad["error"]
    assert (good["name"], good["error"], good["expected"]) == ("sub/good", None, "BLEU 68, NLL: 1.2")
    assert ls(str(tmp_path)) == 0
    table = capsys.readouterr().out
    assert "sub/good" in table
    assert "ERROR: " in table


def test_ls_without_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"There are no recipes in .* HINT: Name a folder"):
        ls(str(tmp_path))
    with pytest.raises(ConfigError, match="There is no folder"):
        ls(str(tmp_path / "missing"))
    package = tmp_path / "site-packages" / "eetrain" / "__init__.py"
    monkeypatch.setattr(recipes.eetrain, "__file__", str(package))
    with pytest.raises(ConfigError, match=r"installed without its recipes\. HINT: They come with the repository"):
        ls()


def test_doctor_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLANTED_TOKEN", "s3cret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = main(["doctor", "--json"])
    captured = capsys.readouterr().out
    assert captured.count("\n") == 1
    assert "s3cret" not in captured
    found = json.loads(captured)
    checks = {check["name"]: check for check in found["checks"]}
    assert len(checks) == len(found["checks"]), "each has a name of its own"
    assert status == (0 if found["ready"] else 1)
    assert found["ready"] == all(check["state"] != "error" for check in found["checks"])
    assert all(set(check) == {"name", "found", "state", "hint"} for check in found["checks"])
    assert checks["torch"]["found"] == found["versions"]["torch"] == torch.__version__
    assert checks["run folder"]["found"] == str(tmp_path)
    expected = {"python", "lightning", "deepspeed", "wandb", "cuda", "cores", "memory", "launch", "variables"}
    assert expected | {"backends", "all-reduce", "disk", "writing", "renaming", "locks", "clock"} < set(checks)
    assert found["launch"]["launcher"] == "plain"
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["measured"]["writing"]["write_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == [], "the write test leaves nothing"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher: fits of other tests, of one process of many, leave their variables in this process."""
    launch = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in (*launch, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_doctor_fails_where_nothing_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run", "/proc/eetrain"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("not ready: disk, ")
    assert lines[0].endswith("writing")
    assert any("Set a folder by --run that you may write to" in line for line in lines)
    assert any("/proc/eetrain is not there yet; a fit makes it in /proc" in line for line in lines)


def test_doctor_is_told_of_a_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--recipe", "nothing.yaml"]) == 2
    assert "There is no file 'nothing.yaml'.\nHINT: Give the YAML file of a run" in capsys.readouterr().err


def test_only_the_first_process_of_a_node_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--json"]) == 0
    assert capsys.readouterr().out == ""
