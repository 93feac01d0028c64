"""Groups of parameters that a step leaves out: ZeRO would step them with gradients of zero, which is not to rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from eetrain.training import EarlyExitModule

_RESTS = "rests"


class Rest:
    """Sees which groups of the optimizer got gradients in a step, on any process, and keeps the others from stepping.

    With a gradient of zero AdamW would still decay weights and moments and count the step. Without a gradient it passes
    a parameter over, and so it does with the flat pieces that ZeRO makes of a group.

    Args:
        optimizer: AdamW, before an engine takes it over.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._learned = [False] * len(self._groups)
        self._handles: list[Any] = [optimizer.register_step_pre_hook(_without_gradients)]
        for place, parameters in enumerate(self._groups):
            self._handles += [
                parameter.register_post_accumulate_grad_hook(self._note(place)) for parameter in parameters
            ]

    @classmethod
    def of(cls, module: LightningModule, optimizer: Optimizer) -> Rest | None:
        """What an objective needs that leaves parameters out of a step; ``None`` for others."""
        idles = isinstance(module, EarlyExitModule) and module.objective.lets_rest
        return cls(optimizer) if idles else None

    def settle(self, device: torch.device) -> None:
        """Agree with the other processes before the engine steps, and begin anew."""
        learned = torch.tensor(self._learned, dtype=torch.int32, device=device)
        dist.all_reduce(learned, op=dist.ReduceOp.MAX)
        for group, parameters, learns in zip(self._optimizer.param_groups, self._groups, learned.tolist(), strict=True):
            group[_RESTS] = not learns
            if not learns:
                _forget_gradients(parameters)
        self._learned = [False] * len(self._groups)

    def end(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()

    def _note(self, place: int) -> Any:
        def note(parameter: Tensor) -> None:
            self._learned[place] = True

        return note


def _without_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get(_RESTS):
            for piece in group["params"]:
                piece.grad = None


def _forget_gradients(parameters: list[Any]) -> None:
    """ZeRO-3 keeps the gradient of an earlier step where none came in this one; it would count when clipping."""
    from deepspeed.utils import safe_set_local_grad

    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
