"""Whether counts are what a distribution says."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """Probability of counts at least as far from the expected ones, if those are right (Pearson's test).

    Args:
        observed: counts.
        expected: means of the counts, with the same sum; where 0, nothing may be observed.
    """
    observed, expected = observed.double().flatten(), expected.double().flatten()
    possible = expected > 0
    if bool((observed[~possible] > 0).any()):
        return 0.0
    statistic = ((observed - expected)[possible].square() / expected[possible]).sum()
    freedom = torch.tensor(max(1, int(possible.sum()) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
