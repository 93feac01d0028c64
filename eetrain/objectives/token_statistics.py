"""What one row of logits tells about one token: loss, prediction and the confidence measures exits decide by.

Shape suffixes: ``E`` exits, ``N`` tokens, ``C`` tokens of one chunk, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
        sharp_entropy: entropy of ``p^2 / sum p^2`` in nats; only at level ``"all"``.
    """

    nll: Tensor
    prediction: Tensor
    max_prob: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None
    sharp_entropy: Tensor | None = None

    @staticmethod
    def blank(shape: tuple[int, int], level: StatisticsLevel, *, ignore_index: int, like: Tensor) -> TokenStatistics:
        """Statistics of tokens nobody looked at, with the dtype and device of ``like``."""

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        prediction = torch.full(shape, ignore_index, dtype=torch.int64, device=like.device)
        extras = [zeros() for _ in range(3)] if level == "all" else []
        return TokenStatistics(zeros(), prediction, zeros(), *extras)

    def write(self, exit_index: int, rows_C: slice | Tensor, chunk: TokenStatistics) -> None:
        """Store the ``[C]`` statistics of one chunk in row ``exit_index``, columns ``rows_C``."""
        for field in fields(self):
            target, values = getattr(self, field.name), getattr(chunk, field.name)
            if target is not None:
                target[exit_index, rows_C] = values


def exponentiate_(
    logits_CV: Tensor, labels_C: Tensor, level: StatisticsLevel
) -> tuple[Tensor, Tensor, TokenStatistics | None]:
    """Overwrite logits ``z`` by ``exp(z - max z)`` and say what was in them.

    Working in place keeps one buffer of the size of the logits alive instead of three. With ``e = exp(z - max z)``,
    ``S = sum_v e_v``, ``Q = sum_v e_v^2`` and ``h_v = -e_v log e_v``, a few rows at a time::

        entropy of p:             log S + sum_v h_v / S
        entropy of p^2 / sum p^2: log Q + 2 sum_v e_v h_v / Q

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
    extras: list[Tensor] = []
    if level == "all":
        margin_C1 = (1 - _second_largest(exp_CV, prediction_C1)) / sum_C1
        extras = [column_C1.squeeze(-1) for column_C1 in (margin_C1, *_entropies(exp_CV, sum_C1))]
    statistics = TokenStatistics(nll_C, prediction_C1.squeeze(-1), sum_C1.reciprocal().squeeze(-1), *extras)
    return nll_C, sum_C1, statistics


def _second_largest(exp_CV: Tensor, prediction_C1: Tensor) -> Tensor:
    """Largest entry beside the predicted one, whose value is exactly 1 and is put back."""
    exp_CV.scatter_(-1, prediction_C1, 0.0)
    second_C1 = exp_CV.amax(-1, keepdim=True)
    exp_CV.scatter_(-1, prediction_C1, 1.0)
    return second_C1


def _entropies(exp_CV: Tensor, sum_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy ``[C, 1]`` of the distribution, and of its sharpened form."""
    parts = [_entropy_sums(part) for part in exp_CV.chunk(_ENTROPY_SLICES)]
    plain_C1, sharp_C1, squares_C1 = (torch.cat(column) for column in zip(*parts, strict=True))
    return sum_C1.log() + plain_C1 / sum_C1, squares_C1.log() + 2 * sharp_C1 / squares_C1


def _entropy_sums(exp_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sum h``, ``sum e h`` and ``sum e^2`` in one buffer of the slice's size."""
    buffer_CV = torch.special.entr(exp_CV)
    plain_C1 = buffer_CV.sum(-1, keepdim=True)
    sharp_C1 = buffer_CV.mul_(exp_CV).sum(-1, keepdim=True)
    return plain_C1, sharp_C1, torch.mul(exp_CV, exp_CV, out=buffer_CV).sum(-1, keepdim=True)
