"""Whole runs through the command line, in this process: resume, stop, precision, what a checkpoint holds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from comparing import assert_same
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from eetrain.cli import main
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.testing.runs import write_run
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule

CONFIGS = Path(__file__).parents[2] / "configs"


def fit(base, *settings):
    return main(["fit", "-c", str(base), *map(str, settings)])


def load(path):
    return torch.load(path, weights_only=True)


# 24 rows in batches of 4 make an epoch of 6 steps. Steps 2 and 4 lie inside an epoch, 6 at its end, 8 in the next one.
@pytest.mark.parametrize(("stop", "steps"), [(2, 4), (6, 8)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, stop, steps):
    base = write_run(tmp_path, "gpt2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.3, "embd_pdrop": 0.3}))
    course = [
        *("--trainer.max_steps", steps, "--trainer.accumulate_grad_batches", 1, "--model.optimizer.lr", 0.01),
        *("--model.optimizer.schedule", "cosine", "--model.optimizer.warmup_steps", 3),
        *("--model.objective.schedule", "linear", "--model.objective.schedule_steps", 5),
        *("--checkpoint.every_n_train_steps", stop, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "{step}"),
    ]
    assert fit(base, *course) == 0
    middle = tmp_path / "run" / "checkpoints" / f"step={stop}.ckpt"
    assert fit(base, *course, "--run", tmp_path / "again", "--ckpt_path", middle, "--seed_everything", 99) == 0
    whole, resumed = (load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "again"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "eetrain", "CausalLMDataModule"):
        assert_same(whole[part], resumed[part], part)
    before = load(middle)
    assert before["global_step"] == stop
    assert resumed["global_step"] == steps
    assert not torch.equal(
        before["state_dict"]["model.exits.1.norm.weight"], whole["state_dict"]["model.exits.1.norm.weight"]
    )


def test_dropout_is_on_in_training_and_follows_the_seed(tmp_path):
    base = write_run(tmp_path, "gpt2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.3}))
    weights = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert fit(base, "--run", tmp_path / run, "--seed_everything", seed, "--trainer.limit_val_batches", 0) == 0
        weights.append(load(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"]["model.exits.1.norm.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_two_processes_from_the_command_line_resume_bitwise(tmp_path):
    base = write_run(tmp_path, "gpt2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.3}))
    ddp = ["-c", CONFIGS / "strategy" / "ddp.yaml", "--trainer.devices", 2, "--trainer.limit_val_batches", 0]
    kept = ["--checkpoint.every_n_train_steps", 2, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "{step}"]
    again = ["--run", tmp_path / "again", "--ckpt_path", tmp_path / "run" / "checkpoints" / "step=2.ckpt"]
    for extra in ([], again):
        words = map(str, ["fit", "-c", base, *ddp, *kept, *extra])
        subprocess.run([sys.executable, "-m", "eetrain", *words], check=True, capture_output=True, timeout=120)
    whole, resumed = (load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "again"))
    for part in ("state_dict", "optimizer_states", "global_step", "eetrain", "CausalLMDataModule"):
        assert_same(whole[part], resumed[part], part)


class PressCtrlC(Callback):
    """Press Ctrl-C in the middle of the third step."""

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_whole_steps_and_says_how_to_resume(tmp_path, capfd):
    base = write_run(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    pressed = ["--trainer.callbacks", json.dumps({"class_path": f"{__name__}.PressCtrlC"})]
    try:
        assert fit(base, "--trainer.max_steps", 5, *pressed) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (
        f"Stopped by SIGINT after step 3; {last} is whole. Go on with the same command and --resume auto."
        in capfd.readouterr().err
    )
    assert load(last)["global_step"] == 3
    assert fit(base, "--trainer.max_steps", 5, "--resume", "auto") == 0
    assert fit(base, "--trainer.max_steps", 5, "--run", tmp_path / "whole") == 0
    whole = load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert_same(load(last)["state_dict"], whole["state_dict"])
    assert_same(load(last)["optimizer_states"], whole["optimizer_states"])


def test_a_frozen_backbone_is_neither_changed_nor_stored(tmp_path):
    base = write_run(tmp_path)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert fit(base, "-c", CONFIGS / "objective" / "ee_tuning.yaml", "--model.backbone.load", "exits") == 0
    stored = load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert set(stored["state_dict"]) == {"model.exits.1.norm.weight", "model.exits.2.norm.weight"}
    assert stored["eetrain"]["frozen_backbone"] == str(tmp_path / "model")
    assert stored["hyper_parameters"]["exits"]["layers"] == [1, 2]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files
    frozen = [*("-c", CONFIGS / "objective" / "ee_tuning.yaml"), "--trainer.max_steps", 6, "--ckpt_path", "last"]
    assert fit(base, *frozen) == 0, "resuming completes the state from the backbone's folder"


def test_lora_stores_adapters_and_exits_only_and_comes_back(tmp_path, capsys):
    base = write_run(tmp_path)
    assert fit(base, "-c", CONFIGS / "peft" / "lora.yaml", "--json") == 0
    trained = json.loads(capsys.readouterr().out)["metrics"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    names = set(load(last)["state_dict"])
    assert len(names) > 2
    assert all("lora_" in name or name.startswith("model.exits.") for name in names)
    settings = ["--ckpt_path", str(last), "--data.tokenizer", str(tmp_path / "model"), "--run", str(tmp_path / "t")]
    held_out = str(tmp_path / "eval.jsonl")
    assert main(["test", *settings, "--data.test", held_out, "--trainer.accelerator", "cpu", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)["metrics"]
    for name in ("nll/exit_1", "nll/exit_2", "nll/full", "accuracy/exit_2", "agreement/exit_1", "ece/full"):
        assert tested[f"test/{name}"] == pytest.approx(trained[f"val/{name}"], rel=1e-5), name


def test_a_run_from_scratch_can_be_built_again(tmp_path):
    base = write_run(tmp_path)
    settings = yaml.safe_load(base.read_text())
    small = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    small |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    settings["model"]["backbone"] = {"config": small}
    base.write_text(yaml.safe_dump(settings))
    assert fit(base) == 0
    stored = load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert stored["hyper_parameters"]["backbone"]["config"] == small
    assert "model.backbone.model.layers.2.mlp.up_proj.weight" in stored["state_dict"]


def test_a_checkpoint_of_other_exits_is_refused(tmp_path, capsys):
    base = write_run(tmp_path)
    assert fit(base) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert fit(base, "--model.exits.layers", "[1,3]", "--ckpt_path", last, "--run", tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert "error: The checkpoint does not fit the model of this run: 1 weights missing in it (first " in error
    assert "model.exits.3.norm.weight" in error
    assert "HINT: Resume with the settings of model.backbone" in error


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_trains_close_to_float32(tmp_path, capsys, precision):
    base = write_run(tmp_path)
    losses = []
    for overlay in ([], ["-c", CONFIGS / "precision" / f"{precision}.yaml"]):
        assert fit(base, *overlay, "--run", tmp_path / str(len(losses)), "--json") == 0
        losses.append(json.loads(capsys.readouterr().out)["metrics"])
    assert losses[1]["train/loss"] != losses[0]["train/loss"]
    assert losses[1]["train/loss"] == pytest.approx(losses[0]["train/loss"], rel=2e-2)
    dtype = load(tmp_path / "1" / "checkpoints" / "last.ckpt")["state_dict"]["model.exits.1.norm.weight"].dtype
    assert dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


class TotalLoss(Callback):
    """Keep the exits' gradients of the first optimizer step."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen = self.seen or {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def fit_plainly(batches, **trainer):
    model = MultiExitModel(tiny_model(), ExitConfig(layers=[1, 2]))
    module, keep = EarlyExitModule.from_model(model), TotalLoss()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    lightning.Trainer(max_steps=1, callbacks=[keep], enable_checkpointing=False, **quiet, **trainer).fit(
        module, DataLoader(batches, batch_size=None)
    )
    return keep.seen


