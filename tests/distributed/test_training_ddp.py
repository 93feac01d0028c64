"""Two processes are one process with the batches of both."""

import functools

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import EETuning, MultiExitCrossEntropy, SkipDecode
from eetrain.testing.processes import run_on_processes
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule

OBJECTIVES = {
    "joint": (lambda: MultiExitCrossEntropy([0.25, 0.5]), "full"),
    "without the full depth": (lambda: MultiExitCrossEntropy(full_weight=0.0), "full"),
    "frozen": (EETuning, "frozen"),
    "scheduled": (lambda: SkipDecode("skipdecode:max=3,min=2,length=4", prompt_tokens=2), "full"),
}


class KeepGradients(Callback):
    """Keep the gradients of the first optimizer step."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen = self.seen or {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def rows():
    """Eight rows with very different numbers of scored tokens."""
    ids = torch.randint(3, 61, (8, 9), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(9) < torch.tensor([9, 2, 7, 4, 9, 3, 8, 2])[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~scored, -100), "attention_mask": scored.long()}


def part(rank, num):
    """Every ``num``-th row, in two batches."""
    mine = {name: value[rank::num] for name, value in rows().items()}
    half = len(mine["labels"]) // 2
    return [{name: value[:half] for name, value in mine.items()}, {name: value[half:] for name, value in mine.items()}]


def run(name):
    rank, num = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    objective, tuning = OBJECTIVES[name]
    scheduled = name == "scheduled"  # then block 2 of the four never runs
    exits = ExitConfig(layers=[] if scheduled else [1, 2])
    module = EarlyExitModule.from_model(MultiExitModel(tiny_model(), exits), objective(), tuning=tuning)
    ddp = "ddp_find_unused_parameters_true" if scheduled else "ddp"
    keep = KeepGradients()
    loader = functools.partial(DataLoader, part(rank, num), batch_size=None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=num,
        strategy=ddp if num > 1 else "auto",
        callbacks=[keep],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.fit(module, loader(), loader())
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {key: value.numpy() for key, value in keep.seen.items()}, logged


def run_all():
    return {name: run(name) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def of_two():
    return run_on_processes(run_all, 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_and_metrics_of_two_processes_are_those_of_one(name, of_two):
    gradients, logged = run(name)
    for results in of_two:
        of_rank, logged_by_rank = results[name]
        assert of_rank.keys() == gradients.keys()
        for key, grad in gradients.items():
            torch.testing.assert_close(torch.from_numpy(of_rank[key]), torch.from_numpy(grad), rtol=1e-9, atol=1e-12)
        assert logged_by_rank == pytest.approx(logged, rel=1e-5)
    of_exits = set() if name == "scheduled" else {"val/ece/exit_1", "val/agreement/exit_2"}
    assert {"val/nll/full", "train/loss", "train/tokens"} | of_exits <= logged.keys()
    assert logged["train/tokens"] == 44
