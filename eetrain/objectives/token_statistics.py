"""What one row of logits tells about one token: loss, prediction and the confidence measures exits decide by.

Shape suffixes: ``E`` exits, ``N`` tokens, ``C`` tokens of one chunk, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StatisticsLevel = Literal["none", "basic", "all"]
_ENTROPY_SLICES = 8


@dataclass(frozen=True)
class TokenStatistics:
    """Detached statistics of every token at every exit, ``[E, N]``, or ``[C]`` inside one chunk of one exit.

    Rows are in the order of the exits handed in, columns in the order of the flattened tokens. Ignored
    positions hold 0, and the ignore index as their prediction: mask them before averaging.

    Args:
        nll: ``-log p(label)`` in nats.
        prediction: most probable token, int64.
        max_prob: probability of the prediction.
        margin: largest minus second largest probability; only at level ``"all"``.
        entropy: entropy of the distribution in nats; only at level ``"all"``.
    """

    nll: Tensor
    prediction: Tensor
    max_prob: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None

    @staticmethod
    def blank(shape: tuple[int, int], level: StatisticsLevel, *, ignore_index: int, like: Tensor) -> TokenStatistics:
        """Statistics of tokens nobody looked at, with the dtype and device of ``like``."""

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        prediction = torch.full(shape, ignore_index, dtype=torch.int64, device=like.device)
        full = level == "all"
        return TokenStatistics(zeros(), prediction, zeros(), zeros() if full else None, zeros() if full else None)

    def write(self, exit_index: int, rows_C: slice | Tensor, chunk: TokenStatistics) -> None:
        """Store the ``[C]`` statistics of one chunk in row ``exit_index``, columns ``rows_C``."""
        for name in ("nll", "prediction", "max_prob", "margin", "entropy"):
            target, values = getattr(self, name), getattr(chunk, name)
            if target is not None:
                target[exit_index, rows_C] = values


def exponentiate_(
    logits_CV: Tensor, labels_C: Tensor, level: StatisticsLevel
) -> tuple[Tensor, Tensor, TokenStatistics | None]:
    """Overwrite logits ``z`` by ``exp(z - max z)`` and say what was in them.

    Working in place keeps one buffer of the size of the logits alive instead of three. The entropy is
    ``log S - sum_v e_v log e_v / S`` with ``e = exp(z - max z)`` and ``S`` their sum, a few rows at a time.

    Args:
        logits_CV: logits in the precision of the softmax; overwritten.
        labels_C: true tokens, none of them ignored.
        level: which statistics to compute.

    Returns:
        The loss ``[C]``, the sums ``S`` ``[C, 1]``, and the statistics (``None`` at level ``"none"``).
    """
    if level == "none":
        top_C1, prediction_C1 = logits_CV.amax(-1, keepdim=True), None
    else:
        top_C1, prediction_C1 = logits_CV.max(-1, keepdim=True)
    logits_CV.sub_(top_C1)
    label_logit_C1 = logits_CV.gather(-1, labels_C[:, None])
    exp_CV = logits_CV.exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    nll_C = (sum_C1.log() - label_logit_C1).squeeze(-1)
    if prediction_C1 is None:
        return nll_C, sum_C1, None
    margin_C = entropy_C = None
    if level == "all":
        margin_C = ((1 - _second_largest(exp_CV, prediction_C1)) / sum_C1).squeeze(-1)
        entropy_C = (sum_C1.log() + _sum_of_entropies(exp_CV) / sum_C1).squeeze(-1)
    statistics = TokenStatistics(nll_C, prediction_C1.squeeze(-1), sum_C1.reciprocal().squeeze(-1), margin_C, entropy_C)
    return nll_C, sum_C1, statistics


def _second_largest(exp_CV: Tensor, prediction_C1: Tensor) -> Tensor:
    """Largest entry beside the predicted one, whose value is exactly 1 and is put back."""
    exp_CV.scatter_(-1, prediction_C1, 0.0)
    second_C1 = exp_CV.amax(-1, keepdim=True)
    exp_CV.scatter_(-1, prediction_C1, 1.0)
    return second_C1


def _sum_of_entropies(exp_CV: Tensor) -> Tensor:
    parts = exp_CV.chunk(_ENTROPY_SLICES)
    return torch.cat([torch.special.entr(part).sum(-1, keepdim=True) for part in parts])
