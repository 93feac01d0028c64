"""Joint gating from the command line: overlay, resume inside a phase, table, export, evaluation of a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from eetrain import MultiExitModel
from eetrain.cli import main
from eetrain.exits import GateConfig
from eetrain.testing.runs import write_run

OVERLAY = Path(__file__).parents[2] / "configs" / "objective" / "joint_gating.yaml"
COURSE = (
    *("--trainer.max_steps", "6", "--model.objective.warmup_steps", "1", "--model.objective.phase_steps", "3"),
    *("--model.optimizer.lr", "0.01", "--model.optimizer.schedule", "cosine"),
    *("--checkpoint.every_n_train_steps", "3", "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{step}"),
)


def fit(base, *settings):
    return main(["fit", "-c", str(base), "-c", str(OVERLAY), *map(str, settings)])


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    base = write_run(folder)
    gates = ("--model.exits.gates.cost_weights", "[0.1,1]", "--model.exits.gates.hidden", 3)
    assert fit(base, *COURSE, *gates, "--model.exits.gates.position_length", 8) == 0
    return folder


def flat(tree, where=""):
    """Leaves of nested dicts and lists by their path."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: leaf for name, part in items for key, leaf in flat(part, f"{where}/{name}").items()}
    return {where: tree}


def test_a_run_resumed_inside_the_phase_of_the_gates_is_bitwise_the_uninterrupted_one(folder):
    # Step 0 is the warm-up, steps 1 to 3 are the gates'; the checkpoint was written after step 2.
    middle, again = folder / "run" / "checkpoints" / "step=3.ckpt", folder / "again"
    config = folder / "run" / "config.yaml"
    assert main(["fit", "-c", str(config), "--run", str(again), "--ckpt_path", str(middle)]) == 0
    whole, resumed = (load(path / "checkpoints" / "last.ckpt") for path in (folder / "run", again))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "eetrain"):
        one, two = flat(whole[part]), flat(resumed[part])
        assert one.keys() == two.keys()
        for name, value in one.items():
            same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
            assert same, name
    before = load(middle)["state_dict"]
    moved = {name for name, value in whole["state_dict"].items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in moved} == {"backbone", "exits", "gates"}


def test_settings_of_the_gates_are_in_the_checkpoint_and_in_the_configuration(folder):
    wanted = {"cost_weights": [0.1, 1.0], "hidden": 3, "position_length": 8}
    assert load(folder / "run" / "checkpoints" / "last.ckpt")["hyper_parameters"]["exits"]["gates"] == wanted
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["model"]["exits"]["gates"] == wanted


def test_export_carries_the_gates(folder):
    assert main(["export", str(folder / "run"), "--out", str(folder / "out")]) == 0
    model = MultiExitModel.from_pretrained(folder / "out")
    assert model.config.gates == GateConfig([0.1, 1.0], hidden=3, position_length=8)
    stored = load(folder / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    names = [name for name, _ in model.gates.named_parameters()]
    assert len(names) == 8
    assert all(torch.equal(model.gates.get_parameter(name), stored[f"model.gates.{name}"]) for name in names)
    assert any(model.gates.get_parameter(name).any() for name in names if name.endswith("output.weight"))


def test_a_checkpoint_is_validated_with_its_own_gates(folder, capsys):
    last = folder / "run" / "checkpoints" / "last.ckpt"
    assert main(["validate", "-c", str(folder / "run" / "config.yaml"), "--ckpt_path", str(last), "--json"]) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out)["metrics"]
    for weight in ("0.1", "1"):
        shares = [metrics[f"val/gate/{weight}/share/{depth}"] for depth in ("exit_1", "exit_2", "full")]
        assert sum(shares) == pytest.approx(1.0)
        depth = shares[0] + 2 * shares[1] + 4 * shares[2]
        assert metrics[f"val/gate/{weight}/depth"] == pytest.approx(depth, rel=1e-5)
    table = captured.err[captured.err.index("Gates, tokens leave at g >= 0.5") :].splitlines()
    assert table[1].split() == ["cost", "weight", "depth", "nll", "accuracy", "exit_1", "exit_2", "full"]
    assert [line.split()[0] for line in table[2:4]] == ["0.1", "1"]
    assert table[2].split()[1] == f"{metrics['val/gate/0.1/depth']:.4f}"


def test_steps_are_logged_by_phase(folder):
    header, *rows = [line.split(",") for line in (folder / "run" / "metrics.csv").read_text().splitlines()]
    assert {"val/gate/1/nll", "val/gate/0.1/share/full"} <= set(header)
    assert rows


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (["--trainer.max_steps=3"], "the run ends after 3.", "Set warmup_steps and phase_steps of model.objective"),
        (["--model.exits.gates=null"], "JointGating trains gates, and the model has none.", "gates.cost_weights"),
        (
            ["--model.exits.gates.cost_weights=[1,1]"],
            "exits.gates.cost_weights=[1.0, 1.0]: 1.0 stands there",
            "each once",
        ),
        (["--model.objective.exit_costs={1: 0.5}"], "exit_costs names layers [1]", "latency of every exit"),
    ],
)
def test_bad_use_names_what_was_set_and_what_to_do(folder, tmp_path, capsys, settings, message, hint):
    assert fit(folder / "base.yaml", *COURSE, "--run", tmp_path, *settings) == 2
    err = capsys.readouterr().err
    said = next(line for line in err.splitlines() if line.startswith("error: "))
    hinted = next(line for line in err.splitlines() if line.startswith("HINT: "))
    assert message in said
    assert hint in hinted
