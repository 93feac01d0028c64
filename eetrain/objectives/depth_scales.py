"""How much each depth counts in LayerSkip's exit loss: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from eetrain.objectives.objective import FULL

Weighting = Literal["sum", "torchtune", "uniform"]


def exit_scale_of(block: int, num_blocks: int, exit_scale: float, weighting: Weighting) -> float:
    """``e``: how much the exit after a block counts, before weights are made to sum to 1.

    With ``l = block - 1``::

        sum:        e(l) = scale sum_{i=0..l} i        and of the full depth  L - 1 + scale sum_{i=0..L-2} i
        torchtune:  e(l) = scale sum_{i=1..l+1} i      and of the full depth  sum_{i=1..L} i
        uniform:    e(l) = scale                       and of the full depth  1

    Args:
        block: counted from 1; ``num_blocks`` for the full depth.
        num_blocks: ``L``.
        exit_scale: ``scale``, 0 or larger.
        weighting: which of the formulas.
    """
    is_full = block == num_blocks
    if weighting == "uniform":
        return 1.0 if is_full else exit_scale
    if weighting == "torchtune":
        return _sum_to(block) * (1.0 if is_full else exit_scale)
    if is_full:
        return num_blocks - 1 + exit_scale * _sum_to(num_blocks - 2)
    return exit_scale * _sum_to(block - 1)


def normalized_weights(
    exits: Sequence[int], num_blocks: int, exit_scale: float, weighting: Weighting
) -> dict[int, float]:
    """Weights that sum to 1 over exits and full depth; an exit's depends on its block, not on its place.

    Args:
        exits: blocks with an exit that is on, ascending, below the last.
        num_blocks: of the backbone.
        exit_scale: see :func:`exit_scale_of`.
        weighting: see there.

    Returns:
        By depth, exits ascending, then :data:`FULL`; exits without weight are left out.
    """
    scales = {block: exit_scale_of(block, num_blocks, exit_scale, weighting) for block in exits}
    counted = {block: scale for block, scale in scales.items() if scale > 0}
    if not counted:  # also in a model of one block, whose only scale is 0 by the formula
        return {FULL: 1.0}
    full = exit_scale_of(num_blocks, num_blocks, exit_scale, weighting)
    total = sum(counted.values()) + full
    return {**{block: scale / total for block, scale in counted.items()}, FULL: full / total}


def _sum_to(last: int) -> float:
    return last * (last + 1) / 2
