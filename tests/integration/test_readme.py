"""Every command of the README runs, on a tiny model and a few rows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eetrain.cli import main
from eetrain.testing.byte_level import byte_tokenizer
from eetrain.testing.tiny import FAMILIES, tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, flags=re.S)


def commands(kind):
    return [body for found, body in BLOCKS if found == kind]


def words(body):
    return [shlex.split(line, comments=True) for line in body.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a 10-block backbone, its tokenizer and two CSV files."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "BACKBONE")
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 10, "max_position_embeddings": 512}
    tiny_model("llama", dtype=torch.float32, **sizes).save_pretrained(folder / "BACKBONE")
    for name, count in (("TRAIN.csv", 24), ("VALID.csv", 4)):
        rows = [f'"name[Aromi {n}]","Aromi {n} is a pub."' for n in range(count)]
        (folder / name).write_text("mr,ref\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_the_first_screen_names_the_two_scripts():
    lines = commands("sh")[0].splitlines()
    assert [line.split("#")[0].split() for line in lines] == [["sh", "recipes/quickstart.sh"], ["sh", "tests/run.sh"]]
    for script in ("recipes/quickstart.sh", "recipes/setup.sh", "tests/run.sh", ".ci/run"):
        assert subprocess.run(["sh", "-n", script], cwd=ROOT).returncode == 0


def test_commands_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    lines = words(commands("sh")[1])
    assert [line[1] for line in lines] == [
        *("fit", "export", "generate", "evaluate", "compare", "bench"),
        *("fit", "export", "generate"),
    ]
    for _, verb, *arguments in lines:
        arguments = [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]
        if verb == "fit":
            arguments += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "2"]
        assert main([verb, *arguments]) == 0, capsys.readouterr().err
    assert main(["generate", "halved", "--prompt", "name", "--max_new_tokens", "4", "--json"]) == 0
    assert '"policy": "skipdecode:max=8,min=4,length=26"' in capsys.readouterr().out
    assert "trained to decode under `skipdecode:max=8,min=4,length=26`" in (workplace / "halved/README.md").read_text()
    files = ["exported/exit_heads.safetensors", "tokens.html", "report/frontier.png", "report/results.csv"]
    for written in (*files, "comparison/frontier.png", "times/bench.csv"):
        assert (workplace / written).stat().st_size > 0


def test_commands_for_a_cluster_run(workplace, monkeypatch, capsys):
    """Scripts are rendered and checked; jobs of them run in the tests of Slurm."""
    monkeypatch.chdir(workplace)
    copy, fit, _, array, compare = words(commands("sh")[2])
    assert [copy[0], *(line[1] for line in (fit, array, compare))] == ["cp", "submit", "submit", "compare"]
    (workplace / copy[2]).write_bytes((ROOT / copy[1]).read_bytes())
    for _, verb, *arguments in (fit, array):
        arguments = [str(ROOT / word) if word.startswith(("recipes/", "configs/")) else word for word in arguments]
        assert main([verb, *arguments, "--dry-run"]) == 0, capsys.readouterr().err
        assert "#SBATCH --requeue" in capsys.readouterr().out


def test_commands_on_several_processes_run(workplace, monkeypatch):
    pytest.importorskip("deepspeed", reason="the pipeline needs the extra deepspeed")
    monkeypatch.chdir(workplace)
    lines = words(commands("sh")[3])
    assert [line[1] for line in lines] == ["fit", "fit", "export", "plan"]
    for place, (_, verb, *arguments) in enumerate(lines):
        arguments = [str(ROOT / word) if word.startswith(("recipes/", "configs/")) else word for word in arguments]
        if verb == "fit":
            arguments += ["--trainer.max_steps", str(place + 1), "--trainer.limit_val_batches", "1"]
            arguments += ["--data.batch_size", "4", "--trainer.accelerator", "cpu"]
        ran = subprocess.run([sys.executable, "-m", "eetrain", verb, *arguments], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        if verb == "fit":
            assert "Pipeline: blocks" in ran.stderr
    assert (workplace / "piped" / "exit_heads.safetensors").stat().st_size > 0
    assert "all exits: +0.62 %" in ran.stdout


def test_commands_of_self_speculation_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    lines = words(commands("sh")[4])
    assert [line[1] for line in lines] == ["fit", "export", "generate", "bench", "generate", "fit"]
    for _, verb, *arguments in lines:
        arguments = [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]
        if verb == "fit":
            arguments += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "2"]
        if "--out" in arguments and verb == "generate":
            arguments += ["--max_new_tokens", "8"]
        if verb == "bench":
            arguments += ["--new_tokens", "8"]
        assert main([verb, *arguments]) == 0, capsys.readouterr().err
    for written in ("layerskip/exit_heads.safetensors", "layerskip-times/bench.csv", "said.jsonl"):
        assert (workplace / written).stat().st_size > 0
    assert main(["generate", "layerskip", "--prompt", "name", "--max_new_tokens", "4", "--json"]) == 0
    assert '"policy": "speculative:exit=1,draft=5"' in capsys.readouterr().out


def test_python_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (body,) = commands("python")
    exec(compile(body, "README.md", "exec"), {})
    assert (workplace / "OUT" / "exit_heads.safetensors").exists()


def test_overlays_and_verbs_it_names_exist():
    for path in re.findall(r"configs/[\w/-]+\.yaml|recipes/[\w/.-]+\.(?:yaml|png|sh)", README):
        assert (ROOT / path).exists(), path


def test_the_table_of_families_is_that_of_the_tests():
    table = README.split("## Supported backbones")[1].split("##")[0]
    assert set(re.findall(r"`([\w]+)`", table)) == set(FAMILIES)


@pytest.mark.slow
def test_quickstart_from_this_checkout():
    done = subprocess.run(["sh", "recipes/quickstart.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("report/frontier.png", "report/results.csv", "story.html"):
        assert (ROOT / "runs/quickstart" / name).stat().st_size > 0
