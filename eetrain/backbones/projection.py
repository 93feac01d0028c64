"""Hidden state to logits: the last linear map of a decoder and what some families do to its output.

Shape suffixes: ``N`` any leading dimensions, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Projection:
    """Map normed hidden states to logits: ``z = cap * tanh(scale * (W h + b) / cap)``, without ``tanh`` if no cap.

    Args:
        weight: output matrix, ``[V, D]``.
        bias: ``[V]`` or ``None``.
        scale: factor on the logits (Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``).
        softcap: bound on ``|z|`` (Gemma 2: ``final_logit_softcapping``), or ``None``.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normed hidden states ``[..., D]``."""
        return self.shape_logits(F.linear(hidden_ND, self.weight, self.bias))

    def shape_logits(self, raw_NV: Tensor) -> Tensor:
        """Apply scale and soft cap to the output of the linear map, in the order the families use."""
        logits = raw_NV if self.scale == 1.0 else raw_NV * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap
