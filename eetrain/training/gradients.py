"""Gradients of the next optimizer step, wherever a strategy keeps them, and how to make it no step at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

Gradients = Iterable[tuple[Tensor, Tensor]]


@runtime_checkable
class OwnSteps(Protocol):
    """A strategy whose engine keeps gradients, masters and moments in places of its own, and steps by itself."""

    def gradients(self) -> Gradients:
        """Parameters with what this process holds of their gradients."""

    def drop_step(self) -> None:
        """Let the optimizer's next step change nothing."""


def step_gradients(trainer: Trainer) -> Gradients:
    """Parameters with this process's part of their gradients, to be asked in ``on_before_optimizer_step``."""
    return trainer.strategy.gradients() if isinstance(trainer.strategy, OwnSteps) else _plain_gradients(trainer)


def drop_step(trainer: Trainer) -> None:
    """Let the step that is about to come change neither weights nor moments nor AdamW's counts.

    AdamW passes over parameters without a gradient; with a gradient of zero it would still decay weights and moments.
    """
    if isinstance(trainer.strategy, OwnSteps):
        trainer.strategy.drop_step()
        return
    for parameter, _ in _plain_gradients(trainer):
        parameter.grad = None


@torch.no_grad()
def are_finite(gradients: Gradients, device: torch.device) -> Tensor:
    """Whether the norm of all gradients together is finite, as a tensor, without waiting for the device.

    The norm and not each number: AdamW squares gradients, and squares that overflow stay in its second moment for good.
    """
    norms = torch.nn.utils.get_total_norm([grad for _, grad in gradients])
    return torch.isfinite(norms).to(device)


def bad_parameters(gradients: Gradients, module: nn.Module) -> list[str]:
    """Names of parameters with a gradient that is not finite, in the order of the module."""
    bad = {id(parameter) for parameter, grad in gradients if not bool(torch.isfinite(grad.norm()))}
    return [name for name, parameter in module.named_parameters() if id(parameter) in bad]


def _plain_gradients(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, parameter.grad
