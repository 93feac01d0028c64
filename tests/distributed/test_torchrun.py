"""torchrun starts the processes, in the place of Slurm or of Lightning."""

import os
import subprocess
import sys

import pytest
import torch

from eetrain.testing.runs import write_run


def torchrun(*words):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        "eetrain",
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, timeout=240, env=environ)


def test_what_is_wrong_with_the_settings_is_said_once(tmp_path):
    done = torchrun("fit", "-c", write_run(tmp_path), "--model.exits.laiers", "[1]")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: there is no setting 'model.exits.laiers'."]
    assert "HINT: Did you mean model.exits.layers?" in done.stderr


@pytest.mark.slow
def test_a_run_under_torchrun(tmp_path):
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--trainer.limit_val_batches", 1]
    done = torchrun("fit", "-c", write_run(tmp_path), *ddp, "--run", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Validation") == 1
    assert torch.load(tmp_path / "there" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
