"""Runs of the command line that lose a process: how long they take to end, and what they say."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_reading import check_checkpoint, read_trainer_state

CONFIGS = Path(__file__).parents[2] / "configs" / "strategy"
# The promise is 60 s; all but the start of processes is a matter of moments, and test machines are slow.
SECONDS = 30
ADVICE = "HINT: The kernel's log (dmesg) or the scheduler says why; out of memory is the usual cause."


class Fit:
    """A fit on two processes that come to a stand before the third step, see ``lost_support.Wait``.

    Args:
        folder: for everything.
        strategy: name of the overlay.
        ranks: which of them wait; the others go on into the step.
        then: what they wait for.
        settings: more of them.
    """

    def __init__(self, folder, strategy, ranks, then="wait", *settings):
        self.folder = folder
        wait = {"folder": folder, "ranks": ranks, "then": then}
        words = [
            *("fit", "-c", write_run(folder), "-c", CONFIGS / f"{strategy}.yaml", "--trainer.devices", 2),
            *("--trainer.limit_val_batches", 0, "--checkpoint.every_n_train_steps", 1),
            "--trainer.callbacks+=lost_support.Wait",
            *(f"--trainer.callbacks.{name}={value}" for name, value in wait.items()),
            *settings,
        ]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        with open(folder / "said", "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eetrain", *map(str, words)], env=environ, stdout=said, stderr=said
            )

    def pids(self):
        """Those of both processes, as soon as they stand."""
        paths, until = [self.folder / "0.pid", self.folder / "1.pid"], time.monotonic() + 120
        while not all(path.exists() for path in paths):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.05)
        return [int(path.read_text()) for path in paths]

    def kill(self, rank):
        """Kill one of them; the number of its process and the seconds until both are gone."""
        pids = self.pids()
        time.sleep(0.5)  # the other one, if it does not wait, is inside the step by now
        start = time.monotonic()
        os.kill(pids[rank], signal.SIGKILL)
        self.process.wait(SECONDS)
        while any(map(runs, pids)):
            assert time.monotonic() < start + SECONDS, self.said
            time.sleep(0.05)
        return pids[rank], time.monotonic() - start

    @property
    def said(self):
        return (self.folder / "said").read_text()

    @property
    def errors(self):
        return [line for line in self.said.splitlines() if line.startswith("error:") or "rror: process" in line]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("strategy", "waiting", "killed"),
    [
        ("ddp", [1], 1),  # the other one waits for it in the step
        pytest.param("ddp", [0], 0, marks=pytest.mark.slow),
        pytest.param("ddp", [0, 1], 1, marks=pytest.mark.slow),  # the other one is busy with something else
        pytest.param("pipeline", [1], 1, marks=pytest.mark.slow),
        pytest.param("pipeline", [0], 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_run_and_is_named_once(tmp_path, strategy, waiting, killed, record_property):
    fit = Fit(tmp_path, strategy, waiting, "wait", "--data.num_workers=1")
    pid, took = fit.kill(killed)
    record_property("seconds from the kill to the end", round(took, 2))
    print(f"{strategy}, process {killed} killed: both gone after {took:.2f} s")
    # Rank 0 is the process that was started; it cannot say how it ended if it was killed.
    assert fit.process.returncode == (-signal.SIGKILL if killed == 0 else 1)
    named = rf"error: process {killed} of 2 \(host \S+, pid {pid}\) was killed or lost; the job ends\."
    assert len(fit.errors) == 1, fit.said
    assert re.fullmatch(named, fit.errors[0]), fit.said
    assert fit.said.count(ADVICE) == 1
    assert "Traceback" not in fit.said
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    check_checkpoint(last)
    assert read_trainer_state(last)["global_step"] == 2


@pytest.mark.slow
def test_an_exception_of_one_process_is_shown_with_its_name_and_place(tmp_path):
    fit = Fit(tmp_path, "ddp", [1], "RuntimeError")
    assert fit.process.wait(120) == 1
    assert len(fit.errors) == 1, fit.said
    assert re.fullmatch(
        r"error: process 1 of 2 \(host \S+, pid \d+\) failed: RuntimeError: a shape that does not fit", fit.errors[0]
    )
    assert fit.said.count("Traceback (most recent call last):") == 1
    assert 'lost_support.py", line' in fit.said


@pytest.mark.slow
def test_an_error_of_the_user_on_one_process_comes_with_its_hint(tmp_path):
    fit = Fit(tmp_path, "ddp", [1], "DataError")
    assert fit.process.wait(120) == 1
    assert re.fullmatch(
        r"error: process 1 of 2 \(host \S+, pid \d+\) failed: DataError: row 7 has no text\.", "".join(fit.errors)
    ), fit.said
    assert "\nHINT: Give it one.\n" in fit.said
    assert "Traceback" not in fit.said


@pytest.mark.slow
def test_an_error_of_all_processes_is_that_of_the_run(tmp_path):
    fit = Fit(tmp_path, "ddp", [0, 1], "DataError")
    assert fit.process.wait(120) == 2
    assert fit.errors == ["error: row 7 has no text."], fit.said
    assert fit.said.count("HINT: Give it one.") == 1


@pytest.mark.slow
def test_a_run_that_ends_well_says_nothing(tmp_path):
    fit = Fit(tmp_path, "ddp", [], "wait", "--trainer.limit_val_batches=1")  # fits, then validates
    assert fit.process.wait(120) == 0, fit.said
    assert not fit.errors
    assert "do not watch" not in fit.said
