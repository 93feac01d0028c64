"""Short fits with batches that spoil the loss, and what they leave behind: weights, moments, progress."""

import functools
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from eetrain.exits import ExitConfig, GateConfig, MultiExitModel
from eetrain.objectives import JointGating, MultiExitCrossEntropy
from eetrain.parallel import PipelineStrategy, ZeroStrategy
from eetrain.parallel.engine_state import engine_tensors
from eetrain.testing.tiny import tiny_model
from eetrain.training import EarlyExitModule
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.guard import NumberGuard
from eetrain.training.settings import OptimizerConfig

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
NAN = float("nan")


class Spoil(Callback):
    """Multiplies what the head of an exit gives in some batches, on one process.

    Args:
        batches: by number, with the factor.
        rank: of the process; ``None`` for all.
        layer: of the exit.
    """

    def __init__(self, batches, rank=None, layer=3):
        self.batches, self.rank, self.layer, self.factor = batches, rank, layer, None

    def on_fit_start(self, trainer, module):
        if self.rank in (None, trainer.global_rank):
            self.handle = module.model.exits[str(self.layer)].norm.register_forward_hook(self.spoil)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.factor = self.batches.get(int(batch["number"]))

    def spoil(self, module, inputs, output):
        return output if self.factor is None else output * self.factor


class SpoilGradient(Callback):
    """Makes one gradient infinite in one batch, on one process, while the loss stays what it is."""

    def __init__(self, batch, rank=None, name="model.exits.3.norm.weight"):
        self.batch, self.rank, self.name, self.active = batch, rank, name, False

    def on_train_start(self, trainer, module):
        parameter = dict(module.named_parameters())[self.name]
        if self.rank in (None, trainer.global_rank) and parameter.requires_grad and not parameter.is_meta:
            parameter.register_hook(lambda grad: grad * float("inf") if self.active else grad)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.active = int(batch["number"]) == self.batch


class Keep(Callback):
    """Weights, moments and AdamW's counts at the end."""

    def on_train_end(self, trainer, module):
        named = {name: p for name, p in module.named_parameters() if not p.is_meta}
        strategy = trainer.strategy
        if hasattr(strategy, "engine"):
            found = dict(engine_tensors(strategy.engine, named, owner=lambda place: True))
            if getattr(strategy, "gate_trainer", None) is not None:
                found |= dict(strategy.gate_trainer.state_tensors())
        else:
            found = dict(named)
            for name, parameter in named.items():
                state = trainer.optimizers[0].state.get(parameter, {})
                found |= {f"{key}/{name}": value for key, value in state.items()}
        self.found = {name: tensor.detach().float().numpy().copy() for name, tensor in found.items()}


def batches(numbers, replica=0, replicas=1, same=False):
    """Rows with very different numbers of scored tokens; each batch knows its number."""
    found = []
    for number in numbers:
        ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(0 if same else number))
        scored = torch.arange(9) < torch.tensor([9, 2, 7, 4])[:, None]
        rows = {"input_ids": ids, "labels": ids.masked_fill(~scored, -100), "attention_mask": scored.long()}
        found.append({**{name: rows[name][replica::replicas] for name in rows}, "number": torch.tensor(number)})
    return found


def build(gates=False, **optimizer):
    torch.manual_seed(0)
    config = ExitConfig(layers=[1, 3], gates=GateConfig([0.5]) if gates else None)
    objective = JointGating(warmup_steps=1, phase_steps=1) if gates else MultiExitCrossEntropy([0.25, 0.5])
    settings = OptimizerConfig(**{"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, **optimizer})
    return EarlyExitModule.from_model(
        MultiExitModel(tiny_model(dtype=torch.float32), config), objective, optimizer=settings
    )


STRATEGIES = {
    "alone": lambda: "auto",
    "ddp": lambda: "ddp",
    "ddp, gates": lambda: "ddp_find_unused_parameters_true",
    "zero1": lambda: ZeroStrategy(1),
    "zero2": lambda: ZeroStrategy(2),
    "zero3": lambda: ZeroStrategy(3, stage3_param_persistence_threshold=0),
    "zero3, whole": lambda: ZeroStrategy(3),
    "zero2, bf16": lambda: ZeroStrategy(2, "bfloat16"),
    "zero3, bf16": lambda: ZeroStrategy(3, "bfloat16", stage3_param_persistence_threshold=0),
    "zero3, gates": lambda: ZeroStrategy(3, stage3_param_persistence_threshold=0),
    "pipeline": lambda: PipelineStrategy(2, micro_batches=2),
    "pipeline, bf16": lambda: PipelineStrategy(2, micro_batches=2, precision="bfloat16"),
    "pipeline, zero1": lambda: PipelineStrategy(1, micro_batches=2, zero_stage=1),
    "pipeline, gates": lambda: PipelineStrategy(2, micro_batches=2),
}


def fit(
    name, numbers, folder=None, guard=None, spoil=None, resume=None, same=False, optimizer=None, more=(), **trainer
):
    """What is there at the end, and the trainer; ``folder`` is where every second step is saved."""
    rank, num = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    replicas = 1 if name in ("pipeline", "pipeline, bf16", "pipeline, gates") else num
    keep, module = Keep(), build("gates" in name, **(optimizer or {}))
    callbacks = [keep, *([] if spoil is None else [spoil]), *([] if guard is None else [guard]), *more]
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(
                Path(folder), filename="{step}", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False
            )
        )
    built = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=num,
        strategy=STRATEGIES[name](),
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_checkpointing=folder is not None,
        **{**QUIET, **trainer},
    )
    if type(built.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
        built.strategy.checkpoint_io = AtomicCheckpointIO(resuming=True)
    data = batches(numbers, rank % replicas, replicas, same)
    built.fit(module, functools.partial(DataLoader, batch_size=None)(data), ckpt_path=resume, weights_only=True)
    return keep.found, built


def apart(one, two):
    """Names of what is not bitwise the same."""
    assert one.keys() == two.keys(), sorted(one.keys() ^ two.keys())
    return [name for name in two if one[name].tobytes() != two[name].tobytes()]


__all__ = ["NAN", "NumberGuard", "Spoil", "SpoilGradient", "apart", "batches", "build", "fit"]
