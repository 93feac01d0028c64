"""What is wrong is said once, whatever number of processes finds it out."""

import re
import sys

import pytest
from slurm_harness import batch_script
from story import Story

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def messages(text):
    return re.findall(r"^(?:error|HINT): .*$", text, flags=re.MULTILINE)


def run(cluster, folder, settings, *arguments):
    """``eetrain fit`` by a script of one's own; the job."""
    recipe = Story(folder, cluster).recipe
    words = [sys.executable, "-m", "eetrain", "fit", "-c", recipe, "--run", folder / "run", *arguments]
    command = f"srun --kill-on-bad-exit=1 {' '.join(map(str, words))}"
    return cluster.submit(batch_script(command, settings), folder / "job.log")


def test_tasks_that_differ_from_devices(one_node, tmp_path):
    job = run(one_node, tmp_path, {"nodes": 1, "ntasks-per-node": 2}, "--trainer.devices", "3")
    assert job.end() == "FAILED", job.told()
    assert messages(job.text) == [
        "error: trainer.devices=3, but Slurm runs 2 tasks on each node (--ntasks-per-node).",
        "HINT: Set trainer.devices=2, or #SBATCH --ntasks-per-node=3: one task for each device.",
    ], job.told()
    assert job.field("ExitCode") == "2:0"


def test_nodes_that_differ(two_nodes, tmp_path):
    job = run(two_nodes, tmp_path, {"nodes": 2, "ntasks-per-node": 1}, "--trainer.devices", "1")
    assert job.end() == "FAILED", job.told()
    assert messages(job.text) == [
        "error: trainer.num_nodes=1, but Slurm gave the job 2 nodes (--nodes).",
        "HINT: Set trainer.num_nodes=2, or #SBATCH --nodes=1.",
    ], job.told()


def test_a_bare_number_of_tasks(one_node, tmp_path):
    job = run(one_node, tmp_path, {"ntasks": 2}, "--trainer.devices", "2")
    assert job.end() == "FAILED", job.told()
    assert messages(job.text) == [
        "error: Slurm was asked for 2 tasks by a bare --ntasks, which leaves open how many run on each node.",
        "HINT: Write #SBATCH --nodes=1 and #SBATCH --ntasks-per-node=2 instead of --ntasks.",
    ], job.told()


def test_two_jobs_in_one_run_folder(one_node, tmp_path):
    """The second one names the owner; the first one goes on undisturbed."""
    story = Story(tmp_path, one_node, {"step": 3}, strategy="ddp")
    size = ["--nodes", "1", "--gpus", "2", "--time", "0:30:00", "--site", story.site()]
    first = story.submit("run", *size)
    story.held(first)
    second = story.submit("run", *size, recipe=story.plain)
    assert second.end() == "FAILED", second.told()
    error, hint = messages(second.text)
    owner = rf"error: The run folder {tmp_path}/run is in use by .*, job {first.id}, since "
    assert re.match(owner, error), second.told()
    assert hint == "HINT: Wait for that job to end, or set another folder by --run."
    story.let_go()
    first.finish()
