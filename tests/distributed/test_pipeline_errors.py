"""What shows only when the model is built or a checkpoint read: every process says the same, and none waits."""

from pathlib import Path

import pytest

from eetrain.errors import CheckpointError, ConfigError, TopologyError
from eetrain.testing.processes import run_on_processes
from eetrain.testing.runs import write_run
from eetrain.training.command import RunCLI

OVERLAY = Path(__file__).parents[2] / "configs" / "strategy" / "pipeline.yaml"
STRATEGY = "--trainer.strategy."


def fit(folder, *settings):
    pipeline = ["-c", str(OVERLAY), "--trainer.devices=2", f"{STRATEGY}micro_batches=2"]
    course = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    RunCLI(["fit", "-c", str(folder / "base.yaml"), *pipeline, *course, *map(str, settings)])


def cases(folder):
    """Name of the case -> folder of the run and settings."""
    checkpoint = ("--ckpt_path", folder / "run" / "checkpoints" / "last.ckpt", "--trainer.max_steps=2")
    shallow = folder / "shallow" / "run" / "checkpoints" / "last.ckpt"
    return {
        "more stages than blocks": (folder / "one", ["--model.exits.layers=[1]"]),
        "exits beyond the blocks": (folder, ["--model.exits.layers=[1,9]"]),
        "an objective that does not fit": (folder, ["--model.objective.weights=[0.1,0.2,0.3]"]),
        "routers": (folder / "experts", []),
        "another type": (folder, ["--model.backbone.dtype=bfloat16"]),
        "nothing to train": (
            folder,
            ["--model.exits.head=tied", "--model.tuning=frozen", "--model.objective=eetrain.objectives.EETuning"],
        ),
        "other exits": (folder, [*checkpoint, "--model.exits.layers=[1,3]"]),
        "other shapes": (folder / "wide", checkpoint),
        "another optimizer": (folder, ["--ckpt_path", shallow, "--trainer.max_steps=2"]),
        "a single file": (folder, ["--ckpt_path", folder / "alone" / "checkpoints" / "last.ckpt"]),
    }


def provoke(folder):
    """Two runs that end well, and the errors of those that do not."""
    fit(folder)
    # Blocks 3 and 4 do not learn here: the last stage will find nothing of its optimizer.
    fit(folder, "--model.objective.full_weight=0", "--run", folder / "shallow" / "run")
    found = {}
    for name, (base, settings) in cases(folder).items():
        try:
            fit(base, *settings, "--run", folder / "refused" / name)
        except Exception as error:
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


OTHER_MODEL = "Resume with the settings of model.backbone, exits, tuning and lora it was written with."
EXPECTED = {
    "more stages than blocks": (
        TopologyError,
        "stages=2, but the backbone has 1 blocks and every stage needs one.",
        "Set stages to 1 or fewer.",
    ),
    "exits beyond the blocks": (
        ConfigError,
        "Exits after blocks [1, 9]: [9] outside 1..4, the blocks of this backbone.",
        "Blocks count from 1; an exit stands after the block it names.",
    ),
    "an objective that does not fit": (
        ConfigError,
        "weights has 3 entries and the model has 2 exits, at layers [1, 2].",
        "give one weight per exit, shallowest first, or a single number for all of them.",
    ),
    "routers": (
        ConfigError,
        "The auxiliary loss of a mixture of experts is a product of sums over all blocks, which the stages of a "
        "pipeline cannot add up.",
        "Set model.router_loss=false, or use a strategy without stages.",
    ),
    "another type": (
        ConfigError,
        "trainer.strategy.init_args.precision=float32, but the model has parameters in bfloat16.",
        "Set model.backbone.dtype=float32; the strategy's precision decides about the rest.",
    ),
    "nothing to train": (
        ConfigError,
        "There is nothing to train: the backbone is frozen and the exits have no parameters.",
        "Set model.exits.head to norm, mlp or block, or model.tuning to full or lora.",
    ),
    "other exits": (
        CheckpointError,
        "The checkpoint does not fit the model of this run: 1 weights missing in it (first "
        "model.exits.3.norm.weight), 1 weights unknown to this run (first model.exits.2.norm.weight).",
        OTHER_MODEL,
    ),
    "other shapes": (
        CheckpointError,
        "The checkpoint does not fit the model of this run: 12 weights of another shape (first "
        "model.backbone.model.layers.0.mlp.down_proj.weight).",
        OTHER_MODEL,
    ),
    "another optimizer": (
        CheckpointError,
        "The checkpoint holds no optimizer state of model.backbone.model.layers.2.self_attn.q_proj.weight, which this "
        "run trains.",
        "Resume with the settings of model.tuning and model.objective it was written with.",
    ),
    "a single file": (
        CheckpointError,
        "{folder}/alone/checkpoints/last.ckpt is a single file, and PipelineStrategy resumes from checkpoints that are "
        "folders.",
        "Resume with the strategy that wrote it, or export it and set model.backbone.path.",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_process_raises_the_same_before_training(errors, name):
    folder, of_ranks = errors
    assert list(EXPECTED) == list(cases(folder))
    kind, message, hint = EXPECTED[name]
    for found in of_ranks:
        assert (type(found[name]), found[name].message, found[name].hint) == (
            kind,
            message.format(folder=folder),
            hint,
        )
