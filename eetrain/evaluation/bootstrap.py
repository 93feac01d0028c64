"""How far a quality would move with other prompts: the paired bootstrap.

Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation" (EMNLP): prompts are drawn with
replacement, as many as there are, and every system is scored on the same draws. Intervals are the central 95 % of the
resampled values (percentiles). Koehn reports the share of draws in which one system wins; here it is the share in
which it is worse than the baseline, ties not counted, and the interval of the difference stands beside it.

All qualities here are functions of sums over prompts, so a draw is a row of counts and resampling is one product of
matrices. The intervals say what the choice of prompts does, not what another training run would do.

Shape suffixes: ``R`` resamples, ``N`` prompts, ``K`` sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """A quality that is a function of sums over prompts.

    Attributes:
        terms_NK: what each prompt adds to each sum.
        score: sums ``[R, K]`` to qualities ``[R]``; nan where the sums hold nothing to score.
    """

    terms_NK: Floats
    score: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The quality on the prompts themselves."""
        return float(self.score(self.terms_NK.sum(axis=0, keepdims=True))[0])


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Sums:
    """A ratio of sums, such as nats per token: one number a prompt above and one below."""
    return Sums(np.array([numerators, denominators], dtype=np.float64).T, _divided)


def mean(values: Sequence[float]) -> Sums:
    """A mean over prompts."""
    return ratio(values, [1.0] * len(values))


def _divided(sums_RK: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        quotients: Floats = sums_RK[:, 0] / sums_RK[:, 1]
    return quotients


@dataclass(frozen=True)
class Resampled:
    """A quality and its values on the draws.

    Attributes:
        value: on the prompts themselves.
        values_R: on each draw, nan where it holds nothing to score; empty for a single prompt.
    """

    value: float
    values_R: Floats

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """Low and high end of the central 95 %."""
        if not len(self.values_R):
            return None, None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(self.values_R, [tail, 100 - tail])
        return float(low), float(high)

    def minus(self, baseline: Resampled) -> Resampled:
        """The difference, draw by draw."""
        return Resampled(self.value - baseline.value, self.values_R - baseline.values_R)

    def share_worse(self, *, lower_is_better: bool = False) -> float | None:
        """Of a difference to a baseline: the share of draws in which it is for the worse."""
        if not len(self.values_R):
            return None
        scored = self.values_R[~np.isnan(self.values_R)]
        return float(np.mean(scored > 0 if lower_is_better else scored < 0))


class Bootstrap:
    """Draws of prompts, the same ones for everything that is resampled with them.

    Args:
        num_prompts: for a single one there are no draws: it says nothing about others.
        resamples: number of draws.
        seed: of the generator; equal seeds and numbers of prompts give equal draws.

    Example:
        >>> Bootstrap(4)(mean([1.0, 2.0, 3.0, 6.0])).value
        3.0
    """

    def __init__(self, num_prompts: int, *, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        draws = resamples if num_prompts > 1 else 0
        chances = np.full(num_prompts, 1 / num_prompts)
        self.counts_RN = np.random.default_rng(seed).multinomial(num_prompts, chances, size=draws).astype(np.float64)

    def __call__(self, sums: Sums) -> Resampled:
        """Score every draw."""
        return Resampled(sums.value, sums.score(self.counts_RN @ sums.terms_NK))


def described(num_prompts: int) -> dict[str, float | int | str] | None:
    """How intervals were made, as plain data; ``None`` for a single prompt, which has none."""
    if num_prompts < 2:
        return None
    return {"method": "paired bootstrap over prompts", "confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED}
