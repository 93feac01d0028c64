"""Losses on intermediate stages, without a word to the pipeline's engine.

A stage sends its hidden state on and gets the gradient of what lies behind. An exit's loss is *injected*: the hidden
state passes through an autograd node that is the identity forward and adds the exit's own gradient backward. The loss
itself is computed in backward, from the hidden state that the next block keeps anyway: in flight, a micro-batch holds
neither logits nor gradients of an output matrix. Source: EE-LLM (arXiv 2312.04916), section on backpropagation through
pipeline stages, which defers the exits' forward in the same way.

Shape suffixes: ``B`` rows, ``T`` positions, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LossOfHidden = Callable[[Tensor], Tensor]


def inject(hidden_BTD: Tensor, loss: LossOfHidden, parameters: Sequence[nn.Parameter], *, through: bool) -> Tensor:
    """``hidden_BTD`` itself; backward adds the gradients of ``loss(hidden_BTD)``.

    Args:
        hidden_BTD: where the loss looks.
        loss: gives a scalar; called once, in backward.
        parameters: those it depends on that are trained.
        through: whether the loss reaches what computed ``hidden_BTD``, too; not in front of a frozen backbone.
    """
    result: Tensor = _Inject.apply(hidden_BTD, loss, through, *parameters)  # type: ignore[no-untyped-call]
    return result


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, loss: LossOfHidden, through: bool, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_BTD)
        ctx.loss, ctx.parameters = loss, parameters
        ctx.through = through and hidden_BTD.requires_grad
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BTD = ctx.saved_tensors[0].detach().requires_grad_(ctx.through)
        inputs = [*([hidden_BTD] if ctx.through else []), *ctx.parameters]
        with torch.set_grad_enabled(bool(inputs)):
            loss = ctx.loss(hidden_BTD)
        # Nothing may learn from it, as from the full depth of a frozen backbone: then it was only measured.
        grads = list(torch.autograd.grad(loss, inputs, allow_unused=True)) if inputs else []
        if ctx.through:
            own_BTD = grads.pop(0)
            grad_BTD = grad_BTD if own_BTD is None else grad_BTD + own_BTD
        return grad_BTD, None, None, *grads


def carry(before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    """``after_BTD``, computed without autograd from ``before_BTD``: keeps the chain of nodes back to earlier stages."""
    result: Tensor = _Carry.apply(before_BTD, after_BTD)  # type: ignore[no-untyped-call]
    return result


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        return after_BTD.view_as(after_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return grad_BTD, None


def hold(hidden_BTD: Tensor, anchor_1: Tensor) -> Tensor:
    """``hidden_BTD`` itself, made part of a graph by a parameter that takes no part in it (its gradient is 0)."""
    result: Tensor = _Hold.apply(hidden_BTD, anchor_1)  # type: ignore[no-untyped-call]
    return result


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, anchor_1: Tensor) -> Tensor:
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return grad_BTD, grad_BTD.new_zeros(1)


def end(hidden_BTD: Tensor) -> Tensor:
    """A loss of 0 for the engine to start backward from; every real loss was injected before."""
    result: Tensor = _End.apply(hidden_BTD)  # type: ignore[no-untyped-call]
    return result


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor) -> Tensor:
        ctx.like = hidden_BTD.new_empty(1).expand(hidden_BTD.shape)
        return hidden_BTD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        zeros: Tensor = torch.zeros_like(ctx.like, memory_format=torch.contiguous_format)
        return zeros
