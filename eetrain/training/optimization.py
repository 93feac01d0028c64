"""Parameter groups and the learning rate's course, the latter as pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from eetrain.errors import ConfigError
from eetrain.training.settings import OptimizerConfig, Schedule

BACKBONE_PREFIX = "model.backbone."
_GATES_PREFIX = "model.gates."


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters in up to six groups: backbone, exits and gates, decaying and not.

    Args:
        named: names as in the checkpoint, ``model.backbone.``, ``model.exits.`` and ``model.gates.``.
        config: rates and decay.

    Raises:
        ConfigError: nothing is trainable.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            members.setdefault((_part(name), parameter.dim() > 1), []).append(parameter)
    if not members:
        raise ConfigError(
            "There is nothing to train: the backbone is frozen and the exits have no parameters.",
            hint="Set model.exits.head to norm, mlp or block, or model.tuning to full or lora.",
        )
    rates = {
        "backbone": config.lr,
        "exits": config.lr * config.exits_lr_multiplier,
        "gates": config.lr * config.gates_lr_multiplier,
    }
    return [
        {"params": members[key], "name": key[0], "lr": rates[key[0]], "weight_decay": config.weight_decay * key[1]}
        for key in sorted(members)
    ]


def _part(name: str) -> str:
    if name.startswith(BACKBONE_PREFIX):
        return "backbone"
    return "gates" if name.startswith(_GATES_PREFIX) else "exits"


def build_adamw(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(named, config), lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(step: int, *, warmup: int, total: int, schedule: Schedule, floor: float) -> float:
    """Learning rate of optimizer step ``step`` (from 0) relative to the peak.

    With ``p = (step - warmup) / (total - warmup)`` cut to ``[0, 1]``::

        warm-up:  (step + 1) / warmup
        linear:   1 - (1 - floor) p
        cosine:   floor + (1 - floor) (1 + cos(pi p)) / 2

    Args:
        step: optimizer step.
        warmup: steps of the warm-up.
        total: step at which the schedule reaches ``floor``.
        schedule: its form.
        floor: smallest factor after the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, run_steps: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's course as a torch scheduler, to be stepped with the optimizer.

    Args:
        optimizer: whose groups it scales.
        config: its form.
        run_steps: optimizer steps of the whole run; infinite if the run has no end.

    Raises:
        ConfigError: a schedule that needs the end of an endless run.
    """
    total = float(config.schedule_steps or run_steps)
    if math.isinf(total):
        if config.schedule != "constant" or config.warmup_fraction:
            raise ConfigError(
                f"model.optimizer.schedule={config.schedule} with warmup_fraction={config.warmup_fraction} needs the "
                "number of steps, but the run has no end.",
                hint="Set trainer.max_steps, trainer.max_epochs or model.optimizer.schedule_steps.",
            )
        total = config.warmup_steps
    warmup = config.warmup_steps or round(config.warmup_fraction * total)

    def factor(step: int) -> float:
        return lr_factor(step, warmup=warmup, total=int(total), schedule=config.schedule, floor=config.min_lr_ratio)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
