"""The files in slurm/: what stands in their #SBATCH lines, and what they start, word by word."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from eetrain.cluster.batch_script import Resources, folder_options, quoted, render, site_options, site_settings
from eetrain.cluster.site import Site

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "slurm").rglob("*") if path.is_file())
TEMPLATES = [path for path in FILES if path.suffix == ".sbatch"]
# Every option of the templates and of a full site, with what its value looks like.
OPTIONS = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "time": r"[\d:-]+",
    "signal": r"SIGUSR1@\d+",
    "requeue": "",
    "open-mode": "append",
    "output": r'("/[^"]+/)?(slurm-)?%(j|A_%a)\.log"?',
    "array": r"0-\d+",
    "chdir": r'"/[^"]*"',
    "partition": r"\w+",
    "account": r"\w+",
    "qos": r"\w+",
    "constraint": r"\w+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\w+",
    "exclusive": "",
}
# Commands that write variables or every line they run.
SHOWING = re.compile(
    r"\b(set|bash|sh)\b.* -[a-z]*[xv]|\bprintenv\b|\b(declare|export|typeset) -p\b|^\s*(env|set)\s*($|[|>&;])", re.M
)
FULL = Site(
    partition="gpu", account="a", qos="q", constraint="c", gpu_type="a100", cpus_per_task=8, memory="0",
    sbatch=("--exclusive",), environment={"NAME": "value"}, setup=("true",), caches="$HOME/caches",
)  # fmt: skip

SRUN = """#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
with open("srun.json", "w") as file:
    json.dump({{"srun": sys.argv[1 : len(sys.argv) - len(words)], "omp": os.environ["OMP_NUM_THREADS"],
               "cpus": os.environ.get("SRUN_CPUS_PER_TASK")}}, file)
sys.exit(subprocess.run(words).returncode)
"""
TASK = """#!{python}
import json, os, signal, sys
with open("task.json", "w") as file:
    json.dump({{"words": sys.argv[1:], "ignored": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN}}, file)
sys.exit(int(os.environ.get("TASK_STATUS", "0")))
"""
JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
ARRAY = {**JOB, "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "1"}
NASTY = "a 'b' \"c\"\n$(touch made) `touch made` \\ $HOME *"


def rendered(name: str) -> str:
    own, log, lines = {"signal": "SIGUSR1@60"}, "%j.log", ["config=c", "run=r"]
    if name == "eval_array.sbatch":
        own, log, lines = {"array": "0-3"}, "%A_%a.log", ["config=c", "out=o", "policies=(a b c d)"]
    options = {**site_options(FULL, Resources(2, 4, "1-0")), **own}
    options |= folder_options(Path("/r u n/slurm"), log, Path("/w"))
    return render((ROOT / "slurm" / name).read_text(), options, [*site_settings(FULL), *lines])


SCRIPTS = {path.name: path.read_text() for path in TEMPLATES}
SCRIPTS |= {f"rendered {path.name}": rendered(path.name) for path in TEMPLATES}


def test_their_number() -> None:
    assert [str(path.relative_to(ROOT / "slurm")) for path in FILES] == [
        "eval_array.sbatch",
        "site.yaml",
        "train.sbatch",
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_sbatch_line(name: str) -> None:
    lines = SCRIPTS[name].splitlines()
    commands = [number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    marked = [number for number, line in enumerate(lines) if "SBATCH" in line and not re.match(r"# ", line)]
    assert lines[0] == "#!/bin/bash"
    assert len(marked) == 8 + (9 if "rendered" in name else 0)
    assert max(marked) < min(commands), "Slurm reads no #SBATCH line after the first command"
    found = {}
    for number in marked:
        line = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.+))?", lines[number])
        assert line, lines[number]
        assert line[1] not in found, "each option once"
        assert re.fullmatch(OPTIONS[line[1]], line[2] or ""), lines[number]
        found[line[1]] = line[2]
    assert not any("$" in (value or "") for value in found.values()), "Slurm expands no variables"
    assert {"nodes", "ntasks-per-node", "time", "requeue", "open-mode", "output"} <= set(found)
    assert ("signal" in found, "array" in found) == ((False, True) if "eval_array" in name else (True, False))


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_shows_the_environment(name: str) -> None:
    commands = "\n".join(line for line in SCRIPTS[name].splitlines() if not line.startswith("#"))
    assert "set -euo pipefail" in commands
    assert not SHOWING.search(commands)
    for line in ("set -eux", "env | sort", "  printenv HOME", "bash -x a", "declare -p", "set", "export -p >log"):
        assert SHOWING.search(f"{commands}\n{line}\n"), line
    assert not re.search(r"--ntasks\b(?!-)|\btorchrun\b|\bpython -m torch", commands)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    path = tmp_path / "job.sbatch"
    path.write_text(SCRIPTS[name])
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with an srun that runs one task, a scontrol and an interpreter that keep what they were given."""
    (tmp_path / "bin").mkdir()
    programs = {"bin/srun": SRUN, "bin/task": TASK}
    for name, text in programs.items():
        (tmp_path / name).write_text(text.format(python=sys.executable))
    (tmp_path / "bin/scontrol").write_text('#!/bin/sh\necho "$*" >scontrol.txt\nexit "${SCONTROL_STATUS:-0}"\n')
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    return tmp_path


