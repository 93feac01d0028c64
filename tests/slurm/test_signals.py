"""Signals at bad moments, to one process or to all: every time the job is requeued and ends as if nothing had been."""

import os
import signal
from pathlib import Path

import pytest
from slurm_harness import Slurm, wait_for
from story import PIPELINE, TERM, USR1, Story, assert_same_run, metrics

from eetrain.training.checkpoint_reading import check_checkpoint, read_trainer_state

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
IGNORED, CAUGHT = "SigIgn", "SigCgt"


def size(story, *, gpus=2, time="0:30:00", **site):
    return ["--nodes", "1", "--gpus", gpus, "--time", time, "--site", story.site(**site)]


def submit(cluster, folder, hold, **site):
    story = Story(folder, cluster, hold, strategy="ddp")
    return story, story.submit("run", *size(story, **site))


@pytest.fixture(scope="module")
def never(one_node: Slurm, tmp_path_factory):
    """The run folder of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("never")
    _, job = submit(one_node, folder, None)
    job.finish()
    assert job.restarts == 0
    return folder / "run"


def assert_back_and_well(story, job, never, step, **but):
    """Requeued once, after ``step`` steps, and bitwise the run that was never interrupted."""
    text = job.finish()
    assert job.restarts == 1, job.told()
    assert text.count("Stopped by") == text.count(f"Stopped by SIGUSR1 after step {step};") == 1, text
    assert_same_run(story.folder / "run", never, **but)


def test_one_process_is_told_while_it_waits_for_the_other_in_a_step(one_node, tmp_path, never):
    """Process 0 sits in the sum of gradients, to which process 1 has nothing to give yet."""
    story, job = submit(one_node, tmp_path, {"step": 3, "ranks": [1]})
    story.held(job, [1])
    os.kill(int((tmp_path / "process-0").read_text()), signal.SIGUSR1)
    story.heard(job, USR1, [0])
    story.let_go()
    assert_back_and_well(story, job, never, 4)
    assert story.signals(1).count(USR1) == 0


def test_the_last_process_alone_is_told_while_the_other_waits(one_node, tmp_path, never):
    story, job = submit(one_node, tmp_path, {"step": 4, "ranks": [1]})
    os.kill(story.held(job, [1])[1], signal.SIGUSR1)
    story.heard(job, USR1, [1])
    story.let_go()
    assert_back_and_well(story, job, never, 5)
    assert story.signals(0).count(USR1) == 0


def test_told_during_validation(one_node, tmp_path, never):
    """After the first epoch of three steps, with one process a validation batch behind. That validation is not done."""
    story, job = submit(one_node, tmp_path, {"validation": True, "ranks": [0]})
    story.held(job, [0])
    job.signal("USR1")
    story.heard(job, USR1)
    story.let_go()
    assert_back_and_well(story, job, never, 3, not_validated=2)


def test_told_again_and_again_from_the_first_moment(one_node, tmp_path, never):
    """From before Python listens until both processes listen, while libraries are still being loaded."""
    story, job = submit(one_node, tmp_path, None)
    job.wait_for(lambda: len(job.processes(IGNORED, USR1)) + len(job.processes(CAUGHT, USR1)) == 2, "both processes")
    early = len(job.processes(IGNORED, USR1))
    for _ in range(2000):
        job.signal("USR1")
        if len(job.processes(CAUGHT, USR1)) == 2:
            break
    listening = job.processes(CAUGHT, USR1).values()
    loaded = ["libtorch" in Path(f"/proc/{process}/maps").read_text() for process in listening]
    job.signal("USR1")
    assert early, "too late to prove anything"
    assert not all(loaded), "too late to prove anything"
    assert_back_and_well(story, job, never, 1)


def test_no_scontrol_where_the_tasks_run(one_node, tmp_path, never):
    """As in a container: the status of one process says it, also where others end later, and the script requeues."""
    python = tmp_path / "python-without-tools"
    interpreter = Story.interpreter()
    python.write_text(f'#!/bin/sh\nPATH=/nowhere exec {interpreter} "$@"\n')
    python.chmod(0o755)
    story, job = submit(one_node, tmp_path, {"step": 3, "linger": 2.0}, python=str(python))
    story.held(job)
    job.signal("USR1")
    story.heard(job, USR1)
    story.let_go()
    assert_back_and_well(story, job, never, 4)


def test_scancel_saves_and_does_not_requeue_and_the_same_command_goes_on(one_node, tmp_path, never):
    story, job = submit(one_node, tmp_path, {"step": 3})
    story.held(job)
    job.cancel()
    wait_for(lambda: TERM in story.signals(0) and TERM in story.signals(1), "SIGTERM", 20, job.told)
    story.let_go()
    assert job.end() == "CANCELLED"
    assert "Stopped by SIGTERM after step 4;" in job.text, job.told()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    check_checkpoint(last)
    assert read_trainer_state(last)["global_step"] == 4
    assert len([row for row in metrics(tmp_path / "run") if "train/loss" in row]) == 4
    assert job.restarts == 0
    again = story.submit("run", *size(story))
    again.finish()
    assert_same_run(tmp_path / "run", never)


def test_the_end_of_the_time_is_told_and_requeues(one_node, tmp_path, never):
    """Nobody sends a signal: Slurm does, before its limit of two minutes."""
    story = Story(tmp_path, one_node, {"step": 3}, strategy="ddp")
    job = story.submit("run", *size(story, time="2", signal_seconds=30))
    story.held(job)
    wait_for(lambda: USR1 in story.signals(0) and USR1 in story.signals(1), "Slurm's own signal", 150, job.told)
    story.let_go()
    assert_back_and_well(story, job, never, 4)


@pytest.mark.parametrize("told", ["all", "one"])
def test_a_pipeline_over_two_nodes_is_requeued(two_nodes, tmp_path, told):
    """One stage on each node; the second one late in a step, so that the first waits for its gradients."""
    story = Story(tmp_path, two_nodes, {"step": 3, "ranks": [1]})
    options = ["-c", PIPELINE, "--nodes", "2", "--gpus", "1", "--time", "0:30:00", "--site", story.site()]
    job = story.submit("run", *options)
    waiting = story.held(job, [1])
    if told == "all":
        job.signal("USR1")
    else:
        os.kill(waiting[1], signal.SIGUSR1)
    story.heard(job, USR1, [0, 1] if told == "all" else [1])
    story.let_go()
    job.wait_for(lambda: job.restarts, "its requeue")
    never = story.submit("never", *options, recipe=story.plain)
    never.finish()
    assert_back_and_well(story, job, tmp_path / "never", 4)
