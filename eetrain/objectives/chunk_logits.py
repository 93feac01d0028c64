"""The logits of one chunk of tokens at one depth, and their gradient in the same memory.

Shape suffixes: ``C`` tokens of one chunk, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eetrain.backbones.projection import Projection
from eetrain.objectives.gradients import wide_dtype
from eetrain.objectives.teacher import Targets
from eetrain.objectives.token_statistics import StatisticsLevel, TokenStatistics, exponentiate_


@dataclass
class Reading:
    """What the logits ``z`` of a chunk said, and what is left of them.

    Args:
        states_CD: what they were made of, in the precision of the product.
        matrix_VD: likewise.
        exp_CV: ``exp(z - max z)``, or anything proportional to it by row.
        sum_C1: its sum over the vocabulary.
        slope_CV: derivative of the soft cap, where there is one and it is needed.
        nll_C: ``-log p(label)``.
        statistics: see :class:`TokenStatistics`, if asked for.
        targets: what the depth learns beside the labels.
        gap_C: how much more its loss against ``targets`` is than ``nll_C``.
    """

    states_CD: Tensor
    matrix_VD: Tensor
    exp_CV: Tensor
    sum_C1: Tensor
    slope_CV: Tensor | None
    nll_C: Tensor
    statistics: TokenStatistics | None
    targets: Targets | None = None
    gap_C: Tensor | None = None

    @property
    def loss_C(self) -> Tensor:
        """The loss of every token, without weights: ``(1 - a) CE(label) + a CE(p_T)``."""
        if self.targets is None or self.gap_C is None:
            return self.nll_C
        return self.nll_C + self.targets.share * self.gap_C

    def gradient_(self, labels_C: Tensor, factor_C: Tensor) -> Tensor:
        """``factor * (softmax(z) - (1 - a) onehot(label) - a p_T) * slope``, in the memory of ``exp_CV``."""
        factor_C1 = factor_C[:, None]
        grad_CV = self.exp_CV.mul_(factor_C1 / self.sum_C1)
        if self.targets is None:
            grad_CV.scatter_add_(-1, labels_C[:, None], -factor_C1)
        else:
            grad_CV.scatter_add_(-1, labels_C[:, None], (self.targets.share - 1) * factor_C1)
            self.targets.subtract_(grad_CV, factor_C1)
        return grad_CV if self.slope_CV is None else grad_CV.mul_(self.slope_CV)


def read(
    states_CD: Tensor,
    matrix_VD: Tensor,
    head: Projection,
    labels_C: Tensor,
    *,
    level: StatisticsLevel = "none",
    keep_slope: bool = False,
    targets: Targets | None = None,
) -> Reading:
    """Compute a chunk's logits and reduce them.

    Args:
        states_CD: normed states.
        matrix_VD: of ``head``, in the precision the product runs in.
        head: bias, scale and soft cap.
        labels_C: none of them ignored.
        level: which statistics to compute.
        keep_slope: whether a gradient will be asked for.
        targets: what the depth learns beside the labels.
    """
    states_CD = states_CD.detach().to(matrix_VD.dtype)
    logits_CV, slope_CV = _logits(states_CD, matrix_VD, head, keep_slope=keep_slope)
    gap_C = None if targets is None else targets.gap(logits_CV, labels_C)
    nll_C, sum_C1, statistics = exponentiate_(logits_CV, labels_C, level)
    return Reading(states_CD, matrix_VD, logits_CV, sum_C1, slope_CV, nll_C, statistics, targets, gap_C)


def _logits(
    states_CD: Tensor, matrix_VD: Tensor, head: Projection, *, keep_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits in softmax precision, and the derivative of the soft cap ``1 - tanh^2`` where it is needed."""
    bias = None if head.bias is None else head.bias.detach().to(matrix_VD.dtype)
    logits_CV = F.linear(states_CD, matrix_VD, bias)
    logits_CV = logits_CV.to(wide_dtype(logits_CV.dtype))
    if head.softcap is None:
        return logits_CV if head.scale == 1.0 else logits_CV.mul_(head.scale), None
    logits_CV.mul_(head.scale / head.softcap).tanh_()
    slope_CV = logits_CV.square().neg_().add_(1) if keep_slope else None
    return logits_CV.mul_(head.softcap), slope_CV


def cast_for_products(projections: Sequence[Projection]) -> dict[int, Tensor]:
    """Each distinct matrix once, by identity, in the precision its products run in."""
    matrices: dict[int, Tensor] = {}
    for head in projections:
        weight = head.weight
        if id(weight) not in matrices:
            matrices[id(weight)] = weight.detach().to(_product_dtype(weight))
    return matrices


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Precision of products with ``weight``: autocast's where it is on (it spares float64), else its own."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
