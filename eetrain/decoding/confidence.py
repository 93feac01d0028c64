"""How sure an exit is: measures in which more is surer, each from the exit's logits or its hidden states.

Source: CALM (Schuster et al. 2022, arXiv 2207.07061, section 3.3); entropy as in arXiv 2407.21082, here turned
round and divided by its maximum so that every measure has the same direction and most the range 0..1.
Shape suffixes: ``R`` rows, ``V`` vocabulary, ``D`` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Evidence:
    """What a policy may look at when a token stands at an exit.

    Attributes:
        exit: block after which the exit stands.
        state_RD: residual stream after that block.
        previous_RD: residual stream before that block.
        head: gives the exit's logits ``[R, V]``; called only when a measure needs them.
        gates: gives, for a cost weight, the outputs of the gates ``[R, G]`` at the ``G`` exits this token was tested
            at, this one last; only for policies that ask gates.
    """

    exit: int
    state_RD: Tensor
    previous_RD: Tensor
    head: Callable[[], Tensor]
    gates: Callable[[float | None], Tensor] | None = None
    _logits: Tensor | None = field(default=None, repr=False)

    @property
    def logits_RV(self) -> Tensor:
        """The exit's logits, computed once."""
        if self._logits is None:
            self._logits = self.head()
        return self._logits

    def gates_RG(self, cost_weight: float | None) -> Tensor:
        """Outputs of the gates passed so far, this exit's last, in [0, 1]."""
        assert self.gates is not None, "the policy does not say that it asks gates"
        return self.gates(cost_weight)


def max_probability(evidence: Evidence) -> Tensor:
    """Probability of the likeliest token, ``[R]`` in (0, 1]."""
    logits = evidence.logits_RV.float()
    return torch.exp(logits.amax(-1) - logits.logsumexp(-1))


def margin(evidence: Evidence) -> Tensor:
    """Gap between the two likeliest tokens' probabilities, ``[R]`` in [0, 1]."""
    logits = evidence.logits_RV.float()
    top = torch.exp(logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True))
    return top[:, 0] - top[:, 1]


def negative_entropy(evidence: Evidence) -> Tensor:
    """``1 - H(p) / log V``, ``[R]`` in [0, 1]: 1 for a certain token, 0 for a uniform distribution."""
    log_p = torch.log_softmax(evidence.logits_RV.float(), dim=-1)
    return 1.0 + (log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])


def saturation(evidence: Evidence) -> Tensor:
    """Cosine between the residual stream after and before the exit's block, ``[R]``; needs no logits."""
    return F.cosine_similarity(evidence.state_RD.float(), evidence.previous_RD.float(), dim=-1)


MEASURES: dict[str, Callable[[Evidence], Tensor]] = {
    "max": max_probability,
    "margin": margin,
    "entropy": negative_entropy,
    "saturation": saturation,
}
