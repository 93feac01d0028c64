"""Gradients that are computed together with the loss, and the autograd node that hands them out.

A chunk's logits are gone before backward starts, so what they would have contributed is summed while they
live. Everything is stored without the loss's normalizer: float16 logit gradients divided by some thousand
tokens would underflow. Backward multiplies by it once, together with the upstream gradient.

Shape suffixes: ``C`` tokens of one chunk, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eetrain.backbones.projection import Projection

_ROWS_AT_ONCE = 4096


class GradientStore:
    """One buffer per input of the loss that needs a gradient; a matrix shared by exits has one buffer.

    Matrices and biases are summed over many chunks, so 16-bit ones get float32 buffers. Hidden states are
    written once per position and keep their own precision.
    """

    def __init__(self, hidden: Sequence[Tensor], projections: Sequence[Projection]) -> None:
        self.inputs: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._parameters: dict[int, Tensor] = {}
        self._hidden = [self._add(states, states.dtype) for states in hidden]
        for head in projections:
            for tensor in (head.weight, head.bias):
                if tensor is not None and id(tensor) not in self._parameters:
                    buffer = self._add(tensor, wide_dtype(tensor.dtype))
                    if buffer is not None:
                        self._parameters[id(tensor)] = buffer

    def _add(self, tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return None
        buffer = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        self.inputs.append(tensor)
        self._buffers.append(buffer)
        return buffer

    def wanted_by(self, exit_index: int, head: Projection) -> bool:
        """Whether any gradient flows from this exit's logits."""
        parameters = (head.weight, head.bias)
        return self._hidden[exit_index] is not None or any(id(t) in self._parameters for t in parameters)

    def add(
        self,
        exit_index: int,
        rows_C: slice | Tensor,
        head: Projection,
        matrix_VD: Tensor,
        states_CD: Tensor,
        grad_CV: Tensor,
    ) -> None:
        """Add one chunk: ``dh = g W``, ``dW += g^T h``, ``db += sum g``.

        Args:
            exit_index: which hidden states ``states_CD`` come from.
            rows_C: their positions.
            head: whose matrix and bias receive gradients.
            matrix_VD: the matrix in the precision the logits were computed in.
            states_CD: the hidden states in that precision.
            grad_CV: gradient of the raw logits, before scale and soft cap, in the precision of the softmax.
        """
        bias_buffer = self._parameters.get(id(head.bias))
        if bias_buffer is not None:
            bias_buffer += grad_CV.sum(0)
        grad_CV = grad_CV.to(matrix_VD.dtype)
        hidden_buffer = self._hidden[exit_index]
        if hidden_buffer is not None:
            hidden_buffer[rows_C] = (grad_CV @ matrix_VD).to(hidden_buffer.dtype)
        buffer_VD = self._parameters.get(id(head.weight))
        if buffer_VD is None:
            return
        if buffer_VD.dtype == grad_CV.dtype:
            buffer_VD.addmm_(grad_CV.t(), states_CD)
        else:
            buffer_VD += grad_CV.t() @ states_CD

    def attach(self, loss: Tensor, normalizer: Tensor) -> Tensor:
        """``loss`` as a node of the graph whose backward hands out the stored gradients."""
        if not self.inputs:
            return loss
        apply: Callable[..., Tensor] = _StoredGradients.apply
        return apply(loss, normalizer, self._buffers, *self.inputs)


class _StoredGradients(torch.autograd.Function):
    """Identity on the loss; backward multiplies the stored buffers, in place, and gives them away."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, normalizer: Tensor, buffers: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.normalizer = normalizer
        ctx.buffers = buffers
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative: its gradients are computed in the forward "
                "pass. Call backward without create_graph=True."
            )
        buffers, ctx.buffers = ctx.buffers, None
        if buffers is None:
            raise RuntimeError(
                "linear_cross_entropy was sent backward twice: its gradients are handed out once. "
                "Compute the loss again instead of using retain_graph=True."
            )
        factor = upstream / ctx.normalizer
        for buffer in buffers:
            _scale_(buffer, factor)
        grads = [buffer.to(dtype) for buffer, dtype in zip(buffers, ctx.dtypes, strict=True)]
        return None, None, None, *grads


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and softmax: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale_(buffer: Tensor, factor: Tensor) -> None:
    """Multiply in place; 16-bit rows a few at a time in float32, as a GPU would round ``factor`` to 16 bit."""
    if buffer.dtype == wide_dtype(buffer.dtype):
        buffer.mul_(factor)
        return
    for rows in torch.split(buffer, _ROWS_AT_ONCE):
        rows.copy_(rows.to(factor.dtype) * factor)
