"""How deep tokens went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class DepthSummary:
    """Depths of generated tokens.

    Attributes:
        tokens: number of tokens.
        mean: blocks per token.
        p10: the smallest depth that at least 10 % of the tokens stay within.
        p50: likewise for 50 %.
        p90: likewise for 90 %.
        shares: depth -> share of tokens that ran exactly so many blocks, ascending.
    """

    tokens: int
    mean: float
    p10: int
    p50: int
    p90: int
    shares: dict[int, float]


def summarise_depths(depths: Sequence[int]) -> DepthSummary:
    """Summarise exit traces.

    Args:
        depths: of all tokens; zeros, which stand after a row's end, are left out.
    """
    ran = sorted(depth for depth in depths if depth > 0)
    assert ran, "no token ran"
    shares = {depth: count / len(ran) for depth, count in sorted(Counter(ran).items())}
    p10, p50, p90 = (ran[ceil(share * len(ran) / 100) - 1] for share in (10, 50, 90))
    return DepthSummary(len(ran), sum(ran) / len(ran), p10, p50, p90, shares)
