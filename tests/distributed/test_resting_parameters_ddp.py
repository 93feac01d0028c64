"""Objectives that leave parameters out of a step, on two processes: these rest, and all else is as on one process."""

import functools

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.objectives import JointGating, SkipDecode
from eetrain.testing.processes import run_on_processes
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule

STEPS = 5
PHASES = ["warmup", "gates", "exits", "gates", "exits"]


class Keep(Callback):
    """Gradients of every step, and all parameters before it."""

    def __init__(self):
        self.gradients, self.states = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.states.append({name: p.detach().numpy().copy() for name, p in module.named_parameters()})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        learning = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
        self.gradients.append({name: grad.numpy().copy() for name, grad in learning})

    def on_train_end(self, trainer, module):
        self.on_train_batch_start(trainer, module, None, 0)


def part(rank, num):
    """Every ``num``-th row of every batch; rows have very different numbers of scored tokens."""
    batches = []
    for seed in range(STEPS):
        ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
        scored = torch.arange(9) < torch.tensor([9, 2, 7, 4])[:, None]
        rows = {"input_ids": ids, "labels": ids.masked_fill(~scored, -100), "attention_mask": scored.long()}
        batches.append({name: value[rank::num] for name, value in rows.items()})
    return batches


def gated():
    # Balance and the rescaling of the exits' phase are by batch, and a batch is another one on one process.
    objective = JointGating(warmup_steps=1, phase_steps=1, class_balance=False)
    return ExitConfig(layers=[1, 2], gates=GateConfig([0.2, 2.0])), objective


def scheduled():
    return ExitConfig(layers=[]), SkipDecode("static:3", prompt_tokens=2)


def run(strategy, settings=gated):
    rank, num = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config, objective = settings()
    module = EarlyExitModule.from_model(MultiExitModel(tiny_model(), config), objective)
    keep, loader = Keep(), functools.partial(DataLoader, part(rank, num), batch_size=None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=num,
        strategy=strategy,
        callbacks=[keep],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.validate(module, loader(), verbose=False)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.fit(module, loader())
    return keep.gradients, keep.states, logged


def refused():
    found = []
    for settings in (gated, scheduled):
        with pytest.raises(ConfigError) as caught:
            run("ddp", settings)
        found.append(str(caught.value))
    return found


def test_resting_parameters_stay_and_processes_agree():
    results = run_on_processes(run, 2, "ddp_find_unused_parameters_true")
    alone, _, wanted = run("auto")
    for gradients, states, logged in results:
        for step, phase in enumerate(PHASES):
            gates = {name for name in states[0] if name.startswith("model.gates.")}
            learning = gates if phase == "gates" else set(states[0]) - gates
            assert set(gradients[step]) == learning
            for name in states[0]:
                assert (states[step][name] != states[step + 1][name]).any() == (name in learning), (step, name)
                assert (states[step][name] == results[0][1][step][name]).all(), "both processes hold the same"
        for step in (0, 1):  # the exits' phase, rescaled by process, comes after these
            for name, grad in alone[step].items():
                found, other = torch.from_numpy(gradients[step][name]), torch.from_numpy(grad)
                torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-9)
        assert logged == pytest.approx(wanted, rel=1e-5)
    assert {"val/gate/0.2/share/exit_1", "val/gate/2/depth", "val/gate/2/nll"} <= wanted.keys()


def test_plain_ddp_is_refused_when_the_fit_starts():
    for texts in run_on_processes(refused, 2):
        assert texts == [
            f"The objective {name} leaves some parameters out of a step, and trainer.strategy=ddp waits for the "
            "gradient of each. HINT: Set trainer.strategy=ddp_find_unused_parameters_true."
            for name in ("JointGating", "SkipDecode")
        ]
