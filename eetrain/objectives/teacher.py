"""Exits that learn from the full depth: its distribution as a target, one chunk of tokens at a time.

Shape suffixes: ``E`` exits, ``N`` tokens, ``C`` tokens of one chunk, ``D`` hidden size, ``V`` vocabulary, ``K`` kept
tokens of the vocabulary (``V`` if all).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError

_SLICES = 8


@dataclass(frozen=True)
class Distillation:
    """Exits learn from the full depth: ``(1 - share) CE(label, p_e) + share CE(p_T, p_e)`` with ``p_T`` constant.

    Self-supervised exits (arXiv 2407.21082) and EESD (arXiv 2406.03853) train exits of a frozen model in this manner;
    with ``share=1`` labels only say which positions count. Up to the entropy of ``p_T``, which no exit can change,
    ``CE(p_T, p_e)`` is ``KL(p_T || p_e)``. The full depth itself keeps its plain cross-entropy. EESD's paper leaves the
    mixture with labels open; ``share`` decides it here. ``p_e`` always covers the whole vocabulary: with ``top_k`` the
    divergence is 0 only for an exit that gives the other tokens no probability.

    Args:
        share: how much of an exit's loss comes from the full depth, above 0 and at most 1.
        top_k: keep the full depth's most probable tokens only and let their probabilities sum to 1; ``None`` keeps all.

    Raises:
        ConfigError: a value out of its range.
    """

    share: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"distillation.share is {self.share}.",
                hint="use a number above 0 and at most 1; without distillation leave it out.",
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"distillation.top_k is {self.top_k}.", hint="use a positive number, or null for all.")


@dataclass(frozen=True)
class Teacher:
    """What the exits of a call learn from.

    Args:
        hidden: normed states ``[N, D]`` of the full depth; no gradient flows to them from the exits.
        projection: their map to logits, as constant.
        distillation: how much of it, and of what.
        place: where the full depth stands among the depths of the call, which then computes its logits once;
            ``None`` if it is none of them.
    """

    hidden: Tensor
    projection: Projection
    distillation: Distillation
    place: int | None = None


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution over one chunk.

    Args:
        share: see :class:`Distillation`.
        probs_CK: probabilities that sum to 1.
        ids_CK: of which tokens; ``None`` for all in their order.
        entropy_C: of the distribution in nats.
    """

    share: float
    probs_CK: Tensor
    ids_CK: Tensor | None
    entropy_C: Tensor

    @classmethod
    def take_(cls, exp_CV: Tensor, sum_C1: Tensor, distillation: Distillation) -> Targets:
        """Targets of ``exp(z - max z)``, which is normalised in place and, if all tokens are kept, kept itself."""
        probs_CK, ids_CK = exp_CV.div_(sum_C1), None
        if distillation.top_k is not None:
            probs_CK, ids_CK = probs_CK.topk(min(distillation.top_k, probs_CK.shape[-1]), dim=-1)
            probs_CK = probs_CK / probs_CK.sum(-1, keepdim=True)
        entropies = [torch.special.entr(part).sum(-1) for part in probs_CK.chunk(_SLICES)]
        return cls(distillation.share, probs_CK, ids_CK, torch.cat(entropies))

    def gap(self, logits_CV: Tensor, labels_C: Tensor) -> Tensor:
        """``CE(p_T, p_e) - CE(label, p_e) = sum_v p_T(v) (z(label) - z(v))``, ``[C]``, from an exit's logits ``z``."""
        label_logit_C1 = logits_CV.gather(-1, labels_C[:, None])
        kept_CK = logits_CV if self.ids_CK is None else logits_CV.gather(-1, self.ids_CK)
        parts = zip(*(whole.chunk(_SLICES) for whole in (label_logit_C1, kept_CK, self.probs_CK)), strict=True)
        return torch.cat([((label - kept).mul_(probs)).sum(-1) for label, kept, probs in parts])

    def divergence(self, nll_C: Tensor, gap_C: Tensor) -> Tensor:
        """``KL(p_T || p_e)`` of every token in nats."""
        return nll_C + gap_C - self.entropy_C

    def subtract_(self, grad_CV: Tensor, factor_C1: Tensor) -> None:
        """Take ``share * factor * p_T`` from ``factor * p_e``, in place."""
        if self.ids_CK is None:
            grad_CV.addcmul_(self.probs_CK, factor_C1, value=-self.share)
        else:
            grad_CV.scatter_add_(-1, self.ids_CK, self.probs_CK * (-self.share * factor_C1))
