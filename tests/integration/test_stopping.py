"""Signals at every kind of moment: the run stops whole, and goes on as if nothing had been."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from comparing import assert_same
from lightning.pytorch import Callback

from eetrain.cli import main
from eetrain.testing.runs import write_run

THERE = "import sys; from eetrain.cli import main; print('there', flush=True); sys.exit(main())"
STEPS = 9  # 6 make an epoch


class Send(Callback):
    """Send this process a signal, once, at a moment of the fit."""

    def __init__(self, number: int, moment: str, step: int = 3) -> None:
        self.number, self.moment, self.step = number, moment, step

    def _send(self, trainer, moment):
        if (moment, trainer.global_step) == (self.moment, self.step):
            os.kill(os.getpid(), self.number)

    def setup(self, trainer, pl_module, stage):
        self._send(trainer, "setup")

    def on_sanity_check_start(self, trainer, pl_module):
        self._send(trainer, "sanity check")

    def on_train_batch_start(self, trainer, *args):
        self._send(trainer, "batch")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and batch_idx == 0:
            self._send(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._send(trainer, "epoch end")


def fit(tmp_path, *settings):
    course = ["--trainer.max_steps", STEPS, "--trainer.val_check_interval", 3, "--trainer.log_every_n_steps", 1]
    return main(["fit", "-c", str(tmp_path / "base.yaml"), *map(str, [*course, *settings])])


def sending(number, moment, step):
    arguments = {"number": int(number), "moment": moment, "step": step}
    return ["--trainer.callbacks", json.dumps({"class_path": f"{__name__}.Send", "init_args": arguments})]


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def rows(run, column):
    with open(run / "metrics.csv", newline="") as file:
        return [(row["step"], row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder)
    assert fit(folder) == 0
    return folder


@pytest.fixture
def place(whole, tmp_path):
    (tmp_path / "base.yaml").write_bytes((whole / "base.yaml").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("moment", "step", "stops_at"),
    [
        ("setup", 0, 1),
        ("sanity check", 0, 1),
        ("batch", 3, 4),
        ("batch", 5, 6),
        ("validation", 3, 3),
        ("validation", 6, 6),
        ("epoch end", 6, 7),
        ("batch", 8, 9),
    ],
)
def test_a_signal_at_any_moment_leaves_a_run_that_goes_on_bitwise(place, whole, capfd, moment, step, stops_at):
    run = ["--run", place / "run", "--resume", "auto"]
    before = signal.getsignal(signal.SIGUSR1)
    assert fit(place, *run, *sending(signal.SIGUSR1, moment, step)) == 75
    assert signal.getsignal(signal.SIGUSR1) == before
    last = place / "run" / "checkpoints" / "last.ckpt"
    assert f"Stopped by SIGUSR1 after step {stops_at}; {last} is whole." in capfd.readouterr().err
    assert state(place / "run")["global_step"] == stops_at
    assert rows(place / "run", "train/loss") == rows(whole / "run", "train/loss")[:stops_at]
    assert fit(place, *run) == 0
    again, once = state(place / "run"), state(whole / "run")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "CausalLMDataModule"):
        assert_same(again[part], once[part], part)
    assert rows(place / "run", "train/loss") == rows(whole / "run", "train/loss"), "each step once"
    found, wanted = rows(place / "run", "val/nll/full"), rows(whole / "run", "val/nll/full")
    assert len(found) == len({step for step, _ in found})
    assert {value for _, value in found} <= {value for _, value in wanted}, "no validation over a part of the data"
    assert found[-1][1] == wanted[-1][1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_statuses(place, number, status):
    assert fit(place, "--run", place / "run", *sending(number, "batch", 2)) == status
    assert state(place / "run")["global_step"] == 3


def test_a_signal_while_python_still_imports_is_survived(place):
    words = ["fit", "-c", place / "base.yaml", "--run", place / "run", "--trainer.max_steps", STEPS]
    process = subprocess.Popen(
        [sys.executable, "-c", THERE, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "there\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "Stopped by SIGUSR1 after step 1;" in error


def test_a_fit_in_a_folder_with_a_run_is_refused(place, capfd):
    assert fit(place, "--run", place / "run") == 0
    kept = (place / "run" / "checkpoints" / "last.ckpt").read_bytes()
    capfd.readouterr()
    assert fit(place, "--run", place / "run") == 2
    error = capfd.readouterr().err
    assert f"error: {place}/run holds a run already ({place}/run/checkpoints/last.ckpt)" in error
    assert "HINT: Go on with it by --resume auto" in error
    assert fit(place, "--run", place / "run", "--resume", "auto", "--model.exits.layers", "[1]") == 2
    assert "its run has model.exits.layers=[1, 2], this one model.exits.layers=[1]." in capfd.readouterr().err
    assert (place / "run" / "checkpoints" / "last.ckpt").read_bytes() == kept
    assert fit(place, "--run", place / "run", "--resume", "auto") == 0, "nothing is left to do"


def test_a_run_folder_that_cannot_be_written_is_one_line(place, capfd):
    assert fit(place, "--run", "/proc/run") in (1, 2)
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "/proc/run" in error
    assert error.count("\n") == 2


def test_a_taken_port_is_one_line(place):
    words = ["fit", "-c", place / "base.yaml", "--run", place / "run", "--trainer.strategy", "ddp"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "eetrain", *map(str, words), "--trainer.devices", "1"],
            env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    wanted = f"error: The port at which the processes meet, 127.0.0.1:{port}, is taken.\nHINT: Set MASTER_PORT"
    assert wanted in done.stderr
