"""The Slurm that the other tests of this folder run on is a Slurm."""

import pytest
from slurm_harness import batch_script

pytestmark = pytest.mark.slurm
WAITING = """\
srun sh -c 'trap "echo task $SLURM_PROCID heard USR1; kept=1" USR1
kept=0; touch {folder}/ready-$SLURM_PROCID; while [ $kept = 0 ]; do sleep 0.1; done; true'
"""


def lines_with(word, text):
    """Those of the job's own lines, not of Slurm's."""
    return [line for line in text.splitlines() if word in line]


def test_a_job_runs_on_one_node(one_node, tmp_path):
    script = batch_script("srun sh -c 'echo task $SLURM_PROCID of $SLURM_NTASKS'", {"nodes": 1, "ntasks-per-node": 2})
    job = one_node.submit(script, tmp_path / "log")
    assert sorted(job.finish(30).splitlines()) == ["task 0 of 2", "task 1 of 2"]
    assert job.restarts == 0


def test_a_job_runs_over_two_nodes(two_nodes, tmp_path):
    script = batch_script("srun sh -c 'echo $SLURM_PROCID $SLURMD_NODENAME'", {"nodes": 2, "ntasks-per-node": 1})
    job = two_nodes.submit(script, tmp_path / "log")
    assert sorted(job.finish(30).splitlines()) == ["0 n1", "1 n2"]


def test_a_requeued_job_says_so_and_goes_on_in_its_log(one_node, tmp_path):
    commands = 'echo pass "${SLURM_RESTART_COUNT:-0}"\n[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || scontrol requeue '
    job = one_node.submit(batch_script(commands + '"$SLURM_JOB_ID"', {"requeue": ""}), tmp_path / "log")
    assert lines_with("pass", job.finish(60)) == ["pass 0", "pass 1"]
    assert job.restarts == 1


def test_a_signal_reaches_every_task(two_nodes, tmp_path):
    settings = {"nodes": 2, "ntasks-per-node": 1}
    job = two_nodes.submit(batch_script(WAITING.format(folder=tmp_path), settings), tmp_path / "log")
    job.wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both tasks")
    job.signal("USR1")
    assert sorted(lines_with("heard", job.finish(30))) == ["task 0 heard USR1", "task 1 heard USR1"]


def test_the_parser_refuses_what_it_does_not_know(one_node, tmp_path):
    for number, (line, wrong) in enumerate((("nodes", "1"), ("nodes", "$NODES"), ("gpu-per-nodes", "1"))):
        path = tmp_path / f"{number}.sbatch"
        path.write_text(batch_script("true", {line: wrong}))
        done = one_node.run("sbatch", "--test-only", path, check=False)
        assert (done.returncode == 0) == (number == 0), done.stderr


def test_an_error_shows_the_log_of_the_job(one_node, tmp_path):
    job = one_node.submit(batch_script("echo out of luck; exit 3"), tmp_path / "log")
    with pytest.raises(AssertionError, match=r"FAILED with 3:0(.|\n)*out of luck"):
        job.finish(30)
