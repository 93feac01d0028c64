"""What a module multiplies: its weight matrices and the products of its attention, as multiply-adds of one row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from eetrain.errors import UnsupportedModelError


@dataclass(frozen=True)
class Matrix:
    """One product with a weight matrix.

    Attributes:
        multiply_adds: of one row: ``length * in * out``.
        trained: whether the matrix gets a gradient.
    """

    multiply_adds: int
    trained: bool


def matrices_of(module: nn.Module, length: int, config: Any) -> Iterator[Matrix]:
    """All products of ``module`` with its matrices, for one row of ``length`` tokens.

    Every two-dimensional parameter counts as one, three-dimensional ones as the matrices of experts of which each token
    runs ``config.num_experts_per_tok``. Embeddings are looked up and biases added: neither counts.

    Raises:
        UnsupportedModelError: experts, but the configuration does not say how many a token runs.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() not in (2, 3) or name.endswith("bias"):
                continue
            size = parameter.numel() * length
            if parameter.dim() == 3:
                size = size * _active_experts(config) // parameter.shape[0]
            yield Matrix(size, parameter.requires_grad)


def attention_products(length: int, config: Any) -> int:
    """Multiply-adds of one row's scores ``q k`` and values ``p v`` in one block: ``2 * length^2 * heads * head_dim``.

    The whole square is counted, as kernels with a mask compute it; a causal flash kernel computes half, and a window
    less. Families with heads of different widths for scores and values (``qk_head_dim``, ``v_head_dim``) have both.
    """
    heads: int = config.num_attention_heads
    usual = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths: int = (getattr(config, "qk_head_dim", None) or usual) + (getattr(config, "v_head_dim", None) or usual)
    return length * length * heads * widths


def _active_experts(config: Any) -> int:
    active: int | None = getattr(config, "num_experts_per_tok", None)
    if active is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} does not say how many experts a token runs (num_experts_per_tok).",
            hint="Set it in the model's configuration.",
        )
    return active
