"""Runs of tiny models as Slurm jobs: a recipe, a site file, ``eetrain submit``, and what is left of the run."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from slurm_harness import Job, Slurm

from eetrain.cli import main
from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_reading import CheckpointFolder, read_trainer_state

HERE = Path(__file__).parent
PIPELINE = HERE.parents[1] / "configs" / "strategy" / "pipeline.yaml"
STEPS = 8
USR1, TERM = 10, 15
# 24 rows, 4 of them a step on each of 2 processes: 3 steps an epoch, each with a validation.
_LENGTH = {"max_steps": STEPS, "log_every_n_steps": 1, "num_sanity_val_steps": 0}


class Story:
    """A recipe in a folder of its own, and the jobs that run it.

    Args:
        folder: an existing one; gets model, data, recipe and site file, and holds the run folders.
        cluster: where jobs go.
        hold: settings of :class:`slow_steps.Hold` beside its folder; nothing waits if left out.
        **trainer: more settings of the Trainer.
    """

    def __init__(self, folder: Path, cluster: Slurm, hold: Mapping[str, Any] | None = None, **trainer: Any) -> None:
        self.folder, self.cluster = folder, cluster
        self.recipe = write_run(folder)
        config = yaml.safe_load(self.recipe.read_text())
        config["trainer"] |= {**_LENGTH, **trainer}
        del config["run"]
        self.plain = folder / "plain.yaml"
        self.plain.write_text(yaml.safe_dump(config))
        if hold is not None:
            arguments = {"folder": str(folder), **hold}
            config["trainer"]["callbacks"] = [{"class_path": "slow_steps.Hold", "init_args": arguments}]
        self.recipe.write_text(yaml.safe_dump(config))

    @staticmethod
    def interpreter() -> str:
        """Of the tasks: this one."""
        return sys.executable

    def site(self, **changes: Any) -> Path:
        """Write the site file: this interpreter, no GPUs, and processes that meet on loopback."""
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        changes = {**changes, "environment": environment | changes.get("environment", {})}
        path = self.folder / "site.yaml"
        settings = {"gpu_request": "none", "cpus_per_task": 1, "python": sys.executable, "signal_seconds": 30}
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    def submit(self, run: str, *arguments: str | Path, recipe: Path | None = None, **environ: str) -> Job:
        """``eetrain submit`` of the recipe into a run folder; the job.

        Args:
            run: name of the run folder.
            *arguments: such as ``--nodes 1``.
            recipe: another file than ``self.recipe``.
            **environ: more variables of the shell that submits.
        """
        told = submit(self.cluster, recipe or self.recipe, "--run", self.folder / run, *arguments, **environ)
        return Job(self.cluster, str(told["job"]), Path(told["log"]))

    def held(self, job: Job, ranks: Sequence[int] = (0, 1)) -> dict[int, int]:
        """Wait until these ranks wait; their process numbers by rank."""
        files = [self.folder / f"held-{rank}" for rank in ranks]
        job.wait_for(lambda: all(path.exists() and path.read_text() for path in files), f"ranks {ranks} to wait")
        return {rank: int(path.read_text()) for rank, path in zip(ranks, files, strict=True)}

    def signals(self, rank: int) -> list[int]:
        """All signals that a rank has got so far."""
        path = self.folder / f"signals-{rank}"
        return list(path.read_bytes()) if path.exists() else []

    def heard(self, job: Job, number: int, ranks: Sequence[int] = (0, 1)) -> None:
        """Wait until the signal has reached these ranks."""
        job.wait_for(lambda: all(number in self.signals(rank) for rank in ranks), f"signal {number} at ranks {ranks}")

    def let_go(self) -> None:
        """Whoever waits goes on."""
        (self.folder / "go").touch()


def submit(cluster: Slurm, recipe: Path, *arguments: str | Path, **environ: str) -> dict[str, Any]:
    """``eetrain submit RECIPE ... --json``, which must end well; what it says."""
    status, out, err = eetrain(cluster, "submit", recipe, *arguments, "--json", **environ)
    assert status == 0, f"eetrain submit ended with {status}\n{out}{err}"
    told: dict[str, Any] = json.loads(out)
    return told


def eetrain(cluster: Slurm, *words: str | Path, **environ: str) -> tuple[int, str, str]:
    """A verb in this process, in the environment of a cluster: exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, {**cluster.environ, **environ}, clear=True):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def assert_same_run(found: Path, wanted: Path, steps: int = STEPS, not_validated: int | None = None) -> None:
    """Two run folders hold bitwise the same: every step of the log, each once, and the last checkpoint.

    Args:
        found: the run in question.
        wanted: one that nothing has disturbed.
        steps: of both.
        not_validated: a step after which the validation of ``found`` was interrupted, which leaves no numbers.
    """
    ours = metrics(found)
    theirs = [row for row in metrics(wanted) if "train/loss" in row or row["step"] != str(not_validated)]
    assert [row["step"] for row in theirs if "train/loss" in row] == [str(step) for step in range(steps)]
    assert ours == theirs
    one, two = (folder / "checkpoints" / "last.ckpt" for folder in (found, wanted))
    assert_same_tensors(tensors(one), tensors(two))
    states = [read_trainer_state(path) for path in (one, two)]
    assert states[0]["global_step"] == states[1]["global_step"] == steps
    assert states[0]["eetrain"] == states[1]["eetrain"]
    assert states[0]["lr_schedulers"] == states[1]["lr_schedulers"]


def assert_same_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Bitwise."""
    assert wanted
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint: weights and what the optimizer keeps."""
    if path.is_dir():
        folder = CheckpointFolder.open(path)
        return {name: folder.tensor(name) for name in folder.names}
    stored = read_trainer_state(path)
    kept = {f"model/{name}": tensor for name, tensor in stored["state_dict"].items()}
    for number, state in stored["optimizer_states"][0]["state"].items():
        kept |= {f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in state.items()}
    return kept


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's log, without empty columns."""
    with open(run / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def written(*folders: Path) -> dict[Path, bytes]:
    """All files below some folders, with what stands in them."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths}
