"""The arithmetic of gates, for training and decoding alike: features of a distribution, and who leaves where.

Source: JEI-DNN, Regol, Chataoui, Coates 2023 (arXiv 2310.09163, ICLR 2024).
Shape suffixes: ``R`` rows, ``N`` tokens, ``E`` exits, ``G`` gates (shallowest first), ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FEATURES = ("max_prob", "entropy", "margin", "sharp_entropy")
"""What a gate looks at, in the order of its inputs."""


class Statistics(Protocol):
    """Statistics of distributions, all of one shape; those that were not computed are ``None``."""

    @property
    def max_prob(self) -> Tensor:
        """Probability of the likeliest token."""

    @property
    def entropy(self) -> Tensor | None:
        """Entropy in nats."""

    @property
    def margin(self) -> Tensor | None:
        """Largest minus second largest probability."""

    @property
    def sharp_entropy(self) -> Tensor | None:
        """Entropy in nats of ``p^2 / sum p^2``."""


def stack_features(statistics: Statistics) -> Tensor:
    """Gate inputs ``[..., 4]`` from statistics of shape ``[...]``, in the order of :data:`FEATURES`."""
    return torch.stack([getattr(statistics, name) for name in FEATURES], dim=-1)


def gate_features(logits_RV: Tensor) -> Tensor:
    """The same inputs straight from logits: ``[R, 4]``, in float32 (float64 for float64)."""
    wide = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    log_p_RV = torch.log_softmax(logits_RV.to(wide), dim=-1)
    top_R2 = log_p_RV.topk(2, dim=-1).values.exp()
    sharp_RV = torch.log_softmax(2 * log_p_RV, dim=-1)
    return torch.stack(
        [top_R2[:, 0], _entropy(log_p_RV), top_R2[:, 0] - top_R2[:, 1], _entropy(sharp_RV)],
        dim=-1,
    )


def _entropy(log_p_RV: Tensor) -> Tensor:
    entropy_R: Tensor = torch.special.entr(log_p_RV.exp()).sum(-1)
    return entropy_R


def exit_distribution(gates_NG: Tensor) -> Tensor:
    """Probability to leave at each exit, the full depth last, from every gate's own output.

    ``P_l = max(0, min(g_l, 1 - sum_{j<l} P_j))``; the full depth takes what remains. The gates are
    unconditional: ``g_l`` is the share wanted at exit ``l``, not a share of those who came that far.

    Args:
        gates_NG: gate outputs in [0, 1], shallowest exit first; leading dimensions are free.

    Returns:
        ``[N, G + 1]``, non-negative, summing to 1.
    """
    left_N = torch.ones_like(gates_NG[..., 0])
    shares = []
    for gate_N in gates_NG.unbind(-1):
        share_N, left_N = take_share(gate_N, left_N)
        shares.append(share_N)
    return torch.stack([*shares, left_N], dim=-1)


def take_share(gate_N: Tensor, left_N: Tensor) -> tuple[Tensor, Tensor]:
    """One exit's step of :func:`exit_distribution`: what leaves of the probability left so far, and what remains."""
    share_N = torch.minimum(gate_N, left_N).clamp(min=0)
    return share_N, left_N - share_N


def conditional(gates_NG: Tensor) -> Tensor:
    """Probability to leave at each exit for a token that came that far, ``[N, G]``.

    ``a_l = clip(P_l / prod_{j<l} (1 - a_j), 0, 1)`` with ``P`` of :func:`exit_distribution`; 0 where nothing
    comes that far. The reference decodes with ``a_l >= 0.5``. That leaves at the same exit as ``g_l >= 0.5`` or at a
    shallower one, since gates below one half add up; for gates that are 0 up to an exit and then 1, as their targets
    are, both rules agree.

    Args:
        gates_NG: as for :func:`exit_distribution`.
    """
    shares_NG = exit_distribution(gates_NG)[..., :-1]
    arriving_N = torch.ones_like(gates_NG[..., 0])
    chances = []
    for share_N in shares_NG.unbind(-1):
        ratio_N = (share_N / arriving_N.clamp(min=torch.finfo(share_N.dtype).tiny)).clamp(0, 1)
        chance_N = torch.where(arriving_N > 0, ratio_N, torch.zeros_like(ratio_N))
        arriving_N = arriving_N * (1 - chance_N)
        chances.append(chance_N)
    return torch.stack(chances, dim=-1)


def chosen_exit(leave_NG: Tensor) -> Tensor:
    """Index of the first gate that says to leave, ``G`` (the full depth) where none does, ``[N]`` int64.

    Args:
        leave_NG: bool, shallowest exit first.
    """
    always_N1 = torch.ones_like(leave_NG[..., :1])
    return torch.cat([leave_NG, always_N1], dim=-1).to(torch.int8).argmax(-1)
