"""Checkpoints of sharded training: resumed bitwise, on another ZeRO stage, and on another number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from eetrain.cli import main
from eetrain.errors import CheckpointError
from eetrain.testing.processes import run_on_processes
from eetrain.testing.runs import write_run
from eetrain.training.checkpoint_folder import CheckpointFolder, save_folder
from eetrain.training.processes import present_processes

CONFIGS = Path(__file__).parents[2] / "configs"
SHARDED = "--trainer.strategy.stage3_param_persistence_threshold=0"
# 24 rows in batches of 4 make an epoch of 6 steps: all of it happens inside an epoch.
GATES = [
    *("--model.objective=eetrain.objectives.JointGating", "--model.objective.warmup_steps=1"),
    *("--model.objective.phase_steps=1", "--model.exits.gates.cost_weights=[0.5]"),
]
COURSE = [
    *("--trainer.max_steps", "4", "--trainer.limit_val_batches", "0", "--trainer.gradient_clip_val", "1"),
    *("--model.optimizer.lr", "0.01", "--model.optimizer.eps", "1e-3"),
    *("--model.optimizer.schedule", "cosine", "--model.optimizer.warmup_steps", "2"),
    *("--checkpoint.every_n_train_steps", "2", "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{step}"),
]


def fit(base, stage, num, *settings):
    overlay = CONFIGS / "strategy" / ("zero3.yaml" if stage == 3 else "zero2.yaml")
    topology = [
        f"--trainer.devices={num}",
        f"--data.batch_size={4 // num}",
        f"--trainer.strategy.stage={stage}",
        SHARDED,
    ]
    assert main(["fit", "-c", str(base), "-c", str(overlay), *topology, SHARDED, *COURSE, *map(str, settings)]) == 0


def write_base(folder):
    """A model with tied embeddings and dropout."""
    base = write_run(folder, "gpt2")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.3, "embd_pdrop": 0.3}))
    return base


def run_and_resume(base, stage, others, *settings):
    """Four steps at once; two of them again, at the same and at other stages."""
    folder = base.parent
    middle = folder / "whole" / "checkpoints" / "step=2.ckpt"
    fit(base, stage, 2, "--run", folder / "whole", *settings)
    for again in (stage, *others):
        fit(base, again, 2, "--run", folder / f"at{again}", "--ckpt_path", middle, "--seed_everything", 99, *settings)


def refused(base):
    """What is said of checkpoints that no fit can go on from."""
    torch.save({}, base.parent / "single.ckpt")
    processes = present_processes()
    save_folder(base.parent / "weights.ckpt", {}, {"global_step": 1}, topology={}, processes=processes)
    found = []
    for name in ("single.ckpt", "weights.ckpt"):
        with patch.dict(os.environ, EETRAIN_DEBUG="1"), pytest.raises(CheckpointError) as caught:
            fit(base, 3, 2, "--ckpt_path", base.parent / name)
        found.append((caught.value.message, caught.value.hint))
    return found


def run_narrow_and_wide(base, stage, others):
    """In bfloat16, and two of the steps in float32."""
    run_and_resume(base, stage, others, "--trainer.strategy.precision=bfloat16")
    middle = base.parent / "whole" / "checkpoints" / "step=2.ckpt"
    fit(base, stage, 2, "--run", base.parent / "wide", "--ckpt_path", middle)


def run_resume_and_be_refused(base):
    run_and_resume(base, 3, [2])
    return refused(base)


def last(run):
    return CheckpointFolder.open(run / "checkpoints" / "last.ckpt")


def assert_same(one, two, tolerance=0.0):
    assert one.names == two.names
    for name in one.names:
        found, wanted = one.tensor(name), two.tensor(name)
        assert found.dtype == wanted.dtype, name
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    states = [folder.trainer_state() for folder in (one, two)]
    for part in ("global_step", "lr_schedulers", "eetrain", "CausalLMDataModule", "loops"):
        assert states[0][part] == states[1][part], part


def test_resumes_bitwise_at_its_stage_and_closely_at_another(tmp_path):
    refusals = run_on_processes(run_resume_and_be_refused, 2, write_base(tmp_path))
    whole = last(tmp_path / "whole")
    assert whole.topology == {"stages": 1, "replicas": 2, "zero_stage": 3}
    assert whole.global_step == 4
    weight = "model.backbone.transformer.h.0.attn.c_attn.weight"
    tied = {"model.backbone.transformer.wte.weight", "model.backbone.lm_head.weight"}
    assert {weight, *tied, f"optimizer/exp_avg/{weight}", f"optimizer/exp_avg_sq/{weight}"} <= whole.names
    assert not any(name.startswith("optimizer/master/") for name in whole.names)
    assert sum(f"optimizer/exp_avg/{name}" in whole.names for name in tied) == 1
    assert whole.tensor(f"optimizer/step/{weight}") == 4
    middle = CheckpointFolder.open(tmp_path / "whole" / "checkpoints" / "step=2.ckpt")
    assert not torch.equal(middle.tensor(weight), whole.tensor(weight))
    assert_same(last(tmp_path / "at3"), whole)
    assert_same(last(tmp_path / "at2"), whole, 1e-6)
    for texts in refusals:
        assert texts == [
            (
                f"{tmp_path}/single.ckpt is a single file, and ZeroStrategy resumes from checkpoints that are folders.",
                "Resume with the strategy that wrote it, or export it and set model.backbone.path.",
            ),
            (
                f"{tmp_path}/weights.ckpt holds weights only, nothing to resume a fit from.",
                "Resume from a checkpoint that was written during a fit.",
            ),
        ]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "settings"), [(1, []), (2, GATES), (3, GATES)])
def test_resumes_bitwise_and_then_at_another_stage(tmp_path, stage, settings):
    other = 3 if stage < 3 else 1
    run_on_processes(run_and_resume, 2, write_base(tmp_path), stage, [other], *settings)
    whole = last(tmp_path / "whole")
    assert_same(last(tmp_path / f"at{stage}"), whole)
    assert_same(last(tmp_path / f"at{other}"), whole, 1e-5)
    if settings:  # warm-up, gates, exits, gates
        assert whole.tensor("optimizer/step/model.gates.1.output.weight") == 2
        assert whole.tensor("optimizer/step/model.exits.1.norm.weight") == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_keeps_masters_and_resumes_bitwise(tmp_path, stage):
    base = write_base(tmp_path)
    others = [1 + stage % 3]
    run_on_processes(run_narrow_and_wide, 2, base, stage, others)
    whole = last(tmp_path / "whole")
    assert_same(last(tmp_path / f"at{stage}"), whole)
    name = "model.exits.1.norm.weight"
    assert whole.tensor(name).dtype == torch.bfloat16
    master = whole.tensor(f"optimizer/master/{name}")
    assert torch.equal(master.to(torch.bfloat16), whole.tensor(name))
    assert not torch.equal(master, whole.tensor(name).float())
    assert_same(last(tmp_path / f"at{others[0]}"), whole, 2e-2)
    wide = last(tmp_path / "wide")
    torch.testing.assert_close(wide.tensor(name), master, rtol=0, atol=2e-2)
    assert not any(name.startswith("optimizer/master/") for name in wide.names)


@pytest.mark.slow
def test_from_the_command_line_on_two_processes_and_on_one_after_that(tmp_path):
    base = write_run(tmp_path)
    middle = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    zero = ["-c", CONFIGS / "strategy" / "zero3.yaml", SHARDED, *COURSE]
    runs = {
        "run": [2, "--data.batch_size", 2],
        "two": [2, "--data.batch_size", 2, "--ckpt_path", middle],
        "one": [1, "--ckpt_path", middle, "--trainer.strategy.stage", 1],
    }
    for name, settings in runs.items():
        words = ["fit", "-c", base, *zero, "--run", tmp_path / name, "--json", "--trainer.devices", *settings]
        done = subprocess.run(
            [sys.executable, "-m", "eetrain", *map(str, words)], check=True, capture_output=True, text=True, timeout=120
        )
        assert json.loads(done.stdout)["run"] == str(tmp_path / name), "stdout holds one JSON object and nothing else"
    whole = last(tmp_path / "run")
    assert_same(last(tmp_path / "two"), whole)
    assert last(tmp_path / "one").topology == {"stages": 1, "replicas": 1, "zero_stage": 1}
    for name in whole.names:
        torch.testing.assert_close(last(tmp_path / "one").tensor(name), whole.tensor(name), rtol=0, atol=1e-6)
