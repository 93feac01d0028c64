"""`eetrain submit` from the command line. A real Slurm takes what it writes in tests/slurm; here sbatch is a script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_checkpoint import write_checkpoint

from eetrain.cli import main, with_rest
from eetrain.commands import submit_jobs
from eetrain.commands.evaluate import evaluate
from eetrain.commands.submit import submit
from eetrain.testing.runs import write_run

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "configs" / "strategy" / "pipeline.yaml"
EVALUATIONS = sorted((ROOT / "configs" / "evaluation").rglob("*.yaml"))
CPU = "gpu_request: none\nsignal_seconds: 60\npython: task\n"
SBATCH = """#!/bin/sh
printf '%s\\n' "$@" >>sbatch.txt
case "$1" in --test-only) cat >checked.txt; cat refusal.txt >&2 2>/dev/null && exit 1; exit 0;; esac
echo 4711
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("submitted"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: with a site file, and an sbatch on PATH."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(CPU)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main(["submit", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def error_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[str, str]:
    """What stands after ``error:`` and ``HINT:``."""
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, "")
    message, hint = err.splitlines()
    return message.removeprefix("error: "), hint.removeprefix("HINT: ")


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def started(work: Path, script: str, **environ: str) -> list[str]:
    """The words that the script starts a task with."""
    programs = {
        "srun": '#!/bin/sh\nwhile case "$1" in --*) true;; *) false;; esac; do shift; done\nexec "$@"\n',
        "task": f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('words.json', 'w'))\n",
    }
    for name, text in programs.items():
        (work / "bin" / name).write_text(text)
        (work / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", **environ}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    subprocess.run(["bash"], input=script, env={**clean, **job}, text=True, check=True)
    words: list[str] = json.loads((work / "words.json").read_text())
    return words


def test_a_fit_is_checked_written_and_submitted(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--nodes", "2", "--gpus", "4", "--time", "1-0", "--site", "site.yaml", "--run", "my runs/100%"]
    further = ["-c", PIPELINE, "--trainer.max_steps=7", "--model.exits.layers", "[2]"]
    status, out, err = call(capsys, base, *flags, *further)
    folder = work / "my runs" / "100%" / "slurm"
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "job      4711",
        f"log      {folder}/4711.log",
        f"script   {folder}/job.sbatch",
        f"config   {folder}/config.yaml",
        "watch    squeue -j 4711",
        "cancel   scancel 4711",
    ]
    script = (folder / "job.sbatch").read_text()
    assert (work / "sbatch.txt").read_text() == f"--test-only\n--parsable\n{folder}/job.sbatch\n"
    assert (work / "checked.txt").read_text() == script
    assert options_of(script) == {
        **{"job-name": "eetrain-100-", "nodes": "2", "ntasks-per-node": "4", "time": "1-0", "signal": "SIGUSR1@60"},
        **{"requeue": "", "open-mode": "append", "chdir": f'"{work}"'},
        "output": f'"{work}/my runs/100%%/slurm/%j.log"',
    }
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["exits"]["layers"] == [2]
    assert config["trainer"]["strategy"]["class_path"] == "eetrain.parallel.PipelineStrategy"
    assert (config["trainer"]["max_steps"], config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (7, 4, 2)
    words = ["-m", "eetrain", "fit", "-c", f"{folder}/config.yaml", "--run", f"{work}/my runs/100%", "--resume", "auto"]
    assert started(work, script) == [*words, "--trainer.num_nodes", "2", "--trainer.devices", "4"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "job.sbatch"]


def test_the_resolved_configuration_is_that_of_the_fit(
    base: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = "a 'b' \"c\"\n{text} \\ #"
    template = {"class_path": "eetrain.data.PromptResponse", "init_args": {"prompt": nasty, "response": "{text}"}}
    settings = [f"--data.template={json.dumps(template)}", "--model.optimizer.lr", "1e-5"]
    assert call(capsys, base, "--site", "site.yaml", *settings, "--run", "r")[0] == 0
    assert main(["fit", "-c", "r/slurm/config.yaml", "--print_config"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert main(["fit", "-c", str(base), *settings, "--print_config", "--run", "r"]) == 0
    direct = yaml.safe_load(capsys.readouterr().out)
    assert again["data"]["template"]["init_args"]["prompt"] == nasty
    assert again.pop("trainer") == {**direct.pop("trainer"), "devices": 1, "num_nodes": 1}
    assert again == direct


def test_the_run_of_the_recipe_and_sizes_that_give_way(
    base: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--trainer.devices", "8", "--trainer.num_nodes=3"]
    status, out, err = call(capsys, base, "--site", "site.yaml", "--gpus", "2", *sizes, "--json")
    assert status == 0
    assert err == ""
    assert out.count("\n") == 1, "one JSON object and nothing else"
    folder = base.parent / "run" / "slurm"
    assert json.loads(out) == {
        "job": "4711",
        "log": f"{folder}/4711.log",
        "script": f"{folder}/job.sbatch",
        "config": f"{folder}/config.yaml",
        "watch": "squeue -j 4711",
        "cancel": "scancel 4711",
        "compare": None,
        "notes": [
            "trainer.devices=8 of the recipe gives way to --gpus 2.",
            "trainer.num_nodes=3 of the recipe gives way to --nodes 1.",
        ],
    }
    trainer = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (2, 1)
    for same in (["--trainer.devices=2"], ["--trainer.devices=auto"], ["--trainer.devices=-1"]):
        assert call(capsys, base, "--site", "site.yaml", "--gpus", "2", *same, "--time", "0")[2] == (
            "note: --time 0 is no limit, so no signal to save comes before the end.\n"
        )


def test_a_dry_run_shows_the_script_and_leaves_no_trace(
    base: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [base, "--site", "site.yaml", "--run", "dry", "--dry-run"]
    status, script, err = call(capsys, *words)
    assert (status, err) == (0, "note: sbatch --test-only takes it; nothing is written or submitted.\n")
    assert script.startswith("#!/bin/bash\n# Trains as a Slurm job")
    assert options_of(script)["output"] == f'"{work}/dry/slurm/%j.log"'
    assert (work / "sbatch.txt").read_text() == "--test-only\n"
    found = json.loads(call(capsys, *words, "--json")[1])
    assert (found["job"], found["text"], found["checked"]) == (None, script, True)
    assert found["log"] == f"{work}/dry/slurm/JOB.log"
    (work / "refusal.txt").write_text("sbatch: fatal: Could not establish a configuration source\n")
    assert call(capsys, *words)[2].startswith("note: not checked by Slurm: no Slurm answers here; ")
    (work / "bin" / "sbatch").unlink()
    monkeypatch.setenv("PATH", f"{work}/bin:/nowhere")
    assert call(capsys, *words)[2].startswith("note: not checked by Slurm: there is no sbatch here; nothing is ")
    message, hint = error_of(capsys, *words[:-1])
    assert message == "There is no sbatch here, so nothing can be submitted."
    assert "--dry-run shows the script anywhere" in hint
    assert not (work / "dry").exists()


def test_what_slurm_refuses_is_not_written(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "refusal.txt").write_text("sbatch: error: invalid partition specified: gpu\n")
    message, hint = error_of(capsys, base, "--run", "refused")
    assert message == "Slurm does not take the job: invalid partition specified: gpu."
    assert hint == "Set partition in the site file to one that `sinfo` shows."
    (work / "refusal.txt").write_text("allocation failure: Unable to contact slurm controller\n")
    assert error_of(capsys, base, "--run", "refused")[0] == "Nothing can be submitted: no Slurm answers here."
    assert not (work / "refused").exists()


def test_a_folder_that_cannot_be_written(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "file").write_text("")
    message, hint = error_of(capsys, base, "--run", "file")
    assert message == f"The job cannot be written to {work}/file/slurm: Not a directory."
    assert hint == "Set another folder by --run."


def test_the_folder_of_another_recipe(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", str(base), "--run", "taken", "--trainer.max_steps=1"]) == 0
    capsys.readouterr()
    message, hint = error_of(capsys, base, "--run", "taken", "--model.exits.layers=[3]", "--dry-run")
    assert "taken is the folder of another recipe" in message
    assert "--run" in hint
    assert call(capsys, base, "--run", "taken", "--trainer.max_steps=9", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--nodes", "0"], "--nodes is 0, must be at least 1.", "--gpus counts those of each node."),
        (["--gpus", "-1"], "--gpus is -1, must be at least 1.", "--gpus counts those of each node."),
        (["--gpus", "two"], "gpus: Expected a int. Got value: two", "`eetrain submit --help`"),
        (["--time", "2h"], "--time '2h' is no time.", "Write minutes, MM:SS"),
        (["--time", "3"], "--time 3 is 180 s, but a job is told to save 180 s before its end.", "Ask for more time"),
        (["--site", "gone.yaml"], "The site file 'gone.yaml' cannot be read", "Start from slurm/site.yaml"),
        (["--site", "bad.yaml"], "bad.yaml: there is no key 'partitoin'.", "Did you mean partition?"),
        (["--template", "gone"], "The template 'gone' cannot be read", "Name a file by --template."),
        (["--template", "bad.yaml"], "The template has no #SBATCH lines", "Start from slurm/train.sbatch"),
        (["--tme", "30"], "there is no setting 'tme'.", "Did you mean --time?"),
        (["--dry_runs"], "there is no setting 'dry_runs'.", "Did you mean --dry-run?"),
        (["--model.exitz", "3"], "there is no setting 'model.exitz'.", "Did you mean model.exits?"),
        (["--model.optimizer.lr=-1"], "model.optimizer.lr=-1.0 is out of its range", "Rates and steps"),
        (["--model.optimizer.lr=abc"], "model.optimizer.lr: Expected a float.", "`eetrain fit --help`"),
        (["-c", "gone.yaml"], "gone.yaml", "`eetrain fit --help`"),
        (["--data.batch_size=0"], "batch_size is 0.", "Set it to 1 or more."),
        (["-c", str(PIPELINE), "--gpus", "3"], "stages=2 does not divide the 3 processes", "set stages to one of 1"),
        (["--run", 'a"b'], "a\"b/slurm' cannot stand in an #SBATCH line.", "Use one without"),
        (["--array", ""], "--array names no policy: an array over nothing.", "For example --array never"),
        (["--array", "[]"], "--array names no policy: an array over nothing.", "For example --array never"),
        (["--array", "never,alway:3"], "Exit policy 'alway:3' does not parse", "For example never"),
        (["--array", "never", "--gpus", "2"], "but an evaluation is one process on one device.", "Leave both out"),
    ],
)
def test_bad_use(
    base: Path, work: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    (work / "bad.yaml").write_text("partitoin: gpu\n")
    said, hinted = error_of(capsys, base, *words)
    assert message in said
    assert hint in hinted
    assert not (work / "sbatch.txt").exists(), "nothing reaches Slurm"


def test_no_recipe_and_no_templates(
    base: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_of(capsys, "gone.yaml") == ("There is no recipe 'gone.yaml'.", "`eetrain ls` lists the recipes.")
    monkeypatch.setattr(submit_jobs.eetrain, "__file__", str(work / "site-packages/eetrain/__init__.py"))
    message, hint = error_of(capsys, base)
    assert message == "eetrain is installed without its template slurm/train.sbatch."
    assert "pip install -e ." in hint
    assert "--template" in hint
    assert call(capsys, base, "--template", ROOT / "slurm" / "train.sbatch", "--run", "r", "--dry-run")[0] == 0


def test_an_array_of_evaluations(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(work / "model")
    (work / "rows.csv").write_text("question,answer\none,first\ntwo,second\n")
    nasty = '{question} it\'s "q"\n=> '
    recipe = {"model": "model", "data": "rows.csv", "prompt": nasty, "response": "{answer}", "out": "a b/reports"}
    recipe |= {"max_new_tokens": 3, "policies": ["never"]}
    (work / "evaluation.yaml").write_text(yaml.safe_dump(recipe))
    (work / "more.yaml").write_text("batch_size: 2\n")
    words = ["evaluation.yaml", "-c", "more.yaml", "--repeats", "0", "--site", "site.yaml", "--time", "30"]
    capsys.readouterr()
    status, out, err = call(capsys, *words, "--array", "never,threshold:0.02,measure=margin,always:2")
    folder = work / "a b" / "reports"
    assert (status, err) == (0, "")
    shown = dict(line.split(None, 1) for line in out.splitlines())
    assert shown["log"] == f"{folder}/slurm/4711_*.log"
    names = ["0-never", "1-threshold-0.02-measure-margin", "2-always-2"]
    assert shown["compare"] == "eetrain compare " + " ".join(f"'{name}=a b/reports/{name}'" for name in names)
    script = (folder / "slurm" / "job.sbatch").read_text()
    assert options_of(script) == {
        **{"job-name": "eetrain-reports", "array": "0-2", "nodes": "1", "ntasks-per-node": "1", "time": "30"},
        **{"requeue": "", "open-mode": "append", "chdir": f'"{work}"', "output": f'"{folder}/slurm/%A_%a.log"'},
    }
    for number, policy in enumerate(["never", "threshold:0.02,measure=margin", "always:2"]):
        task = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": str(number)}
        words = started(work, script, **task)
        own = ["--policies", policy, "--out", f"{folder}/{names[number]}"]
        assert words == ["-m", "eetrain", "evaluate", "-c", f"{folder}/slurm/config.yaml", *own]
        assert main(words[2:]) == 0
        results = json.loads((folder / names[number] / "results.json").read_text())
        assert [row["policy"] for row in results["policies"]] == list(dict.fromkeys(["never", policy]))
        assert results["settings"]["template"]["init_args"]["prompt"] == nasty
        assert results["settings"]["batch_size"] == 2
    capsys.readouterr()
    reports = [f"{name}=a b/reports/{name}" for name in names]
    assert main(["compare", *reports, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["policy"] for row in rows} == {"never", "threshold:0.02,measure=margin", "always:2"}


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"data": None}, "There is no data to evaluate on.", "--data FILE"),
        ({"limt": 3}, "there is no setting 'limt'.", "Did you mean limit?"),
        ({"limit": "x"}, "limit: Expected a int", "`eetrain evaluate --help`"),
        ({}, "There is no folder for the reports.", "Set --run FOLDER"),
    ],
)
def test_settings_that_evaluate_would_refuse(
    work: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str, hint: str
) -> None:
    given = {"model": "model", "data": "rows.csv", **changes}
    recipe = {key: value for key, value in given.items() if value is not None}
    (work / "evaluation.yaml").write_text(yaml.safe_dump(recipe))
    said, hinted = error_of(capsys, "evaluation.yaml", "--array", "never")
    assert message in said
    assert hint in hinted


def test_shipped_evaluations_can_be_submitted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in EVALUATIONS] == ["e2e.yaml"]
    for path in EVALUATIONS:
        assert path.read_text().startswith("# "), "the first line says what it is for"
        words = [path, "--model", "exported", "--data", "rows.csv", "--array", "never,always:3", "--run", "r"]
        assert call(capsys, *words, "--site", "site.yaml", "--dry-run")[0] == 0


def test_secrets_are_neither_taken_nor_written(
    base: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    assert call(capsys, base, "--site", "site.yaml", "--run", "r")[0] == 0
    written = [path for path in (work / "r").rglob("*") if path.is_file()]
    assert len(written) == 2
    assert not any("planted" in path.read_text() for path in written)
    (work / "site.yaml").write_text("environment: {WANDB_API_KEY: planted}\n")
    message, hint = error_of(capsys, base, "--site", "site.yaml")
    assert "WANDB_API_KEY looks like a secret" in message
    assert "~/.netrc" in hint
    assert "planted" not in message + hint


def test_flags_of_the_fit_are_passed_on() -> None:
    words = ["r.yaml", "--nodes", "2", "--config", "o.yaml", "--a.b=1", "--a.c", "-1", "--json", "true", "--a.d"]
    passed = ["--config", "o.yaml", "--a.b=1", "--a.c", "-1", "--a.d"]
    own = ["r.yaml", "--nodes", "2", "--json", "true"]
    assert with_rest(words, submit) == [*own, "--settings", json.dumps(passed)]
    assert with_rest(own, submit) == own
    assert with_rest(["--help"], submit) == ["--help"]
    assert with_rest(words, evaluate) == words, "other verbs know all their flags"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "goes back into the queue",
        "--nodes NODES",
        "D-HH:MM:SS",
        "slurm/site.yaml is an example",
        "-c OVERLAY",
    ):
        assert words in out
