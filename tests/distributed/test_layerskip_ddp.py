"""LayerSkip on two processes with plain DDP: each drops blocks of its own, and gradients are those of one process."""

import functools

import lightning
import torch
import torch.distributed as dist
from layerskip_support import DropsByRow
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.objectives import LayerDropout, LayerSkip
from eetrain.testing.processes import run_on_processes
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule

STEPS = 5


class Keep(Callback):
    """Gradients of every step."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})


def rows(seed):
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
    scored = torch.arange(9) < torch.tensor([9, 4, 7, 5])[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~scored, -100), "attention_mask": scored.long()}


def fit(objective):
    """Gradients of every step, the parameters, and which blocks ran in which row."""
    rank, num = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = MultiExitModel(tiny_model(), ExitConfig(layers=[1, 2, 3], head="mlp"))
    module, keep, drawn = EarlyExitModule.from_model(model, objective), Keep(), []
    draw = objective.active_blocks

    def noted(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    objective.active_blocks = noted
    batches = [{name: value[rank::num] for name, value in rows(seed).items()} for seed in range(STEPS)]
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=num,
        strategy="ddp" if num > 1 else "auto",
        callbacks=[keep],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, functools.partial(DataLoader, batch_size=None)(batches))
    return keep.gradients, {name: p.detach() for name, p in module.named_parameters()}, [a[..., 0] for a in drawn]


def both():
    by_row = fit(DropsByRow("uniform", 1.0, "rotational", 2))
    return by_row, fit(LayerSkip("uniform", 1.0, dropout=LayerDropout(0.5, "uniform")))[2]


def test_two_processes_drop_blocks_of_their_own_and_learn_as_one():
    results = run_on_processes(both, 2)
    gradients, weights, runs = fit(DropsByRow("uniform", 1.0, "rotational", 2))
    (mine, theirs), missing = [result[0][2] for result in results], 0
    for step in range(STEPS):
        assert torch.equal(torch.stack([mine[step], theirs[step]], 2).flatten(1), runs[step]), "rows 0, 1, 2, 3"
        missing += int((mine[step].any(1) != theirs[step].any(1)).sum())
    assert missing, "no block runs on one process only"
    assert not all(run.any(1).all() for run in runs), "every block runs somewhere"
    for (found, after, _), _ in results:
        for step, wanted in enumerate(gradients):
            assert found[step].keys() == wanted.keys() == weights.keys(), "all have gradients, if of zero"
            if step == 0:  # what comes after builds on AdamW's signs of gradients that were rounded elsewhere
                for name, grad in wanted.items():
                    torch.testing.assert_close(found[0][name], grad, rtol=0, atol=1e-9)
        for name, weight in weights.items():
            torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


def test_processes_draw_differently():
    (_, mine), (_, theirs) = run_on_processes(both, 2)
    assert len(mine) == len(theirs) == STEPS
    assert not all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    assert not torch.equal(mine[0], mine[1]), "every batch draws anew"
