"""The whole story: a job is told that its time is nearly over, saves, is requeued, and ends as if nothing had been."""

from pathlib import Path

import pytest
from slurm_harness import Slurm
from story import USR1, Story, assert_same_run, written

pytestmark = pytest.mark.slurm
PLANTED = {
    "WANDB_API_KEY": "planted-wandb-key-5f1c9a",
    "HF_TOKEN": "planted-hf-token-83ab20",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-77de",
}


def test_two_processes_are_requeued_and_end_like_a_run_never_interrupted(one_node: Slurm, tmp_path):
    story = Story(tmp_path, one_node, {"step": 3}, strategy="ddp")
    size = ["--nodes", "1", "--gpus", "2", "--time", "0:30:00", "--site", story.site()]
    job = story.submit("run", *size, **PLANTED)
    processes = story.held(job)
    for process in processes.values():
        environment = Path(f"/proc/{process}/environ").read_text()
        assert all(secret in environment for secret in PLANTED.values()), "it has them, and must keep them to itself"
    job.signal("USR1")
    story.heard(job, USR1)
    story.let_go()
    job.wait_for(lambda: job.restarts, "its requeue")
    never = story.submit("never", *size, recipe=story.plain, **PLANTED)
    never.finish()
    text = job.finish()
    assert (never.restarts, job.restarts) == (0, 1), job.told()
    assert text.count("Stopped by SIGUSR1 after step 4") == 1, "once, by one process"
    assert text.count("CANCELLED") == text.count("DUE TO JOB REQUEUE"), text
    assert "Stopped by" not in never.text
    assert_same_run(tmp_path / "run", tmp_path / "never")
    assert list(job.log.parent.glob("*.log")) == [job.log], "both passes are in one log"
    # What was exported when the jobs were submitted is nowhere: logs, scripts, configurations and checkpoints.
    files = written(tmp_path)
    assert {job.log, never.log, *job.log.parent.glob("*.sbatch")} <= files.keys()
    assert len(files) > 12
    for path, content in files.items():
        assert not any(secret.encode() in content for secret in PLANTED.values()), path
