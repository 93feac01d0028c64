"""Every ``#SBATCH`` line, of the templates and of rendered scripts, is read by Slurm's own parser."""

import json
import re
from pathlib import Path

import pytest
import yaml
from slurm_harness import Slurm
from story import PIPELINE, eetrain

from eetrain.testing.runs import write_run

pytestmark = pytest.mark.slurm
SLURM = Path(__file__).parents[2] / "slurm"
TEMPLATES = sorted(SLURM.rglob("*.sbatch"))


def accepted(cluster: Slurm, folder: Path, text: str) -> bool:
    path = folder / "tried.sbatch"
    path.write_text(text)
    return cluster.run("sbatch", "--test-only", path, check=False).returncode == 0


def options(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


def fields(cluster: Slurm, folder: Path, text: str) -> dict[str, str]:
    """What Slurm makes of a script: the fields of the job, which is held and then cancelled."""
    path = folder / "held.sbatch"
    path.write_text(text)
    job = cluster.run("sbatch", "--hold", "--parsable", path).stdout.strip()
    shown = cluster.run("scontrol", "--oneliner", "show", "job", job).stdout
    cluster.run("scancel", job)
    return dict(re.findall(r"(\S+?)=(\S*)", shown)) | {"JobId": job}


def rendered(cluster: Slurm, *arguments: str | Path | int) -> str:
    status, out, err = eetrain(cluster, "submit", *map(str, arguments), "--dry-run", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["checked"], told["job"]) == (True, None)
    assert cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout == "", "nothing is submitted"
    return str(told["text"])


def test_all_templates_are_here():
    assert [path.name for path in TEMPLATES] == ["eval_array.sbatch", "train.sbatch"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_line_of_a_template_counts(two_nodes, tmp_path, template):
    text = template.read_text()
    assert accepted(two_nodes, tmp_path, text)
    lines = options(text)
    assert len(lines) >= 7
    for line in lines:
        # A line that Slurm does not reach, or that is cut by a comment, could say anything.
        assert not accepted(
            two_nodes, tmp_path, text.replace(line, line.replace("#SBATCH --", "#SBATCH --no-such-"))
        ), line
        assert "$" not in line, line


def test_a_fit_on_two_nodes_is_what_was_asked_for(two_nodes, tmp_path):
    recipe = write_run(tmp_path)
    site = yaml.safe_load((SLURM / "site.yaml").read_text())
    site |= {"gpu_type": None, "sbatch": ["--exclusive", '--comment="a run"']}
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(site))
    size = ["--nodes", 2, "--gpus", 2, "--time", "1-02:30", "--site", path]
    script = rendered(two_nodes, recipe, "-c", PIPELINE, *size)
    found = fields(two_nodes, tmp_path, script)
    run = tmp_path / "run"
    wanted = {
        "Partition": "gpu",
        "NumNodes": "2-2",
        "NumTasks": "4",
        "NtasksPerN:B:S:C": "2:0:*:*",
        "CPUs/Task": str(site["cpus_per_task"]),
        "TresPerNode": "gres:gpu:2",
        "MinMemoryNode": "0",
        "TimeLimit": "1-02:30:00",
        "Requeue": "1",
        "StdOut": f"{run}/slurm/{found['JobId']}.log",
        "StdErr": f"{run}/slurm/{found['JobId']}.log",
        "WorkDir": str(Path.cwd()),
        "OverSubscribe": "NO",
        "Comment": "a",
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert "#SBATCH --signal=SIGUSR1@180" in options(script)
    assert not (run / "slurm").exists(), "a dry run writes nothing"


def test_an_array_is_what_was_asked_for(two_nodes, tmp_path):
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text(yaml.safe_dump({"model": "folder", "data": "rows.csv", "prompt": "{a}", "response": "{b}"}))
    script = rendered(
        two_nodes, recipe, "--array", "never,always:1,threshold:0.9", "--time", "30", "--run", tmp_path / "out"
    )
    found = fields(two_nodes, tmp_path, script)
    assert {name: found[name] for name in ("ArrayTaskId", "NumNodes", "TresPerNode", "TimeLimit", "Requeue")} == {
        "ArrayTaskId": "0-2",
        "NumNodes": "1-1",
        "TresPerNode": "gres:gpu:1",
        "TimeLimit": "00:30:00",
        "Requeue": "1",
    }
    assert found["StdOut"] == f"{tmp_path}/out/slurm/{found['JobId']}_4294967294.log"


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"partition": "nowhere"}, [], "invalid partition specified: nowhere"),
        ({}, ["--nodes", "3"], "Requested node configuration is not available"),
        ({}, ["--gpus", "5"], "Requested node configuration is not available"),
        ({"sbatch": ["--no-such-option"]}, [], "unrecognized option '--no-such-option'"),
    ],
    ids=["partition", "nodes", "gpus", "option"],
)
def test_what_slurm_refuses_is_one_line_with_a_hint(two_nodes, tmp_path, changes, arguments, said):
    recipe, site = write_run(tmp_path), tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump(changes))
    status, out, err = eetrain(two_nodes, "submit", recipe, "--site", site, *arguments)
    error, hint = err.splitlines()[-2:]
    assert (status, out) == (2, "")
    assert re.match(rf"error: Slurm does not take the job: .*{re.escape(said)}", error), err
    assert hint.startswith("HINT: ")
    assert not (tmp_path / "run").exists()
