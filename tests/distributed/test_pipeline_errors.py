"""What shows only when the model is built or a checkpoint read: every process says the same, and none waits."""

import json
from pathlib import Path

import pytest
import yaml

from eetrain.errors import CheckpointError, ConfigError, EETrainError, TopologyError
from eetrain.testing.processes import run_on_processes
from eetrain.testing.runs import write_run
from eetrain.testing.tiny import tiny_model
from eetrain.training.command import RunCLI

OVERLAY = Path(__file__).parents[2] / "configs" / "strategy" / "pipeline.yaml"
STRATEGY = "--trainer.strategy."
OTHER_MODEL = "Resume with the settings of model.backbone, exits, tuning and lora it was written with."


def fit(folder, *settings):
    pipeline = ["-c", str(OVERLAY), "--trainer.devices=2", f"{STRATEGY}micro_batches=2", "--trainer.limit_val_batches=0"]
    RunCLI(["fit", "-c", str(folder / "base.yaml"), *pipeline, "--trainer.max_steps=1", *map(str, settings)])


def cases(folder):
    """Name of the case -> folder of the run and settings."""
    checkpoint = ("--ckpt_path", folder / "run" / "checkpoints" / "last.ckpt", "--trainer.max_steps=2")
    shallow = folder / "shallow" / "run" / "checkpoints" / "last.ckpt"
    return {
        "more stages than blocks": (folder / "one", ["--model.exits.layers=[1]"]),
        "exits beyond the blocks": (folder, ["--model.exits.layers=[1,9]"]),
        "an objective that does not fit": (folder, ["--model.objective.weights=[0.1,0.2,0.3]"]),
        "no such backbone": (folder, ["--model.backbone.path", folder / "nothing", "--data.vocab_size=61"]),
        "routers": (folder / "experts", []),
        "another type": (folder, ["--model.backbone.dtype=bfloat16"]),
        "other exits": (folder, [*checkpoint, "--model.exits.layers=[1,3]"]),
        "other shapes": (folder / "wide", checkpoint),
        "another optimizer": (folder, ["--ckpt_path", shallow, "--trainer.max_steps=2"]),
        "a single file": (folder, ["--ckpt_path", folder / "alone" / "checkpoints" / "last.ckpt"]),
        "no checkpoint": (folder, ["--ckpt_path", folder / "run" / "checkpoints" / "first.ckpt"]),
    }


def provoke(folder):
    """Two runs that end well, and the errors of those that do not."""
    fit(folder)
    # Blocks 3 and 4 do not learn here: the last stage will find nothing of its optimizer.
    fit(folder, "--model.objective.full_weight=0", "--run", folder / "shallow" / "run")
    found = {}
    for name, (base, settings) in cases(folder).items():
        try:
            fit(base, *settings)
        except (EETrainError, OSError) as error:
            found[name] = error
    return found


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    write_run(folder)
    RunCLI(["fit", "-c", str(folder / "base.yaml"), "--trainer.max_steps=1", "--run", str(folder / "alone")])
    for name, family, changes in (
        ("one", "llama", {"num_hidden_layers": 1}),
        ("wide", "llama", {"intermediate_size": 64}),
        ("experts", "mixtral", {}),
    ):
        (folder / name).mkdir()
        write_run(folder / name, family, **changes)
    return folder, run_on_processes(provoke, 2, folder, timeout=300)


def test_show(errors):
    folder, found = errors
    for name in cases(folder):
        print(name, [repr(f.get(name)) for f in found])
    assert 0
