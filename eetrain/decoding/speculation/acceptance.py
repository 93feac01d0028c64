"""Which drafted tokens stand, and the token after them: the rules that make speculation lossless.

Greedy: a draft stands while it is what the verifying logits would have chosen. Sampling (Leviathan et al. 2022, arXiv
2211.17192): a draft ``d ~ q`` stands with probability ``min(1, p(d) / q(d))``; the first that falls is replaced by a
draw from ``max(p - q, 0)``, normalised; so every token is distributed as ``p``, whatever ``q`` was.

Shape suffixes: ``B`` rows, ``W`` positions of a window, ``K = W - 1`` drafts checked, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What became of a window.

    Attributes:
        accepted: ``[B]``, how many drafts stand.
        tokens: ``[B]``, the token behind them.
    """

    accepted: Tensor
    tokens: Tensor


def verify_greedily(scores_BWV: Tensor, drafts_BK: Tensor, counts_B: Tensor) -> Verdict:
    """The longest prefix of the drafts that greedy search would have chosen, and its next choice.

    Args:
        scores_BWV: processed logits; position ``w`` predicts what follows the first ``w`` drafts.
        drafts_BK: tokens, of which each row has ``counts_B``.
        counts_B: int64.
    """
    picks_BW = scores_BWV.argmax(dim=-1)
    accepted_B = _prefix(picks_BW[:, :-1] == drafts_BK, counts_B)
    return Verdict(accepted_B, picks_BW.gather(1, accepted_B[:, None]).squeeze(1))


def verify_sampled(p_BWV: Tensor, q_BKV: Tensor, drafts_BK: Tensor, counts_B: Tensor) -> Verdict:
    """A draw of how many drafts stand, and of the token behind them.

    Args:
        p_BWV: probabilities by which tokens are to be distributed.
        q_BKV: probabilities by which the drafts were drawn.
        drafts_BK: as for :func:`verify_greedily`.
        counts_B: int64.
    """
    place_BK1 = drafts_BK[..., None]
    p_BK = p_BWV[:, :-1].gather(2, place_BK1).squeeze(2)
    q_BK = q_BKV.gather(2, place_BK1).squeeze(2)
    accepted_B = _prefix(torch.rand_like(p_BK) * q_BK < p_BK, counts_B)
    row_B = torch.arange(len(p_BWV), device=p_BWV.device)
    p_BV = p_BWV[row_B, accepted_B]
    if q_BKV.shape[1] == 0:
        return Verdict(accepted_B, draw(p_BV))
    fell_B1 = (accepted_B < counts_B)[:, None]
    q_BV = q_BKV[row_B, accepted_B.clamp(max=q_BKV.shape[1] - 1)]
    rest_BV = (p_BV - q_BV).clamp(min=0)
    # Where p and q differ by rounding only nothing is left, and p itself is as good.
    usable_B1 = fell_B1 & (rest_BV.sum(-1, keepdim=True) > 0)
    return Verdict(accepted_B, draw(torch.where(usable_B1, rest_BV, p_BV)))


def draw(weights_BV: Tensor) -> Tensor:
    """One token a row ``[B]``, with probabilities in proportion to ``weights_BV``."""
    return torch.multinomial(weights_BV, num_samples=1).squeeze(1)


def _prefix(stands_BK: Tensor, counts_B: Tensor) -> Tensor:
    """How many of each row's drafts stand before the first that falls, ``[B]``."""
    within_BK = torch.arange(stands_BK.shape[1], device=stands_BK.device) < counts_B[:, None]
    return (stands_BK & within_BK).long().cumprod(dim=1).sum(dim=1)