def test_accumulated_batches_are_one_large_batch_without_the_command_line():
    ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(3)]
    accumulated = fit_plainly(batches, accumulate_grad_batches=2)
    at_once = fit_plainly([{"input_ids": ids, "labels": ids}])
    assert len(accumulated) > 30
    for name in at_once:
        torch.testing.assert_close(accumulated[name], at_once[name], rtol=1e-9, atol=1e-12)


def test_predictions_are_written_as_text(tmp_path):
    base = write_run(tmp_path)
    assert fit(base) == 0
    predict = ["--model.predict_policy", "always:1", "--model.predict_max_new_tokens", "3", "--ckpt_path", "last"]
    assert main(["predict", "-c", str(base), *predict]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(7))
    assert all(len(row["ids"]) == 3 and isinstance(row["text"], str) for row in rows)


def test_wandb_continues_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    base = write_run(tmp_path)
    overlay = ["-c", CONFIGS / "logger" / "wandb.yaml"]
    assert fit(base, *overlay) == 0
    import wandb

    first = wandb.run.id
    wandb.finish()
    assert fit(base, *overlay, "--trainer.max_steps", 6, "--ckpt_path", "last") == 0
    assert (wandb.run.id, wandb.run.settings.resume) == (first, "allow")
    wandb.finish()
    assert (tmp_path / "run" / "wandb_id").read_text() == first
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")} == {first}
