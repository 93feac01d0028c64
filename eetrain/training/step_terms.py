"""The loss of one batch, by its parts, before the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOTAL = "loss"
PHASE = "phase"


@dataclass(frozen=True)
class StepTerms:
    """The total under ``loss``, and the objective's terms.

    Args:
        means: over the tokens of all processes, the same on each.
        local: what this process had to give, in whatever unit: only whether it is finite counts.
    """

    means: Mapping[str, Tensor] = field(default_factory=dict)
    local: Mapping[str, Tensor] = field(default_factory=dict)


def bad_names(terms: Mapping[str, Tensor]) -> list[str]:
    """Terms that are not finite; the total only if nothing else is bad, as it is the sum of the others."""
    found = [name for name, value in terms.items() if not bool(torch.isfinite(value).all())]
    return [name for name in found if name != TOTAL] or found
