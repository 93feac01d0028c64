"""The full depth's features on their way back to the exits of earlier stages, as the gradient of a tensor of zeros.

Exits that are distilled need the last stage's output, and a stage computes the losses of its exits in its backward
step, when that output is long there. So a *carrier* travels forward beside the hidden state, and what the engine takes
for its gradient are the normed features of the full depth. Every stage reads them and hands them on. The engine is the
stock one and there is no message of another kind: per micro-batch a second tensor of the hidden state's size each way.

The engine runs backward from one received gradient after the other, in the order in which the tensors travelled, so the
carrier travels in front of the hidden state. Were it to run both at once, autograd would begin with the node that was
made last, which is the carrier's.

Shape suffixes: ``B`` rows, ``T`` positions, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eetrain.parallel.stage import MicroBatch


def carrier_like(hidden_BTD: Tensor) -> Tensor:
    """A carrier, on the first stage."""
    return torch.zeros_like(hidden_BTD, requires_grad=True)


def relay(carrier_BTD: Tensor, micro: MicroBatch) -> Tensor:
    """The carrier itself; backward keeps the teacher that comes back in its place for the stage's exits.

    Args:
        carrier_BTD: at the end of a stage, when all else of the stage is in the graph.
        micro: gets ``teacher_BTD``.
    """
    result: Tensor = _Relay.apply(carrier_BTD, micro)  # type: ignore[no-untyped-call]
    return result


class _Relay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier_BTD: Tensor, micro: MicroBatch) -> Tensor:
        ctx.micro = micro
        return carrier_BTD.view_as(carrier_BTD)

    @staticmethod
    def backward(ctx: Any, teacher_BTD: Tensor) -> tuple[Tensor, None]:
        ctx.micro.teacher_BTD = teacher_BTD
        return teacher_BTD, None


def teach(hidden_BTD: Tensor, carrier_BTD: Tensor, features: Callable[[Tensor], Tensor], micro: MicroBatch) -> Tensor:
    """``hidden_BTD`` itself; backward, before all else, sends the full depth's features to where the carrier came from.

    Args:
        hidden_BTD: residual stream after the last block.
        carrier_BTD: from the first stage.
        features: the normed features ``[B, T, D]`` of a hidden state; called once, in backward, without autograd.
        micro: gets ``teacher_BTD``, for the exits of the last stage.
    """
    result: Tensor = _Teach.apply(hidden_BTD, carrier_BTD, features, micro)  # type: ignore[no-untyped-call]
    return result


class _Teach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: Tensor, carrier_BTD: Tensor, features: Callable[[Tensor], Tensor], micro: MicroBatch
    ) -> Tensor:
        ctx.save_for_backward(hidden_BTD)
        ctx.features, ctx.micro, ctx.dtype = features, micro, carrier_BTD.dtype
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        with torch.no_grad():
            teacher_BTD = ctx.features(ctx.saved_tensors[0]).to(ctx.dtype)
        ctx.micro.teacher_BTD = teacher_BTD
        return grad_BTD, teacher_BTD, None, None