def run(work: Path, script: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = work / "job.sbatch"
    path.write_text(script)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
    path_variable = f"{work}/bin:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", path, *words],
        cwd=work,
        env={**clean, "PATH": path_variable, "HF_TOKEN": "planted", **environ},
        capture_output=True,
        text=True,
    )


def kept(work: Path, name: str) -> Mapping[str, object]:
    found: Mapping[str, object] = json.loads((work / name).read_text())
    return found


def test_train_by_itself(work: Path) -> None:
    given = {"RECIPE": f"{NASTY}.yaml", "RUN": "my run's", "PYTHON": "task"}
    done = run(work, SCRIPTS["train.sbatch"], "--data.train", NASTY, "--x=", **given, **JOB)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    fit = ["-m", "eetrain", "fit", "-c", f"{NASTY}.yaml", "--run", "my run's", "--resume", "auto"]
    sizes = ["--trainer.num_nodes", "2", "--trainer.devices", "4"]
    assert kept(work, "task.json") == {"words": [*fit, *sizes, "--data.train", NASTY, "--x="], "ignored": True}
    assert kept(work, "srun.json") == {"srun": ["--export=ALL", "--kill-on-bad-exit=1"], "omp": "1", "cpus": None}
    assert not (work / "scontrol.txt").exists()
    assert not (work / "made").exists()


def test_train_as_submit_fills_it_in(work: Path) -> None:
    site = Site(python="task", cpus_per_task=3, environment={"NAME": NASTY.replace("$HOME", "")})
    lines = [*site_settings(site), f"config={quoted(work / NASTY)}", f"run={quoted(NASTY)}"]
    done = run(work, render(SCRIPTS["train.sbatch"], {}, lines), **JOB, SLURM_CPUS_PER_TASK="3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    words = kept(work, "task.json")["words"]
    assert isinstance(words, list)
    assert words[3:9] == ["-c", f"{work}/{NASTY}", "--run", NASTY, "--resume", "auto"]
    assert kept(work, "srun.json")["omp"] == kept(work, "srun.json")["cpus"] == "3"
    assert not (work / "made").exists()


def test_each_task_of_an_array_has_its_policy(work: Path) -> None:
    given = {"CONFIG": "e.yaml", "OUT": "my out", "POLICIES": "never gate:0.4+0.5,cost_weight=1", "PYTHON": "task"}
    done = run(work, SCRIPTS["eval_array.sbatch"], "--limit", "3", **given, **ARRAY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    own = ["--policies", "gate:0.4+0.5,cost_weight=1", "--out", "my out/1-gate-0.4-0.5-cost_weight-1", "--limit", "3"]
    words = ["-m", "eetrain", "evaluate", "-c", "e.yaml", *own]
    assert kept(work, "task.json") == {"words": words, "ignored": True}
    beyond = run(work, SCRIPTS["eval_array.sbatch"], **given, **{**ARRAY, "SLURM_ARRAY_TASK_ID": "2"})
    assert beyond.returncode != 0
    assert "the array has more tasks than there are policies" in beyond.stderr


@pytest.mark.parametrize("status", [1, 2, 75, 130, 143])
@pytest.mark.parametrize(("name", "job"), [("train.sbatch", "12"), ("eval_array.sbatch", "11_1")])
def test_only_status_75_is_requeued(work: Path, name: str, job: str, status: int) -> None:
    given = {"RECIPE": "r", "RUN": "r", "CONFIG": "e", "OUT": "o", "POLICIES": "a b", "PYTHON": "task"}
    done = run(work, SCRIPTS[name], **given, **ARRAY, TASK_STATUS=str(status))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    if status == 75:
        assert (work / "scontrol.txt").read_text() == f"requeue {job}\n"
    else:
        assert not (work / "scontrol.txt").exists()
    failed = run(work, SCRIPTS[name], **given, **ARRAY, TASK_STATUS=str(status), SCONTROL_STATUS="1")
    assert failed.returncode == status
    assert ("could not be requeued" in failed.stderr) is (status == 75)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("train.sbatch", "RECIPE", "RECIPE: name the recipe"),
        ("train.sbatch", "RUN", "RUN: name the folder of the run"),
        ("eval_array.sbatch", "POLICIES", "POLICIES: name the policies"),
    ],
)
def test_what_is_missing_is_named(work: Path, name: str, missing: str, message: str) -> None:
    given = {"RECIPE": "r", "RUN": "r", "CONFIG": "e", "OUT": "o", "POLICIES": "a b", "PYTHON": "task"}
    del given[missing]
    done = run(work, SCRIPTS[name], **given, **ARRAY)
    assert done.returncode != 0
    assert message in done.stderr
    assert "planted" not in done.stderr
    assert not (work / "srun.json").exists()
