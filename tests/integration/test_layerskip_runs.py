"""LayerSkip from the command line: resume with dropout and every curriculum, overlays, settings that are refused."""

from pathlib import Path

import pytest
import torch
import yaml
from comparing import assert_same

from eetrain.cli import main
from eetrain.testing.runs import write_run

OVERLAYS = Path(__file__).parents[2] / "configs" / "objective"
KEPT = ["--checkpoint.every_n_train_steps", 2, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "{step}"]
DROPOUT = ["--model.objective.dropout.rate", 0.5, "--model.objective.dropout.time", "exponential"]
ROTATIONAL = ["--model.objective.period", 3]
GRADUAL = ["--model.objective.curriculum", "gradual", "--model.objective.period", "null"]


def fit(base, *settings, overlay="layerskip"):
    return main(["fit", *map(str, ["-c", base, "-c", OVERLAYS / f"{overlay}.yaml", *settings])])


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("packing", [[], ["--data.packing", "true", "--data.max_length", 24]])
@pytest.mark.parametrize("curriculum", [ROTATIONAL, GRADUAL])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, curriculum, packing):
    base = write_run(tmp_path)
    course = [*curriculum, *DROPOUT, *packing, *KEPT, "--data.batch_size", 2, "--model.optimizer.lr", 0.01]
    assert fit(base, *course) == 0
    middle = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    assert fit(base, *course, "--run", tmp_path / "again", "--ckpt_path", middle, "--seed_everything", 99) == 0
    whole, resumed = (load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "again"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "eetrain"):
        assert_same(whole[part], resumed[part], part)
    before, name = load(middle)["state_dict"], "model.backbone.model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(before[name], whole["state_dict"][name])
    # Without dropout the same course ends elsewhere.
    assert fit(base, *course, "--model.objective.dropout", "null", "--run", tmp_path / "plain") == 0
    assert not torch.equal(
        load(tmp_path / "plain" / "checkpoints" / "last.ckpt")["state_dict"][name], whole["state_dict"][name]
    )


@pytest.mark.parametrize("overlay", ["layerskip", "lite", "layerdrop", "pld"])
def test_every_overlay_of_the_objective_trains(tmp_path, overlay, capsys):
    base = write_run(tmp_path)
    assert fit(base, overlay=overlay) == 0
    assert yaml.safe_load((OVERLAYS / f"{overlay}.yaml").read_text())["model"]["objective"]["class_path"] == (
        "eetrain.objectives.LayerSkip"
    )
    exits = ["exit_1", "exit_2"] if overlay in ("layerskip", "lite") else []
    table = capsys.readouterr().err.split("depth ")[1].splitlines()[1:]
    assert [line.split()[0] for line in table if line.strip()] == [*exits, "full"]


def test_a_trial_run_has_a_length_too(tmp_path):
    assert fit(write_run(tmp_path), *GRADUAL, *DROPOUT, "--trainer.fast_dev_run", 1) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["--model.objective.dropout.rate", "1.5"],
            ["dropout.rate=1.5.", "HINT: A probability is a number from 0 to 1."],
        ),
        (
            ["--model.objective.period", "0"],
            ["curriculum=rotational and period=0.", "HINT: curriculum=rotational takes"],
        ),
        (
            [*GRADUAL, "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"],
            [
                "this run has no end (curriculum_steps is not set).",
                "HINT: Set model.objective.init_args.curriculum_steps",
            ],
        ),
    ],
)
def test_settings_that_make_no_sense_are_one_line_and_a_hint(tmp_path, settings, words, capsys):
    assert fit(write_run(tmp_path), *settings) in (1, 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error
